// Which level runs: what the build has, what the CPU has, what ICECACHE_SIMD asks for.
#include <cstdlib>

#include "icecache/error.h"
#include "simd/kernels.h"
#include "simd/levels.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace icecache::simd {
namespace {

#if defined(__x86_64__) || defined(__i386__)
// __builtin_cpu_supports also asks whether the operating system saves the registers. It does not
// know F16C in every compiler.
bool cpu_has_avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kF16c = 1u << 29;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & kF16c) != 0;
}
bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#else
bool cpu_has_avx2() {
  return false;
}
bool cpu_has_avx512() {
  return false;
}
#endif

const Kernels& chosen() {
  const char* name = std::getenv("ICECACHE_SIMD");
  return find_kernels(name == nullptr ? "" : name);
}

}  // namespace

const Kernels& scalar_kernels() {
  return *scalar_table();
}
const Kernels* avx2_kernels() {
  return cpu_has_avx2() ? avx2_table() : nullptr;
}
const Kernels* avx512_kernels() {
  return cpu_has_avx512() ? avx512_table() : nullptr;
}

const Kernels& find_kernels(std::string_view name) {
  const Kernels* avx512 = avx512_kernels();
  const Kernels* avx2 = avx2_kernels();
  if (name.empty()) return avx512 != nullptr ? *avx512 : avx2 != nullptr ? *avx2 : scalar_kernels();
  if (name == "scalar") return scalar_kernels();
  if (name != "avx2" && name != "avx512") {
    throw InvalidArgument(
        message("ICECACHE_SIMD must be scalar, avx2 or avx512, got \"", name, "\""));
  }
  const Kernels* level = name == "avx2" ? avx2 : avx512;
  if (level != nullptr) return *level;
  const bool built = (name == "avx2" ? avx2_table() : avx512_table()) != nullptr;
  throw InvalidArgument(message("ICECACHE_SIMD=", name, " is not available: ",
                                built ? "this CPU lacks it" : "this build lacks it",
                                "; best here: ", find_kernels("").name));
}

const Kernels& kernels() {
  static const Kernels& level = chosen();
  return level;
}

std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (const Kernels* level : {avx512_kernels(), avx2_kernels(), &scalar_kernels()}) {
    if (level != nullptr) names.emplace_back(level->name);
  }
  return names;
}

}  // namespace icecache::simd
