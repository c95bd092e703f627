#!/usr/bin/env bash
# check_wheel.sh FOLDER   Builds the wheel into FOLDER, and uses it from there apart from the source tree,
# with no compiler on PATH. ICECACHE_CUDA says whether it has CUDA: AUTO (where nvcc is found), ON or OFF.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: scripts/check_wheel.sh FOLDER}
python=$(cat build/python)
PATH="$(dirname "$python"):$PATH"
# The compiler of `make build`, where Python names the one that it was built with.
export CC=${CC:-cc} CXX=${CXX:-c++}
# As deep as build/release: ccache finds objects of the same sources by their relative paths.
build=$folder-build
rm -rf "$folder" "$build"
wheel() { "$python" -m pip wheel . --quiet --no-build-isolation --no-deps -C build-dir="$build" "$@"; }
wheel --wheel-dir "$folder"
"$python" -m pip install --quiet --no-deps --target "$folder/site" "$folder"/*.whl
cd "$folder"
for library in libicecache _core _ops; do
  compgen -G "site/icecache/$library*.so" >/dev/null || { echo "the wheel lacks $library"; exit 1; }
done
case ${ICECACHE_CUDA:-AUTO} in
  AUTO) with_cuda=$(command -v nvcc >/dev/null && echo 1 || echo 0) ;;
  ON) with_cuda=1 ;;
  *) with_cuda=0 ;;
esac
[ "$with_cuda" = 1 ] || echo "wheel: without the CUDA kernels"
# Where it is used, there is no compiler.
use() { PATH='' PYTHONPATH=site "$python" "$@"; }
WITH_CUDA=$with_cuda use - <<'PY'
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
use -m icecache doctor

# A wheel without its extensions must not come into being.
cd - >/dev/null
if wheel --wheel-dir "$folder/none" -C cmake.define.ICECACHE_BINDINGS=OFF >"$folder/none.log" 2>&1; then
  echo "a wheel was built without its extensions"
  exit 1
fi
grep -q "A wheel needs ICECACHE_BINDINGS=ON" "$folder/none.log"
