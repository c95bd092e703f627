// TreeIndex (index = "tree"): pages from balanced bisection of the space of tokens, candidates from
// a flat scan of key sketches. design: docs/index.md.
#pragma once

#include "index/semantic_index.h"

namespace icecache {

class TreeIndex : public SemanticIndex {
 public:
  using SemanticIndex::SemanticIndex;
  bool has_sketches() const override { return true; }

 protected:
  Arrangement arrange(const Rows& rows) override;
};

}  // namespace icecache
