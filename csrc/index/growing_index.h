// GrowingIndex: a SemanticIndex that takes more tokens after it was built, and gives the last ones
// back.
//
// For indexes that are published so (DciIndex, PositionalIndex).
//
// Running out of pages or memory: insert() leaves the tokens before the one that did not fit
// (size() tells how many), and where memory ran out in the middle of one, an index that is not
// whole(). truncate() needs neither; other calls change nothing.
#pragma once

#include <memory>
#include <vector>

#include "index/semantic_index.h"

namespace icecache {

class GrowingIndex : public SemanticIndex {
 public:
  using SemanticIndex::SemanticIndex;

  // The same tokens for another sequence; pages are shared until one side writes.
  virtual std::unique_ptr<GrowingIndex> fork() const = 0;
  // Adds tokens that follow the ones already there, in order.
  void insert(const TokenBlock& tokens);
  // Pages that insert() of `tokens` tokens takes at most: each may split a page, and copy one that
  // is shared.
  virtual std::size_t most_insert_pages(std::int32_t tokens) const {
    return 2 * static_cast<std::size_t>(tokens);
  }
  // Removes every token with position >= `position`. Takes no pages and no memory.
  virtual void truncate(std::int32_t position) noexcept;
  // False after an insert() that failed half-way: the pages have every token, but what summarises
  // them does not. Such an index is still good for its pages, fork(), truncate(), memory_bytes()
  // and check_integrity(), and for nothing else.
  bool whole() const { return whole_; }

  std::size_t memory_bytes() const override;
  void check_integrity() const override;

 protected:
  GrowingIndex(const GrowingIndex&) = default;

  void built(const Arrangement& arrangement) override;

  // The page that a new key [D] joins (it may be full: then it is split), -1: a page of its own.
  virtual int choose_page(const float* key) = 0;
  // Which tokens of a full page move to a new one; neither none nor all.
  virtual std::uint32_t split_mask(int page) const {
    (void)page;
    return 0;
  }

  // Bookkeeping hooks, called after the change.
  virtual void token_added(int page, int slot, const float* key) {
    (void)page, (void)slot, (void)key;
  }
  virtual void page_split(int page, int other, std::uint32_t moved) {
    (void)page, (void)other, (void)moved;
  }
  virtual void page_opened(int page) { (void)page; }
  // `page` may have been dropped; it belonged to `node`. Needs no memory.
  virtual void tokens_removed(int page, int node) { (void)page, (void)node; }

  const std::vector<int>& pages_of(int node) const { return pages_of_node_[node]; }

 private:
  void attach(int page, int node);
  int add_node();
  void shrink_node(int node);
  // Gives a full page's upper half to a new page, whose number it returns.
  int split_page(int page);
  void add_token(const std::byte* key, const std::byte* value, std::int32_t position);
  int open_page(const std::byte* key, const std::byte* value, std::int32_t position);

  bool whole_ = true;  // false from the change of a page until all summaries know of it
  std::vector<std::vector<int>> pages_of_node_;  // [C]
};

}  // namespace icecache
