#include "index/segment.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "icecache/error.h"
#include "index/magnitude.h"
#include "simd/kernels.h"

namespace icecache {

Segment Segment::cut(std::int32_t position) const {
  const PageTable& table = index_->table();
  auto cut = std::make_shared<Cut>();
  cut->masks.assign(table.masks().begin(), table.masks().end());
  std::vector<int> touched;  // nodes
  for (int page = 0; page < table.page_count(); ++page) {
    const std::span<const std::int32_t> positions = table.positions_of(page);
    if (*std::max_element(positions.begin(), positions.end()) < position) continue;
    for (int slot = 0; slot < table.page_size(); ++slot) {
      if (positions[slot] >= position) cut->masks[page] &= ~(1u << slot);
    }
    touched.push_back(index_->node_of(page));
  }
  if (index_->has_far_field()) {
    std::sort(touched.begin(), touched.end());
    touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
    const int nodes = index_->node_count();
    cut->counts.resize(nodes);
    for (int node = 0; node < nodes; ++node) cut->counts[node] = index_->far_field().tokens(node);
    cut->mean_of.assign(nodes, -1);
    cut->means.resize(touched.size() * mean_bytes());
    std::vector<std::vector<int>> pages(touched.size());
    for (int page = 0; page < table.page_count(); ++page) {
      const auto found = std::lower_bound(touched.begin(), touched.end(), index_->node_of(page));
      if (found == touched.end() || *found != index_->node_of(page)) continue;
      pages[found - touched.begin()].push_back(page);
      cut->counts[*found] -= std::popcount(table.mask(page) & ~cut->masks[page]);
    }
    float mean[kMaxHeadDim];
    for (std::size_t i = 0; i < touched.size(); ++i) {
      mean_left(*cut, pages[i], mean);
      cut->mean_of[touched[i]] = static_cast<std::int32_t>(i);
      simd::kernels().from_float(mean, cut->means.data() + i * mean_bytes(),
                                 index_->far_field().dtype(), table.head_dim());
    }
  }
  Segment result = *this;
  result.cut_ = std::move(cut);
  result.end_ = position;
  return result;
}

// What went is taken out of the mean over all, unless most of it was theirs: its rounding would
// then be what is left.
void Segment::mean_left(const Cut& cut, std::span<const int> pages, float* mean) const {
  const PageTable& table = index_->table();
  const int d = table.head_dim(), node = index_->node_of(pages.front());
  const std::int32_t all = index_->far_field().tokens(node), left = cut.counts[node];
  float whole[kMaxHeadDim], value[kMaxHeadDim];
  double sum[kMaxHeadDim];
  const auto add = [&](double sign, const auto& slots_of) {
    for (const int page : pages) {
      for (std::uint32_t slots = slots_of(page); slots != 0; slots &= slots - 1) {
        table.value(page, std::countr_zero(slots), value);
        for (int i = 0; i < d; ++i) sum[i] += sign * value[i];
      }
    }
  };
  const DType dtype = index_->far_field().dtype();
  const double most = largest_number(dtype);
  const auto publish = [&] {
    for (int i = 0; i < d; ++i) {
      mean[i] = static_cast<float>(std::clamp(sum[i] / std::max(1, left), -most, most));
    }
  };
  simd::kernels().to_float(index_->far_field().mean(node), dtype, whole, d);
  for (int i = 0; i < d; ++i) sum[i] = left == 0 ? 0.0 : static_cast<double>(all) * whole[i];
  if (left > 0) add(-1.0, [&](int page) { return table.mask(page) & ~cut.masks[page]; });
  publish();
  if (left == 0 || (2 * left > all && largest_of(whole, d) <= 2.0f * largest_of(mean, d))) return;
  std::fill_n(sum, d, 0.0);
  add(1.0, [&](int page) { return cut.masks[page]; });
  publish();
}

template <typename Body>
void Segment::for_each_token(const Body& body) const {
  const std::span<const std::uint32_t> masks = this->masks();
  for (int page = 0; page < static_cast<int>(masks.size()); ++page) {
    for (std::uint32_t slots = masks[page]; slots != 0; slots &= slots - 1) {
      const int slot = std::countr_zero(slots);
      const std::int32_t place = index_->table().position(page, slot) - first_position();
      body(page, slot, static_cast<std::size_t>(place));
    }
  }
}

void Segment::gather(std::byte* keys, std::byte* values) const {
  const PageTable& table = index_->table();
  const std::size_t row = row_bytes_of(table.format().model(), table.head_dim());
  for_each_token([&](int page, int slot, std::size_t place) {
    table.format().restore_key(table.key(page, slot), keys + place * row);
    table.format().restore_value(table.value(page, slot), values + place * row);
  });
}

void Segment::gather_rows(std::byte* keys, std::byte* values) const {
  const PageTable& table = index_->table();
  const std::size_t row = table.row_bytes();
  for_each_token([&](int page, int slot, std::size_t place) {
    std::memcpy(keys + place * row, table.key(page, slot), row);
    std::memcpy(values + place * row, table.value(page, slot), row);
  });
}

std::size_t Segment::cut_bytes() const {
  if (!cut_) return 0;
  return cut_->masks.capacity() * sizeof(std::uint32_t) + cut_->means.capacity() +
         (cut_->counts.capacity() + cut_->mean_of.capacity()) * sizeof(std::int32_t);
}

void Segment::check_integrity() const {
  index_->check_integrity();
  std::int32_t tokens = 0;
  for (const std::uint32_t mask : masks()) tokens += std::popcount(mask);
  if (tokens != size())
    throw IntegrityError(
        message("a segment from ", first_position(), " to ", end_, " holds ", tokens, " tokens"));
  if (!cut_ || !index_->has_far_field()) return;
  std::int32_t counted = 0;
  for (const std::int32_t count : cut_->counts) counted += count;
  if (counted != size())
    throw IntegrityError(message("nodes of a segment of ", size(), " tokens count ", counted));
}

}  // namespace icecache
