// The symbol of faiss_index.h in a build without FAISS.
#include "icecache/error.h"
#include "index/faiss_index.h"

namespace icecache {

std::unique_ptr<SemanticIndex> make_faiss_index(const IndexContext&) {
  throw Unavailable(
      "index=faiss: this build of icecache has no FAISS; install it (apt-get install libfaiss-dev "
      "libopenblas-dev) and build with ICECACHE_FAISS=ON, or use index=tree");
}

}  // namespace icecache
