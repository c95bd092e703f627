// The symbol of faiss_index.h in a build without FAISS.
#include "compared/faiss_index.h"
#include "icecache/error.h"

namespace icecache {

std::unique_ptr<SemanticIndex> make_faiss_index(const HeadContext&) {
  throw Unavailable(
      "index=faiss: this build of icecache has no FAISS; install it (apt-get install libfaiss-dev "
      "libopenblas-dev) and build with ICECACHE_FAISS=ON, or use index=tree");
}

}  // namespace icecache
