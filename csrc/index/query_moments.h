// QueryMoments: what an index learns from the queries of a head.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "icecache/types.h"

namespace icecache {

// Second moments of the group's queries (post-RoPE, unscaled), over all its heads. They define the
// metric in which keys are compared: distances that queries cannot see do not count.
//
// Half of the weight is on recent queries, half on all that ever were: what comes next is like the
// one or the other. Recent: the last whole block of kBlock rows and those since. Of what is before
// that, every kEvery-th row counts. So the same rows give bitwise the same moments however they
// come in calls. A row with NaN or Inf adds nothing; any finite row is fine.
//
// Memory: the rows of a block themselves in `dtype` while they take less than the upper triangle of
// their sum, then that sum; and the sum of the others. Copies share it until one of them observes
// more. Threads: copying changes the source's flag, and needs it alone.
class QueryMoments {
 public:
  static constexpr std::int64_t kBlock = 512;
  // Shares no factor with the number of heads in a group, so that all of them are seen.
  static constexpr std::int64_t kEvery = 13;

  // Rows that come must be exact in `dtype`, or be rounded to it.
  QueryMoments() = default;
  explicit QueryMoments(DType dtype) : dtype_(dtype) {}
  QueryMoments(const QueryMoments& other);
  QueryMoments& operator=(QueryMoments other) noexcept;
  QueryMoments(QueryMoments&&) noexcept = default;
  ~QueryMoments() = default;

  // Which of the next n rows count, ascending.
  std::vector<std::int64_t> counting(std::int64_t n) const;
  // The next n rows, of which `queries` has those that count, [counting(n).size(), D].
  void observe_counting(const float* queries, std::int64_t n, int head_dim);
  // The next n rows [n, D].
  void observe(const float* queries, std::int64_t n, int head_dim);

  bool empty() const { return seen_ == 0; }
  // [D, D] mean of q q^T; empty where there was no row.
  std::vector<double> second() const;
  // This copy's part of what is shared.
  std::size_t memory_bytes() const;

 private:
  // The upper triangle [D (D + 1) / 2] of a sum of q q^T 4^-exponent, row by row; empty: nothing.
  struct Sum {
    std::vector<float> upper;
    int exponent = 0;
    void add(const float* query, int head_dim);
    // Adds it times `weight` to x [D, D], the upper triangle.
    void add_to(std::vector<double>& x, double weight, int head_dim) const;
  };
  // The last whole block, and of the one begun first rows and then their sum; all behind the first
  // block.
  struct Blocks {
    Sum before, current, all;
    std::vector<std::byte> rows;
    int head_dim = 0;
    void add_rows(DType dtype);  // to `current`
  };
  Blocks& own();
  // Of the rows below `end`, the first that is recent.
  std::int64_t recent_from(std::int64_t end) const;
  void add_recent(const float* query);

  DType dtype_ = DType::kFloat32;
  std::int64_t seen_ = 0;  // all rows
  std::int64_t all_ = 0;   // rows in the sum of all
  bool has_before_ = false;
  mutable bool is_shared_ = false;  // a copy may read `blocks_`
  std::shared_ptr<Blocks> blocks_;
};

}  // namespace icecache
