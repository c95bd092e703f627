// Segment: an index as one sequence sees it: the whole, or its tokens below a position.
//
// Copying is cheap: the index is shared. What a cut takes away stays in the shared index for the
// others; the pages it touches have other masks here, and the far-field nodes other means.
//
// Threads: as the index; a Segment is a value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "index/semantic_index.h"

namespace icecache {

class Segment {
 public:
  explicit Segment(std::shared_ptr<const SemanticIndex> index)
      : index_(index.get()), owner_(std::move(index)), end_(index_->end_position()) {}
  // Of an index that may grow and outlives the segment, which is to be made anew when it has
  // changed.
  explicit Segment(const SemanticIndex& index) : index_(&index), end_(index.end_position()) {}

  // Its tokens at positions below `position`, of which it has some. Takes no pages, and time by the
  // tokens that go.
  Segment cut(std::int32_t position) const;

  const SemanticIndex& index() const { return *index_; }
  std::int32_t first_position() const { return index_->first_position(); }
  std::int32_t end_position() const { return end_; }
  std::int32_t size() const { return end_ - first_position(); }
  // Slots of each page that hold a token, [P].
  std::span<const std::uint32_t> masks() const {
    return cut_ ? std::span<const std::uint32_t>(cut_->masks) : index_->table().masks();
  }
  // Of a far-field node: its tokens, and the mean of their values in the model's type [D].
  std::int32_t node_tokens(int node) const {
    return cut_ ? cut_->counts[node] : index_->far_field().tokens(node);
  }
  const std::byte* node_mean(int node) const {
    const int own = cut_ ? cut_->mean_of[node] : -1;
    return own < 0 ? index_->far_field().mean(node) : cut_->means.data() + own * mean_bytes();
  }

  // Keys and values of its tokens in order of position, as rows [size(), D] in the model's type; as
  // rows that the pages hold, of index().table().format().
  void gather(std::byte* keys, std::byte* values) const;
  void gather_rows(std::byte* keys, std::byte* values) const;
  // Bytes of the cut alone.
  std::size_t cut_bytes() const;
  void check_integrity() const;

 private:
  struct Cut {
    std::vector<std::uint32_t> masks;
    std::vector<std::int32_t> counts, mean_of;  // [C]; mean_of: row of `means`, -1: unchanged
    std::vector<std::byte> means;
  };
  std::size_t mean_bytes() const {
    return row_bytes_of(index_->far_field().dtype(), index_->table().head_dim());
  }
  // body(page, slot, place in order of position)
  template <typename Body>
  void for_each_token(const Body& body) const;
  // The mean of a node's tokens that the cut leaves.
  void mean_left(const Cut& cut, std::span<const int> pages, float* mean) const;

  const SemanticIndex* index_;
  std::shared_ptr<const SemanticIndex> owner_;
  std::shared_ptr<const Cut> cut_;  // null: the whole index
  std::int32_t end_;
};

}  // namespace icecache
