#include "pages/stored_tokens.h"

#include <utility>

#include "icecache/error.h"
#include "simd/kernels.h"

namespace icecache {

StoredTokens::StoredTokens(const HeadContext& context, std::int32_t count,
                           std::int32_t first_position, std::vector<double> queries)
    : context_(context),
      row_bytes_(context.stored_row_bytes()),
      first_position_(first_position),
      queries_(std::move(queries)),
      keys_(static_cast<std::size_t>(count) * row_bytes_),
      values_(keys_.size()) {
  if (context.stored() == context.dtype || context.attends_all) return;
  key_numbers_.resize(static_cast<std::size_t>(count) * context.head_dim);
  value_numbers_.resize(key_numbers_.size());
}

void StoredTokens::use(const RowFormat& format) {
  if (format_ && !format_->is(format)) {
    const PageOwner& owner = context_.owner;
    throw Error(message("tokens of sequence ", owner.sequence, ", layer ", owner.layer,
                        ", KV head ", owner.head,
                        " must all be stored in one format, got rows of another; report a bug"));
  }
  format_ = format;
}

void StoredTokens::decode(std::int32_t n) {
  if (key_numbers_.empty()) return;
  const std::size_t d = static_cast<std::size_t>(context_.head_dim);
  for (std::int32_t t = count_; t < count_ + n; ++t) {
    format_->decode_key(keys_.data() + t * row_bytes_, key_numbers_.data() + t * d);
    format_->decode_value(values_.data() + t * row_bytes_, value_numbers_.data() + t * d);
  }
}

void StoredTokens::add(const PageRun& run, std::int32_t n) {
  if (context_.stored() == context_.dtype) {
    return add_rows({context_.dtype, context_.head_dim}, n,
                    [&](std::byte* keys, std::byte* values) { run.gather(n, keys, values); });
  }
  std::vector<std::byte> keys(static_cast<std::size_t>(n) * context_.row_bytes());
  std::vector<std::byte> values(keys.size());
  run.gather(n, keys.data(), values.data());
  add({keys.data(), values.data(), n, run.first_position()});
}

void StoredTokens::add(const TokenBlock& tokens) {
  if (tokens.count == 0) return;
  const std::size_t row = context_.row_bytes();
  RowFormat format(context_.dtype, context_.head_dim);
  if (format_) {
    format = *format_;
  } else if (context_.stored() == DType::kInt8) {
    format = RowFormat::eight_bits(context_.dtype, context_.head_dim, tokens.keys, tokens.count);
  }
  std::optional<KeyRounding> rounding;
  if (format.has_codes() && !queries_.empty()) rounding = format.rounding_for(queries_);
  add_rows(format, tokens.count, [&](std::byte* keys, std::byte* values) {
    for (std::int32_t t = 0; t < tokens.count; ++t) {
      format.encode_key(tokens.keys + t * row, keys + t * row_bytes_,
                        rounding ? &*rounding : nullptr);
      format.encode_value(tokens.values + t * row, values + t * row_bytes_);
    }
  });
  if (key_numbers_.empty()) return;
  const std::size_t d = static_cast<std::size_t>(context_.head_dim), n = tokens.count * d;
  const std::size_t first = static_cast<std::size_t>(count_ - tokens.count) * d;
  simd::kernels().to_float(tokens.keys, context_.dtype, key_numbers_.data() + first, n);
  simd::kernels().to_float(tokens.values, context_.dtype, value_numbers_.data() + first, n);
}

}  // namespace icecache
