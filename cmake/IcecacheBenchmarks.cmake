# One executable for all of benchmarks/cpp; choose with --benchmark_filter.
find_package(benchmark QUIET)
if(NOT benchmark_FOUND)
  message(FATAL_ERROR "google-benchmark is missing: apt-get install libbenchmark-dev")
endif()
file(GLOB benchmark_sources CONFIGURE_DEPENDS benchmarks/cpp/*.cpp)
add_executable(icecache_benchmarks ${benchmark_sources})
target_link_libraries(icecache_benchmarks PRIVATE icecache icecache_flags benchmark::benchmark
                                                  benchmark::benchmark_main)
