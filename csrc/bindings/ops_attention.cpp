#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "bindings/ops_kernels.h"
#include "cpu/exact_attention.h"
#include "simd/kernels.h"

namespace icecache::ops {

using torch::headeronly::ScalarType;

namespace {

struct Shape {
  std::int64_t batch, q_heads, kv_heads, max_pages, num_pages;
  int group, dim;
  PageLayout layout;
};

Shape check(const Tensor& queries, const Tensor& pages, const Tensor& block_table,
            const Tensor& slot_masks, double scale) {
  const ScalarType type = queries.scalar_type();
  const DType dtype = dtype_of("queries", queries);
  require_tensor("queries", queries, type, {-1, -1, -1});
  const std::int64_t batch = queries.size(0), dim = queries.size(2);
  require(dim >= 8 && dim <= kMaxHeadDim && dim % 8 == 0,
          "queries must have a head_dim that is a multiple of 8 up to ", kMaxHeadDim, ", got ",
          dim);
  require_tensor("pages", pages, type, {-1, 2, -1, dim});
  const std::int64_t page_size = pages.size(2);
  require(page_size == 8 || page_size == 16 || page_size == 32,
          "pages must have a page size of 8, 16 or 32, got ", page_size);
  require_tensor("block_table", block_table, ScalarType::Int, {batch, -1, -1});
  const std::int64_t kv_heads = block_table.size(1), max_pages = block_table.size(2);
  require_tensor("slot_masks", slot_masks, ScalarType::Int, {batch, kv_heads, max_pages});
  require(kv_heads > 0 && queries.size(1) > 0 && queries.size(1) % kv_heads == 0 &&
              queries.size(1) / kv_heads <= kMaxGroup,
          "queries must have 1 to ", kMaxGroup, " times as many heads as block_table (", kv_heads,
          "), got ", queries.size(1));
  require(std::isfinite(scale), "scale must be finite, got ", scale);
  const std::int32_t* table = block_table.const_data_ptr<std::int32_t>();
  const std::uint64_t slots = (std::uint64_t{1} << page_size) - 1;
  for (std::int64_t i = 0; i < batch * kv_heads * max_pages; ++i) {
    require(table[i] >= -1 && table[i] < pages.size(0), "block_table must hold pages from 0 to ",
            pages.size(0) - 1, ", or -1 for none, got ", table[i]);
    const auto mask = static_cast<std::uint32_t>(slot_masks.const_data_ptr<std::int32_t>()[i]);
    require((mask & ~slots) == 0, "slot_masks must have no bit past the page size ", page_size,
            ", got ", mask);
  }
  return {batch,
          queries.size(1),
          kv_heads,
          max_pages,
          pages.size(0),
          static_cast<int>(queries.size(1) / kv_heads),
          static_cast<int>(dim),
          {static_cast<int>(dim), static_cast<int>(page_size), dtype}};
}

// The magnitudes of a page's tokens.
void note(const PageSlots& page, const PageLayout& layout, Magnitudes& held) {
  const std::size_t row = static_cast<std::size_t>(layout.head_dim) * size_of(layout.dtype);
  const auto largest = [&](const std::byte* at) {
    return simd::kernels().largest(at, layout.dtype, static_cast<std::size_t>(layout.head_dim));
  };
  for (std::uint32_t slots = page.slots; slots != 0; slots &= slots - 1) {
    const std::byte* key = page.page + static_cast<std::size_t>(std::countr_zero(slots)) * row;
    held.key = std::max(held.key, largest(key));
    held.value =
        std::max(held.value, largest(key + static_cast<std::size_t>(layout.page_size) * row));
  }
}

}  // namespace

std::tuple<Tensor, Tensor> paged_attention(const Tensor& queries, const Tensor& pages,
                                           const Tensor& block_table, const Tensor& slot_masks,
                                           double scale) {
  const Shape s = check(queries, pages, block_table, slot_masks, scale);
  Tensor out = torch::stable::empty_like(queries);
  Tensor lse = torch::stable::new_empty(queries, {s.batch, s.q_heads}, ScalarType::Float);
  const auto* query_rows = static_cast<const std::byte*>(queries.const_data_ptr());
  const auto* page_data = static_cast<const std::byte*>(pages.const_data_ptr());
  auto* out_rows = static_cast<std::byte*>(out.mutable_data_ptr());
  float* lse_rows = lse.mutable_data_ptr<float>();
  const std::int32_t* table = block_table.const_data_ptr<std::int32_t>();
  const std::int32_t* masks = slot_masks.const_data_ptr<std::int32_t>();
  const std::size_t row_bytes = static_cast<std::size_t>(s.dim) * size_of(s.layout.dtype);
  const std::size_t page_bytes = 2 * static_cast<std::size_t>(s.layout.page_size) * row_bytes;

  const auto group_attention = [&](std::int64_t begin, std::int64_t end) {
    std::vector<PageSlots> picked;
    std::vector<float> scaled(static_cast<std::size_t>(s.group) * s.dim), result(scaled.size());
    for (std::int64_t item = begin; item < end; ++item) {  // (sequence, KV head)
      picked.clear();
      Magnitudes held;
      for (std::int64_t p = 0; p < s.max_pages; ++p) {
        const std::int64_t at = item * s.max_pages + p;
        if (table[at] < 0 || masks[at] == 0) continue;
        picked.push_back({page_data + static_cast<std::size_t>(table[at]) * page_bytes,
                          static_cast<std::uint32_t>(masks[at])});
        note(picked.back(), s.layout, held);
      }
      // Rows of (sequence, query head) of a group are adjacent.
      const std::int64_t first = item * s.group;
      simd::kernels().to_float(query_rows + first * row_bytes, s.layout.dtype, scaled.data(),
                               static_cast<std::int64_t>(scaled.size()));
      for (float& x : scaled) x *= static_cast<float>(scale);
      ExactAttention attention({scaled.data(), 1, s.group}, s.layout.head_dim, held, result.data());
      attention.attend(picked, s.layout);
      attention.finish(lse_rows + first);
      simd::kernels().from_float(result.data(), out_rows + first * row_bytes, s.layout.dtype,
                                 static_cast<std::int64_t>(result.size()));
    }
  };
  torch::stable::parallel_for(0, s.batch * s.kv_heads, 1, group_attention);
  return {out, lse};
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a,
                                        const Tensor& out_b, const Tensor& lse_b) {
  const ScalarType type = out_a.scalar_type();
  const DType dtype = dtype_of("out_a", out_a);
  require_tensor("out_a", out_a, type, {-1, -1, -1});
  const std::int64_t batch = out_a.size(0), heads = out_a.size(1), dim = out_a.size(2);
  require_tensor("out_b", out_b, type, {batch, heads, dim});
  require_tensor("lse_a", lse_a, ScalarType::Float, {batch, heads});
  require_tensor("lse_b", lse_b, ScalarType::Float, {batch, heads});
  Tensor out = torch::stable::empty_like(out_a);
  Tensor lse = torch::stable::empty_like(lse_a);
  const std::size_t row_bytes = static_cast<std::size_t>(dim) * size_of(dtype);
  const auto* rows_a = static_cast<const std::byte*>(out_a.const_data_ptr());
  const auto* rows_b = static_cast<const std::byte*>(out_b.const_data_ptr());
  auto* rows = static_cast<std::byte*>(out.mutable_data_ptr());
  std::vector<float> a(dim), b(dim);
  for (std::int64_t row = 0; row < batch * heads; ++row) {
    const float log_a = lse_a.const_data_ptr<float>()[row];
    const float log_b = lse_b.const_data_ptr<float>()[row];
    const float high = std::max(log_a, log_b);
    const bool empty = high == -INFINITY;
    // Equal ones, infinite ones among them, weigh alike.
    const auto weight = [&](float log) {
      return empty ? 0.0f : log == high ? 1.0f : std::exp(log - high);
    };
    const float weight_a = weight(log_a), weight_b = weight(log_b);
    const float sum = weight_a + weight_b;
    simd::kernels().to_float(rows_a + row * row_bytes, dtype, a.data(), dim);
    simd::kernels().to_float(rows_b + row * row_bytes, dtype, b.data(), dim);
    // What has no weight is not read: it may hold anything.
    for (std::int64_t i = 0; i < dim; ++i) {
      const float x = (weight_a > 0.0f ? weight_a / sum * a[i] : 0.0f) +
                      (weight_b > 0.0f ? weight_b / sum * b[i] : 0.0f);
      a[i] = empty ? 0.0f : x;
    }
    simd::kernels().from_float(a.data(), rows + row * row_bytes, dtype, dim);
    lse.mutable_data_ptr<float>()[row] = empty ? -INFINITY : high + std::log(sum);
  }
  return {out, lse};
}

}  // namespace icecache::ops
