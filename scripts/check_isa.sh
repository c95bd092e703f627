#!/usr/bin/env bash
# check_isa.sh BUILD_FOLDER   No object compiled for AVX2 or AVX-512 may define a weak symbol: the linker
# keeps one copy of an inline function, and if it kept that one, CPUs without the level would crash.
set -euo pipefail
folder=${1:?usage: scripts/check_isa.sh BUILD_FOLDER}
objects=$(find "$folder" -path '*csrc/simd/*avx*.o')
[ -n "$objects" ] || { echo "no objects of csrc/simd/*avx* under $folder"; exit 1; }
found=0
for object in $objects; do
  weak=$(nm -C --defined-only "$object" | awk '$2 ~ /[WVu]/' || true)
  if [ -n "$weak" ]; then
    printf '%s defines weak symbols:\n%s\n' "$object" "$weak"
    found=1
  fi
done
exit $found
