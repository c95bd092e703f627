#include "index/tree_index.h"

#include <numeric>

#include "index/bisect.h"

namespace icecache {

TreeIndex::Arrangement TreeIndex::arrange(const Rows& rows) {
  const int s = static_cast<int>(config().page_size);
  Arrangement arrangement;
  arrangement.order.resize(rows.count);
  std::iota(arrangement.order.begin(), arrangement.order.end(), 0);
  bisect(rows.coordinates, space().width(), arrangement.order, s, node_pages());
  for (std::int32_t begin = 0; begin < rows.count; begin += s) {
    arrangement.nodes.push_back(begin / s / node_pages());
    arrangement.bounds.push_back(begin);
  }
  arrangement.bounds.push_back(rows.count);
  return arrangement;
}

}  // namespace icecache
