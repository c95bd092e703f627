#include "index/sketch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "icecache/types.h"
#include "simd/kernels.h"

namespace icecache {

void Sketch::fit(const float* coordinates, std::int64_t n, std::int64_t stride) {
  std::vector<float> high(rank_, -INFINITY);
  low_.assign(rank_, INFINITY);
  step_.resize(rank_);
  for (std::int64_t i = 0; i < n; ++i) {
    for (int j = 0; j < rank_; ++j) {
      low_[j] = std::min(low_[j], coordinates[i * stride + j]);
      high[j] = std::max(high[j], coordinates[i * stride + j]);
    }
  }
  const float levels = static_cast<float>((1 << bits_) - 1);
  for (int j = 0; j < rank_; ++j) {
    step_[j] = std::max(high[j] - low_[j], 1e-9f) / levels;
  }
}

void Sketch::resize(int pages) {
  codes_.resize(std::max(codes_.size(), static_cast<std::size_t>(pages) * page_bytes()), 0);
}

void Sketch::write(int page, int slot, const float* coordinates) {
  std::uint8_t* codes = codes_.data() + static_cast<std::size_t>(page) * page_bytes();
  const int levels = (1 << bits_) - 1;
  const auto code = [&](int j) {
    const float x = std::nearbyint((coordinates[j] - low_[j]) / step_[j]);
    return static_cast<std::uint8_t>(std::clamp(x, 0.0f, static_cast<float>(levels)));
  };
  const int dims = 32 / bits_;  // of one 4-byte cell
  for (int g = 0; g < rank_ / dims; ++g) {
    std::uint8_t* cell = codes + (g * page_size_ + slot) * 4;
    for (int j = 0; j < 4; ++j) {
      cell[j] = bits_ == 4 ? static_cast<std::uint8_t>(code(8 * g + j) | code(8 * g + 4 + j) << 4)
                           : code(4 * g + j);
    }
  }
}

void Sketch::read(int page, int slot, int dims, std::uint8_t* codes) const {
  const std::uint8_t* from = codes_.data() + static_cast<std::size_t>(page) * page_bytes();
  for (int j = 0; j < dims; ++j) {
    if (bits_ == 4) {
      const std::uint8_t byte = from[(j / 8 * page_size_ + slot) * 4 + j % 4];
      codes[j] = j % 8 < 4 ? byte & 15 : byte >> 4;
    } else {
      codes[j] = from[(j / 4 * page_size_ + slot) * 4 + j % 4];
    }
  }
}

void Sketch::copy(int to_page, int to_slot, int from_page, int from_slot) {
  std::uint8_t* to = codes_.data() + static_cast<std::size_t>(to_page) * page_bytes();
  const std::uint8_t* from = codes_.data() + static_cast<std::size_t>(from_page) * page_bytes();
  for (int g = 0; g < rank_ * bits_ / 32; ++g) {
    std::memcpy(to + (g * page_size_ + to_slot) * 4, from + (g * page_size_ + from_slot) * 4, 4);
  }
}

void Sketch::prepare(const QueryMetric& metric, const float* queries, int group,
                     Query& query) const {
  query.projected.resize(static_cast<std::size_t>(group) * rank_);
  simd::kernels().matmul(queries, metric.from_query.data(), query.projected.data(), group,
                         metric.head_dim, rank_);
  prepare(metric, queries, query.projected.data(), group, rank_, query);
}

void Sketch::project(const QueryMetric& metric, const float* queries, std::int64_t n, int dims,
                     std::vector<float>& basis, float* projected) const {
  basis.resize(static_cast<std::size_t>(metric.head_dim) * dims);
  for (int i = 0; i < metric.head_dim; ++i) {
    std::copy_n(metric.from_query.data() + static_cast<std::ptrdiff_t>(i) * rank_, dims,
                basis.data() + static_cast<std::ptrdiff_t>(i) * dims);
  }
  simd::kernels().matmul(queries, basis.data(), projected, n, metric.head_dim, dims);
}

void Sketch::prepare(const QueryMetric& metric, const float* queries, float* projected, int group,
                     int dims, Query& query) const {
  query.dims = dims;
  const int codes = (1 << bits_) - 1;
  // Of the keys' mean, to which coordinates are relative, and of the nearest code there is.
  float zero[kMaxSketchRank], mean[kMaxSketchRank];
  for (int j = 0; j < dims; ++j) {
    zero[j] = -low_[j] / step_[j];
    mean[j] = std::clamp(zero[j], 0.0f, static_cast<float>(codes));
  }
  const simd::Kernels& kernels = simd::kernels();
  const float largest = kernels.scale_columns(projected, step_.data(), group, dims);
  // Of a query's level: a power of two of a score's unit, so that a shift makes scores of sums.
  constexpr float kLevels = 127.0f;
  const float octaves = std::ceil(std::log2(largest / (kLevels * simd::kScoreUnit)));
  query.level = static_cast<int>(std::clamp(octaves, -100.0f, 100.0f));
  const float scale = std::ldexp(simd::kScoreUnit, query.level);
  query.rounded.resize(static_cast<std::size_t>(group) * dims);
  // Rounding the query moves no score at the keys' mean.
  std::int32_t above[kMaxGroup], below[kMaxGroup];
  kernels.round_rows(
      {projected, mean, zero, query.rounded.data(), above, below, query.bias, scale, group, dims});
  query.reach = 0;  // of a sum, whatever the codes
  for (int g = 0; g < group; ++g) {
    query.reach = std::max(query.reach, codes * (above[g] - below[g]));
    query.base[g] = -codes * below[g];
    query.bias[g] +=
        kernels.dot(queries + g * metric.head_dim, metric.mean.data(), metric.head_dim) +
        scale * static_cast<float>(codes * below[g]);
  }
  int shift = std::clamp(-query.level, 0, 30);  // beyond, all scores are alike
  while (query.reach >> shift >= simd::kMaxScore) ++shift;
  query.octave = std::max(query.level + shift, 0);
}

std::int64_t Sketch::scan(const Query& query, std::span<const std::uint32_t> masks, int part,
                          float logit_softcap, SketchScores& out) const {
  const int pages = static_cast<int>(masks.size()), group = out.group();
  const int shift = std::clamp(out.octave() - query.level, 0, 30);
  std::int32_t base[kMaxGroup];
  for (int g = 0; g < group; ++g) {
    base[g] = query.base[g] + (1 << shift) / 2;  // shifting rounds down
    out.bias(part)[g] = query.bias[g];
  }
  simd::kernels().soft_cap(out.bias(part), group, logit_softcap);
  simd::kernels().sketch_scan({codes_.data(),
                               masks.data(),
                               query.rounded.data(),
                               base,
                               out.scores(part),
                               out.max(part),
                               out.mass(part),
                               out.stride(),
                               pages,
                               group,
                               rank_,
                               page_size_,
                               bits_,
                               shift,
                               out.coarse(),
                               logit_softcap,
                               out.unit(),
                               query.bias,
                               out.bias(part),
                               query.dims});
  return static_cast<std::int64_t>(pages) * page_bytes() * query.dims / rank_;
}

}  // namespace icecache
