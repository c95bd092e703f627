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

// An index whose full pages give half of their tokens to a new page.
class PageSplitter {
 public:
  // Which tokens of a full page move to the new one; neither none nor all.
  virtual std::uint32_t upper_half(int page) const = 0;
  // They have moved to page `other`.
  virtual void page_split(int page, int other) = 0;

 protected:
  ~PageSplitter() = default;
};

class GrowingIndex : public SemanticIndex {
 public:
  using SemanticIndex::SemanticIndex;

  // The same tokens for another sequence; pages are shared until one side writes.
  virtual std::unique_ptr<GrowingIndex> fork() const = 0;
  // Adds tokens that follow the ones already there, in order; rows of the model's type.
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

  void built() override;

  // The page that a new key [D] joins, -1: a page of its own. It may be full where there is a
  // splitter, which then splits it.
  virtual int choose_page(const float* key) = 0;
  virtual PageSplitter* splitter() { return nullptr; }

  // Bookkeeping, called after the change. A page that was opened has one token, in slot 0, for
  // which token_added() follows.
  virtual void page_opened(int page) = 0;
  virtual void token_added(int page) = 0;
  // `page` may have been dropped. Needs no memory.
  virtual void tokens_removed(int page) = 0;

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
