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
bool cpu_has_avx512vnni() {
  return cpu_has_avx512() && __builtin_cpu_supports("avx512vnni");
}
#else
bool cpu_has_avx2() {
  return false;
}
bool cpu_has_avx512() {
  return false;
}
bool cpu_has_avx512vnni() {
  return false;
}
#endif

struct Level {
  std::string_view name;
  bool (*on_this_cpu)();
  const Kernels* (*table)();
};
// Best first.
constexpr Level kLevels[] = {
    {"avx512vnni", cpu_has_avx512vnni, avx512vnni_table},
    {"avx512", cpu_has_avx512, avx512_table},
    {"avx2", cpu_has_avx2, avx2_table},
    {"scalar", [] { return true; }, scalar_table},
};

const Kernels* available(const Level& level) {
  return level.on_this_cpu() ? level.table() : nullptr;
}

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
const Kernels* avx512vnni_kernels() {
  return cpu_has_avx512vnni() ? avx512vnni_table() : nullptr;
}

const Kernels& find_kernels(std::string_view name) {
  for (const Level& level : kLevels) {
    if (!name.empty() && level.name != name) continue;
    if (const Kernels* found = available(level); found != nullptr) return *found;
    if (name.empty()) continue;
    throw InvalidArgument(
        message("ICECACHE_SIMD=", name, " is not available: ",
                level.table() != nullptr ? "this CPU lacks it" : "this build lacks it",
                "; best here: ", find_kernels("").name));
  }
  throw InvalidArgument(
      message("ICECACHE_SIMD must be scalar, avx2, avx512 or avx512vnni, got \"", name, "\""));
}

const Kernels& kernels() {
  static const Kernels& level = chosen();
  return level;
}

std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) {
    if (available(level) != nullptr) names.emplace_back(level.name);
  }
  return names;
}

}  // namespace icecache::simd
