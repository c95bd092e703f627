#!/usr/bin/env bash
# Builds the wheel, and uses it from an empty folder apart from the source tree.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(cat build/python)
PATH="$(dirname "$python"):$PATH"
# The compiler of `make build`, where Python names the one that it was built with.
export CC=${CC:-cc} CXX=${CXX:-c++}
rm -rf build/wheel-check
"$python" -m pip wheel . --quiet --no-build-isolation --no-deps --wheel-dir build/wheel-check
"$python" -m pip install --quiet --no-deps --target build/wheel-check/site build/wheel-check/*.whl
cd build/wheel-check
for library in libicecache _core _ops; do
  compgen -G "site/icecache/$library*.so" >/dev/null || { echo "the wheel lacks $library"; exit 1; }
done
with_cuda=$(command -v nvcc >/dev/null && echo 1 || echo 0)
[ "$with_cuda" = 1 ] || echo "wheel: no nvcc here, the CUDA kernels were not built"
WITH_CUDA=$with_cuda PYTHONPATH=site "$python" - <<'PY'
import os
from pathlib import Path

import torch

import icecache

assert Path(icecache.__file__).is_relative_to(Path("site").resolve()), icecache.__file__
engine = icecache.Engine(
    num_layers=1, num_q_heads=2, num_kv_heads=1, head_dim=64, dtype=torch.float32, exact=True
)
sequence = engine.new_sequence()
keys, values, queries = torch.randn(3, 1, 2, 300, 64)
engine.append([sequence], 0, keys[:, :1], values[:, :1])
attended = engine.attend([sequence], 0, queries[:, :, -1:])
expected = torch.nn.functional.scaled_dot_product_attention(
    queries[:, :, -1:], keys[:, :1], values[:, :1], enable_gqa=True
)
torch.testing.assert_close(attended, expected)
# A wheel with CUDA imports, and runs its CPU path, where there is no driver.
assert icecache.build_info().cuda == (os.environ["WITH_CUDA"] == "1"), icecache.build_info()
if not torch.cuda.is_available():
    shape = {"num_layers": 1, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 64}
    try:
        icecache.DeviceCache(**shape, dtype=torch.float32, batch=1, max_tokens=1000)
    except icecache.Unavailable as error:
        print("wheel:", error)
    else:
        raise AssertionError("a DeviceCache without a device")
print("wheel:", icecache.__version__)
PY
PYTHONPATH=site "$python" -m icecache doctor

# A wheel without its extensions must not come into being.
cd ../..
if "$python" -m pip wheel . --quiet --no-build-isolation --no-deps --wheel-dir build/wheel-check/none \
  -C cmake.define.ICECACHE_BINDINGS=OFF >build/wheel-check/none.log 2>&1; then
  echo "a wheel was built without its extensions"
  exit 1
fi
grep -q "A wheel needs ICECACHE_BINDINGS=ON" build/wheel-check/none.log
