// What the indexes of a head work with: tokens, queries, picks and the answer to one step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "icecache/config.h"
#include "icecache/page_pool.h"
#include "icecache/types.h"

namespace icecache {

// n tokens at consecutive positions, contiguous rows [n, D] in the cache's dtype; not owning.
struct TokenBlock {
  const std::byte* keys = nullptr;
  const std::byte* values = nullptr;
  std::int32_t count = 0;
  std::int32_t first_position = 0;
};

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

// Tokens of one page that were picked. Bit s of `slots` stands for slot s.
struct PagePick {
  PageId page = kNoPage;
  std::uint64_t epoch = 0;  // the content that was meant; see PagePool::verify
  std::uint32_t slots = 0;
  std::int32_t local_page = 0;  // its number among the pages of the segments, or of a run
};

// Logits must be ordinary floats: |q.k| up to 2^30 or so. Logarithms of weights, here and in
// Selection, are floats: they rank and estimate, to a logit's rounding. What is attended exactly is
// weighed by its logits alone.
struct SelectRequest {
  const float* queries = nullptr;   // [G, D], already multiplied by the softmax scale
  int group = 0;                    // G
  const float* near_lse = nullptr;  // [G] log weight of sink + window, -inf where there is none
  int budget = 0;                   // tokens to pick at most (sink and window already deducted)
  int max_budget = 0;               // with mass_target; >= budget
  double mass_target = 0.0;         // 0: off
};

// The answer to one step. Weights of the far field are relative to exp(far_shift[g]).
struct Selection {
  std::vector<PagePick> picks;     // ascending local_page, each page once
  int tokens = 0;                  // T: picked tokens, over all pages
  std::vector<float> logits;       // [G, T] of the picked tokens, by page and slot
  std::vector<float> rest_lse;     // [G] estimated log weight of the index's tokens not picked
  std::int64_t bytes_scanned = 0;  // sketches, candidate keys read by this call
  // Whether there were more candidates than at first, since one that was none might have been a
  // main token of some head; and whether, with as many as there may be, one still might.
  bool is_widened = false, is_doubtful = false;

  // Where the far field is on, tokens not picked contribute sum over nodes c of far_weights[g, c]
  // times the mean value of c's tokens (picked ones included), less far_share[g, t] times the value
  // of each picked token t; they weigh far_total[g]. Else all zero and empty.
  std::vector<float> far_weights;           // [G, C]
  std::vector<float> far_share;             // [G, T]
  std::vector<float> far_total, far_shift;  // [G]
};

// What the HTML report and the tests look at; positions are token positions in the sequence.
struct PageInfo {
  PageId page = kNoPage;
  std::int32_t node = -1;               // far-field node, -1 where there is none
  std::vector<std::int32_t> positions;  // in slot order
};
struct FarNodeInfo {
  std::vector<float> weight;  // [G] log weight of its unpicked tokens for the query
  std::int32_t tokens = 0;    // members, picked ones included
};

struct IndexContext {
  PagePool* pool = nullptr;  // outlives the index
  PageOwner owner;
  const Config* config = nullptr;  // resolved; outlives the index
  int head_dim = 0;
  int group = 0;
  DType dtype = DType::kFloat32;
  float scale = 0.0f;  // softmax scale
};

}  // namespace icecache
