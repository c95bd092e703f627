// RowFormat: what the rows of keys and values in the pages of an index mean: numbers as the model
// makes them, or eight bits each (kv_dtype = "int8").
//
// Eight bits: a row has a scale t and codes from -127 to 127 (row_bytes_of(DType::kInt8, D)).
//   key = centre + t step x codes, element by element; value = t x codes
// t makes the row's largest code 127. `centre` is the mean of keys. `step` makes E[t^2] times the sum
// of its squares, the mean square of a key's rounding, least (key_steps.h). So a bias of a few
// elements, or elements that vary far more than the others (a bias that RoPE turns), leave the others
// their precision. Neither costs anything per token: q . key = t (q step) . codes + q . centre, and a
// query is turned once.
//
// centre and step are of one head of one sequence, fitted to the tokens that it seals first, and
// shared by its segments, by what they are merged into and by forks. So a row is rounded once,
// whatever becomes of it, by at most half of t step in each element of a key, of t in a value. Where
// queries are known, errors of a key's elements are made to cancel instead (key_rounding.h).
//
// Threads: a value; copies share what was fitted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "icecache/types.h"
#include "simd/key_rounding.h"

namespace icecache {

// The largest finite number of a type.
inline float largest_number(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return 0x1.fep127f;
    case DType::kFloat16:
      return 65504.0f;
    case DType::kFloat32:
    case DType::kInt8:
      break;
  }
  return std::numeric_limits<float>::max();
}

class RowFormat {
 public:
  // Rows of D elements as the model makes them.
  RowFormat(DType model, int head_dim) : model_(model), head_dim_(head_dim) {}
  // Eight bits, fitted to keys [n, D], contiguous rows of the model's type; n >= 1.
  static RowFormat eight_bits(DType model, int head_dim, const std::byte* keys, std::int64_t n);

  // Of rows in pages.
  DType dtype() const { return codes_ ? DType::kInt8 : model_; }
  std::size_t row_bytes() const { return row_bytes_of(dtype(), head_dim_); }
  DType model() const { return model_; }
  bool has_codes() const { return codes_ != nullptr; }
  // True where rows of the other mean the same here.
  bool is(const RowFormat& other) const {
    return model_ == other.model_ && head_dim_ == other.head_dim_ && codes_ == other.codes_;
  }
  std::size_t memory_bytes() const;

  // A row of the model's type as a row in a page.
  void encode_key(const std::byte* key, std::byte* row,
                  const KeyRounding* rounding = nullptr) const;
  void encode_value(const std::byte* value, std::byte* row) const;
  // By the second moments [D, D] of queries. REQUIRES: has_codes().
  KeyRounding rounding_for(std::span<const double> second) const;
  // A row of a page as floats [D], finite.
  void decode_key(const std::byte* row, float* key) const;
  void decode_value(const std::byte* row, float* value) const;
  // The same, in the model's type.
  void restore_key(const std::byte* row, std::byte* key) const;
  void restore_value(const std::byte* row, std::byte* value) const;

  // Queries [n, D] as rows of keys are compared with them, [n, D], and what is added to the logits
  // [n]. REQUIRES: has_codes().
  void turn(const float* queries, std::int64_t n, float* turned, float* bias) const;

 private:
  struct Codes {
    std::vector<float> centre, step;  // [D]
  };

  DType model_;
  int head_dim_;
  std::shared_ptr<const Codes> codes_;  // null: the model's type
};

}  // namespace icecache
