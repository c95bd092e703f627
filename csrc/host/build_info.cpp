#include <string>

#include "cuda/cuda_info.h"
#include "icecache/engine.h"
#include "icecache/error.h"
#include "simd/kernels.h"

#ifdef ICECACHE_HAVE_FAISS
#include <faiss/Index.h>
#endif

#ifndef ICECACHE_VERSION
#define ICECACHE_VERSION "unknown"
#endif

namespace icecache {

BuildInfo build_info() {
  BuildInfo info;
  info.version = ICECACHE_VERSION;
#if defined(__clang__)
  info.compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
  info.compiler = "gcc " __VERSION__;
#else
  info.compiler = "unknown";
#endif
  const CudaInfo cuda = cuda_info();
  info.cuda = cuda.built;
  info.cuda_version = cuda.runtime_version;
#ifdef ICECACHE_HAVE_FAISS
  info.faiss = true;
  info.faiss_version =
      message(FAISS_VERSION_MAJOR, ".", FAISS_VERSION_MINOR, ".", FAISS_VERSION_PATCH);
#endif
#ifndef NDEBUG
  info.debug = true;
#endif
  return info;
}

std::string simd_level() {
  return std::string(simd::kernels().name);
}

}  // namespace icecache
