#!/usr/bin/env bash
# gpu_check.sh [RESULTS]   Everything that needs a GPU: builds, tests, compute-sanitizer, benchmark.
#
# For a machine with a GPU, nvcc, CMake, Ninja and Python with torch >= 2.11, pybind11 and pytest;
# needs no network. GoogleTest is found by CMake (CMAKE_PREFIX_PATH). Takes eight minutes at most.
# RESULTS: folder for GPU-NAME.json and the logs; default benchmarks/results.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
results=$(realpath -m "${1:-benchmarks/results}")
mkdir -p "$results"
python=${ICECACHE_PYTHON:-python3}
build=build/gpu
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') || exit 1
status=0
step() {
  local what=$1 begin=$SECONDS verdict=ok
  shift
  "$@" >"$results/$what.log" 2>&1 || { verdict=FAILED; status=1; }
  printf '%-6s %4d s  %s\n' "$verdict" $((SECONDS - begin)) "$what"
  [ "$verdict" = ok ] || tail -n 40 "$results/$what.log"
  [ "$verdict" = ok ]
}
build_all() {
  cmake -S . -B "$build" -G Ninja -DICECACHE_INPLACE=ON -DICECACHE_TESTS=ON -DICECACHE_CUDA=ON \
    -DICECACHE_FAISS=OFF -DCMAKE_CUDA_ARCHITECTURES=native -DPython_EXECUTABLE="$(command -v "$python")" &&
    cmake --build "$build" -j "$(nproc)" --target icecache _core _ops icecache_cuda_tests
}
# A few tests: the tools watch every access.
watched='DeviceCacheTest.Within*:*FullBudget*/d64bfloat16g3:*FullBudget*/d128bfloat16g16:*FullBudget*/d96float32g4'
watched+=':*IsFullAttention*/d64bfloat16g3:*IsFullAttention*/d128bfloat16g16:*IsFullAttention*/d96float32g4'
watched+=':*TheSwitchComes*:*ASuffixOfAFork*:*EndWithTheRoom*'
sanitize() {
  compute-sanitizer --tool "$1" --error-exitcode 1 "$build/tests/icecache_cuda_tests" \
    --gtest_brief=1 --gtest_filter="$watched"
}

step build build_all || exit 1
step tests "$build/tests/icecache_cuda_tests" --gtest_brief=1
export PYTHONPATH=$PWD/python
step python-tests "$python" -m pytest -q -n 0 -p no:cacheprovider tests/python/test_device.py \
  tests/python/test_device_engine.py tests/python/test_device_hf.py
if [ "${ICECACHE_BENCHMARK:-1}" = 1 ]; then
  step benchmark "$python" benchmarks/python/bench_cuda.py --json "$results/$name.json" \
    --seconds "${ICECACHE_BENCHMARK_SECONDS:-180}"
fi
if [ "${ICECACHE_SANITIZERS:-1}" = 1 ]; then
  for tool in memcheck racecheck synccheck initcheck; do
    step "$tool" sanitize $tool
  done
fi
exit $status
