#include "device/device_build.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "index/query_moments.h"
#include "index/token_space.h"

namespace icecache {

DeviceBuild::DeviceBuild(const gpu::BuildParams& params, gpu::Stream stream)
    : p_(params),
      stream_(stream),
      levels_(params.is_fitted ? gpu::bisection_levels(params.indexed, params.shape.far_node_tokens)
                               : std::vector<std::vector<std::int32_t>>()) {
  if (!p_.is_fitted) {
    p_.key_samples = p_.query_samples = 0;
    p_.shape.tail = false;  // no coordinates of values, which shape the order alone
  }
  const auto heads = static_cast<std::size_t>(p_.shape.kv_heads);
  const auto d = static_cast<std::size_t>(p_.shape.head_dim);
  const auto rank = static_cast<std::size_t>(p_.shape.rank);
  const std::size_t items = heads * p_.indexed;
  std::size_t most = 1;
  for (const auto& level : levels_) {
    bounds_.insert(bounds_.end(), level.begin(), level.end());
    most = std::max(most, level.size());
  }
  const auto take = [&](gpu::Buffer& buffer, auto*& array, std::size_t count) {
    buffer = gpu::Buffer(std::max<std::size_t>(1, count) * sizeof(*array), stream);
    array = buffer.as<std::remove_reference_t<decltype(*array)>>();
  };
  const std::size_t width = p_.width();
  take(sampled_, p_.sampled_keys, heads * (2 * p_.key_samples + p_.query_samples) * d);
  p_.sampled_values = p_.sampled_keys + heads * p_.key_samples * d;
  p_.sampled_queries = p_.sampled_values + heads * p_.key_samples * d;
  take(from_value_, p_.from_value, heads * d * (width - rank));
  take(coordinates_, p_.coordinates, heads * (p_.length - p_.first) * width);
  take(range_, p_.range, heads * rank * 2);
  take(segments_, p_.segments, bounds_.size());
  take(directions_, p_.directions, heads * most * width);
  take(order_, p_.order, 2 * items);  // the sort goes to and fro
  take(sort_keys_, p_.sort_keys, p_.is_fitted ? 2 * items : 0);
  room_ = gpu::Buffer(
      items > 0 && p_.is_fitted ? gpu::sort_room(static_cast<std::int64_t>(items)) : 0, stream);
}

std::vector<std::int32_t> DeviceBuild::run(std::span<std::byte* const> pages) {
  if (p_.is_fitted) {
    fit_spaces();
  } else {
    take_fixed_space();
  }
  gpu::launch_coordinates(p_, stream_);
  order_tokens();
  // The row cache is empty; codes, means and pages are written in their order.
  const gpu::StepShape& s = p_.shape;
  const std::int64_t pair = p_.first_pair;
  const auto heads = static_cast<std::size_t>(s.kv_heads);
  const std::size_t cached = heads * s.cached_rows;
  gpu::copy_to_device(p_.layer.pages + pair * s.pages(), pages.data(), pages.size_bytes(), stream_);
  gpu::fill(p_.layer.owner + pair * s.cached_rows, 0xff, cached * sizeof(std::int32_t), stream_);
  gpu::fill(p_.layer.stamp + pair * s.cached_rows, 0, cached * sizeof(std::int32_t), stream_);
  gpu::fill(p_.layer.has_value + pair * s.cached_rows, 0, cached, stream_);
  gpu::launch_lay_out(p_, stream_);
  std::vector<std::int32_t> order(heads * p_.indexed);
  gpu::copy_to_host(order.data(), p_.order, order.size() * sizeof(std::int32_t), stream_);
  gpu::synchronize(stream_);
  return order;
}

// Keys' means are those of the sample.
void DeviceBuild::fit_spaces() {
  const auto heads = static_cast<std::size_t>(p_.shape.kv_heads);
  const auto d = static_cast<std::size_t>(p_.shape.head_dim);
  const auto rank = static_cast<std::size_t>(p_.shape.rank);
  const std::size_t keys = p_.key_samples * d, queries = p_.query_samples * d;
  std::vector<float> sample(heads * (2 * keys + queries));
  gpu::launch_sample(p_, stream_);
  gpu::copy_to_host(sample.data(), p_.sampled_keys, sample.size() * sizeof(float), stream_);
  gpu::synchronize(stream_);

  std::vector<float> means, from_key, from_query, from_value;
  const auto add = [](std::vector<float>& to, const std::vector<float>& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  const int value_rank = p_.width() - p_.shape.rank;
  for (std::size_t h = 0; h < heads; ++h) {
    QueryMoments moments;
    moments.observe(sample.data() + heads * 2 * keys + h * queries, p_.query_samples,
                    p_.shape.head_dim);
    const TokenSpace space = TokenSpace::fit(
        sample.data() + h * keys, sample.data() + (heads + h) * keys, DType::kFloat32,
        p_.key_samples, p_.shape.head_dim, moments, p_.shape.rank, value_rank);
    add(means, space.metric.mean);
    add(from_key, space.metric.from_key);
    add(from_query, space.metric.from_query);
    add(from_value, space.from_value);
  }
  const std::size_t pair = p_.first_pair;
  const auto copy = [&](float* to, const std::vector<float>& from) {
    gpu::copy_to_device(to, from.data(), from.size() * sizeof(float), stream_);
  };
  copy(p_.layer.mean_key + pair * d, means);
  copy(p_.layer.from_key + pair * d * rank, from_key);
  copy(p_.layer.from_query + pair * d * rank, from_query);
  if (value_rank > 0) copy(p_.from_value, from_value);
  gpu::synchronize(stream_);  // the vectors go
}

// Signs of a Hadamard matrix: orthogonal directions, none of which is one of the model's own.
void DeviceBuild::take_fixed_space() {
  const auto heads = static_cast<std::size_t>(p_.shape.kv_heads);
  const auto d = static_cast<std::size_t>(p_.shape.head_dim);
  const auto rank = static_cast<std::size_t>(p_.shape.rank);
  std::vector<float> space(heads * d * rank);
  const float size = 1.0f / std::sqrt(static_cast<float>(rank));
  for (std::size_t i = 0; i < space.size(); ++i) {
    space[i] = std::popcount(i / rank % d & i % rank) % 2 == 0 ? size : -size;
  }
  const std::size_t pair = p_.first_pair;
  gpu::fill(p_.layer.mean_key + pair * d, 0, heads * d * sizeof(float), stream_);
  for (float* to : {p_.layer.from_key, p_.layer.from_query}) {
    gpu::copy_to_device(to + pair * d * rank, space.data(), space.size() * sizeof(float), stream_);
  }
  gpu::synchronize(stream_);  // the vector goes
}

// Bisection, from the whole down to nodes; ends with `order` pointing to the last level's.
void DeviceBuild::order_tokens() {
  const auto items = static_cast<std::int64_t>(p_.shape.kv_heads) * p_.indexed;
  gpu::copy_to_device(p_.segments, bounds_.data(), bounds_.size() * sizeof(std::int32_t), stream_);
  std::int32_t* other = p_.order + items;
  gpu::launch_order_start(p_, stream_);
  for (const auto& level : levels_) {
    p_.segment_count = static_cast<int>(level.size()) - 1;
    gpu::launch_level(p_, stream_);
    int bits = 33;  // of a float, and of head and segment
    while ((std::int64_t{1} << (bits - 32)) < std::int64_t{p_.shape.kv_heads} * p_.segment_count) {
      ++bits;
    }
    gpu::sort_pairs(room_.data(), room_.bytes(), p_.sort_keys, p_.sort_keys + items, p_.order,
                    other, items, bits, stream_);
    std::swap(p_.order, other);
    p_.segments += level.size();
  }
}

}  // namespace icecache
