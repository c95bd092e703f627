// SemanticIndex: which tokens of one (sequence, layer, KV head) a query needs, and what the rest
// weighs.
//
// It owns the tokens that have left the window, stored in pages of similar keys, and answers each
// decode step with picks within a token budget and with a far field over everything that was not
// picked. Sink and window tokens are not its concern.
//
// Invariants (check_integrity)
//  1. Every token given to build() or insert() is in exactly one page, until truncate() removes it.
//  2. A summary equals the sum over its members to rounding, after any sequence of calls.
//  3. Deterministic: the same calls give bitwise the same picks.
//  4. Any finite keys and values are accepted: equal keys, zero keys, huge norms.
// Running out of pages or memory: after a build() that threw, the index can only be destroyed;
// insert() leaves the tokens before the one that did not fit (size() tells how many), and where
// memory ran out in the middle of one, an index that is not whole(). truncate() needs neither;
// other calls change nothing.
//
// Threads: one call at a time per index; different indexes are independent. select() is const and
// does not allocate after its buffers have grown once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "icecache/attention_state.h"
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

// Second moments of the group's recent queries (post-RoPE, unscaled), over all its heads. They
// define the metric in which keys are compared: distances that queries cannot see do not count.
//
// Recent: the last whole block of kBlock rows and those since. So the same rows give bitwise the
// same moments however they come in calls. A row with NaN or Inf adds nothing; any finite row is
// fine.
//
// Memory: the rows of a block themselves in `dtype` while they take less than the upper triangle of
// their sum, then that sum. Copies share it until one of them observes more. Threads: copying
// changes the source's flag, and needs it alone.
class QueryMoments {
 public:
  static constexpr std::int64_t kBlock = 512;

  // Rows that come must be exact in `dtype`, or be rounded to it.
  QueryMoments() = default;
  explicit QueryMoments(DType dtype) : dtype_(dtype) {}
  QueryMoments(const QueryMoments& other);
  QueryMoments& operator=(QueryMoments other) noexcept;
  QueryMoments(QueryMoments&&) noexcept = default;
  ~QueryMoments() = default;

  // Of the next n rows only the last needed(n) count: the others may be skipped.
  std::int64_t needed(std::int64_t n) const;
  // `skipped` rows that do not count, then n rows [n, D]. REQUIRES: n >= needed(skipped + n).
  void observe(const float* queries, std::int64_t n, int head_dim, std::int64_t skipped = 0);

  std::int64_t count() const;          // rows in the sum
  std::vector<double> second() const;  // [D, D] sum of q q^T; empty where count() is 0
  // This copy's part of what is shared.
  std::size_t memory_bytes() const;

 private:
  // The upper triangle [D (D + 1) / 2] of a sum of q q^T 4^-exponent, row by row; empty: nothing.
  struct Sum {
    std::vector<float> upper;
    int exponent = 0;
    void add(const float* query, int head_dim);
  };
  // The last whole block, and of the one begun first rows and then their sum.
  struct Blocks {
    Sum before, current;
    std::vector<std::byte> rows;
    int head_dim = 0;
    void add_rows(DType dtype);  // to `current`
  };
  Blocks& own();

  DType dtype_ = DType::kFloat32;
  std::int64_t seen_ = 0;  // all rows
  bool has_before_ = false;
  mutable bool is_shared_ = false;  // a copy may read `blocks_`
  std::shared_ptr<Blocks> blocks_;
};

// Tokens of one page that were picked. Bit s of `slots` stands for slot s.
struct PagePick {
  PageId page = kNoPage;
  std::uint64_t epoch = 0;  // the content that was meant; see PagePool::verify
  std::uint32_t slots = 0;
  std::int32_t local_page = 0;  // the index's own number of the page
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

class SemanticIndex {
 public:
  virtual ~SemanticIndex() = default;

  // Fills an empty index; at least one token. To rebuild, build a new index and swap.
  virtual void build(const TokenBlock& tokens, const QueryMoments& queries) = 0;
  // Adds tokens that follow the ones already there, in order.
  virtual void insert(const TokenBlock& tokens) = 0;
  // Picks tokens for one step of the group, whose queries are finite.
  virtual void select(const SelectRequest& request, Selection& selection) const = 0;
  // Mean values of the far-field nodes in the cache's dtype, [C, D]; empty where the far field is
  // off.
  virtual std::span<const std::byte> far_values() const = 0;
  // What each node weighs in `selection`.
  virtual void far_nodes(const Selection& selection, std::vector<FarNodeInfo>& nodes) const = 0;

  // A copy that shares pages by reference count (copied on first write of either side).
  virtual std::unique_ptr<SemanticIndex> fork() const = 0;
  // Removes every token with position >= `position`. Takes no pages and no memory.
  virtual void truncate(std::int32_t position) noexcept = 0;
  // False after an insert() that failed half-way: the pages have every token, but what summarises
  // them does not. Such an index is still good for size(), end_position(), all_pages(), gather(),
  // snapshot(), fork(), truncate(), memory_bytes() and check_integrity(), and for nothing else.
  virtual bool whole() const = 0;
  // Gathers K and V of all tokens, ordered by position, as rows [N, D] in the cache's dtype.
  virtual void gather(std::byte* keys, std::byte* values) const = 0;

  // The tokens as they are now, to be gathered later and from any thread; shares the pages.
  using Snapshot = std::function<void(std::byte* keys, std::byte* values)>;
  virtual Snapshot snapshot() const = 0;

  virtual std::int32_t size() const = 0;  // N
  virtual std::int32_t end_position()
      const = 0;  // one past the last token's position; 0 when empty
  // All pages with the mask of the slots in use, for attention over everything.
  virtual void all_pages(std::vector<PagePick>& picks) const = 0;
  virtual std::vector<PageInfo> pages() const = 0;
  // Positions of the picked tokens, ascending.
  virtual void selected_positions(const Selection& selection,
                                  std::vector<std::int32_t>& positions) const = 0;
  // Bytes of sketches, summaries and tables (not of pages).
  virtual std::size_t memory_bytes() const = 0;
  virtual void check_integrity() const = 0;
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

// The implementation named by context.config->index. Throws Unavailable for "faiss" where FAISS was
// left out of the build.
std::unique_ptr<SemanticIndex> make_index(const IndexContext& context);
// Pages that build() of `tokens` tokens takes at most, with config.index.
std::size_t most_build_pages(const Config& config, std::int32_t tokens);
// Pages that insert() of `tokens` tokens takes at most: each may split a page, and copy one that is
// shared.
inline std::size_t most_insert_pages(std::int32_t tokens) {
  return 2 * static_cast<std::size_t>(tokens);
}

}  // namespace icecache
