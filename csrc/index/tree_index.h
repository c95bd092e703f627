// TreeIndex (index = "tree"): pages from balanced bisection of the space of tokens, candidates from
// a flat scan of key sketches. design: docs/index.md.
#pragma once

#include "index/semantic_index.h"

namespace icecache {

class TreeIndex : public SemanticIndex {
 public:
  using SemanticIndex::SemanticIndex;
  bool finds_by_scores() const override { return true; }
  bool has_sketches() const override { return true; }

 protected:
  Arrangement arrange(const float* keys, const float* coordinates, std::int32_t count) override;
};

}  // namespace icecache
