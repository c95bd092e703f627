#include "index/tree_index.h"

#include <numeric>

#include "index/bisect.h"

namespace icecache {

TreeIndex::Arrangement TreeIndex::arrange(const float* keys, const float* coordinates,
                                          std::int32_t count) {
  (void)keys;
  const int s = static_cast<int>(config().page_size);
  Arrangement arrangement;
  arrangement.order.resize(count);
  std::iota(arrangement.order.begin(), arrangement.order.end(), 0);
  bisect(coordinates, space().width(), arrangement.order, s, node_pages());
  for (std::int32_t begin = 0; begin < count; begin += s) {
    arrangement.nodes.push_back(begin / s / node_pages());
    arrangement.bounds.push_back(begin);
  }
  arrangement.bounds.push_back(count);
  return arrangement;
}

}  // namespace icecache
