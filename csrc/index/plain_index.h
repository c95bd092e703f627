// PlainIndex: tokens in order of position, with nothing to pick some of them by. For heads that
// attend to all tokens, and for the part of a prompt that has come while more of it is awaited.
#pragma once

#include <numeric>

#include "index/semantic_index.h"

namespace icecache {

class PlainIndex final : public SemanticIndex {
 public:
  explicit PlainIndex(const HeadContext& context) : SemanticIndex(context, false) {}
  bool only_holds() const override { return true; }

 protected:
  Arrangement arrange(const Rows& rows) override {
    const int s = table().page_size();
    Arrangement arrangement;
    arrangement.order.resize(rows.count);
    std::iota(arrangement.order.begin(), arrangement.order.end(), 0);
    for (std::int32_t begin = 0; begin < rows.count; begin += s) {
      arrangement.bounds.push_back(begin);
      arrangement.nodes.push_back(0);
    }
    arrangement.bounds.push_back(rows.count);
    return arrangement;
  }
};

}  // namespace icecache
