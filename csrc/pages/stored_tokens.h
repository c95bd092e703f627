// StoredTokens: tokens of a head on their way into the pages of an index, as the rows that these
// hold. Rows with codes are also kept as numbers, unless the index only stores tokens.
//
// With kv_dtype = "int8" the format is that of the tokens that are in pages already, or else fitted
// to the first that are added.
//
// Threads: none of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "pages/head_context.h"
#include "pages/page_run.h"
#include "pages/tokens.h"

namespace icecache {

class StoredTokens {
 public:
  // `count` tokens are to be added, in order of position. `queries`: second moments [D, D] that keys
  // are rounded by, or nothing.
  StoredTokens(const HeadContext& context, std::int32_t count, std::int32_t first_position,
               std::vector<double> queries = {});

  // That of tokens that are in pages already. Before any are added.
  void set_format(const RowFormat& format) { format_ = format; }
  // n tokens whose rows are in `format`; fill(keys, values) writes them. Throws Error where it is
  // not that of all others: rows would be read as other numbers than they stand for.
  template <typename Fill>
  void add_rows(const RowFormat& format, std::int32_t n, const Fill& fill) {
    use(format);
    fill(keys_.data() + count_ * row_bytes_, values_.data() + count_ * row_bytes_);
    decode(n);
    count_ += n;
  }
  // Adds the first n tokens of a run.
  void add(const PageRun& run, std::int32_t n);
  // Adds tokens whose rows are in the model's type.
  void add(const TokenBlock& tokens);
  // What was added; REQUIRES: something was. Valid as long as this is.
  TokenBlock block() const {
    const bool has_numbers = !key_numbers_.empty();
    return {keys_.data(),
            values_.data(),
            count_,
            first_position_,
            &*format_,
            has_numbers ? key_numbers_.data() : nullptr,
            has_numbers ? value_numbers_.data() : nullptr};
  }

 private:
  // The rows that follow are in this format.
  void use(const RowFormat& format);
  // Numbers of the n rows behind the last one.
  void decode(std::int32_t n);

  HeadContext context_;
  std::size_t row_bytes_;
  std::int32_t first_position_, count_ = 0;
  std::vector<double> queries_;
  std::optional<RowFormat> format_;
  std::vector<std::byte> keys_, values_;
  std::vector<float> key_numbers_, value_numbers_;  // [count, D], or empty
};

}  // namespace icecache
