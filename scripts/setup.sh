#!/usr/bin/env bash
# Makes what a build needs, and writes the interpreter to use into build/python.
#
#   scripts/setup.sh run    for `make demo`: compiler, Python environment with torch and transformers
#   scripts/setup.sh test   the same, and what the tests and checks need
#   scripts/setup.sh tools  as test, and what `make tidy`, `docs` and `coverage` need
#   scripts/setup.sh bench  for `make bench`: as run, and what the benchmarks need
#   scripts/setup.sh base   compiler and interpreter alone, which goes into build/base-python: for
#                           environments that are made elsewhere (setup_vllm.sh)
#
# Python: the active environment where it has torch >= 2.11 (its torch is never touched), else .venv in
# the checkout. ICECACHE_PYTHON names another interpreter. ICECACHE_TORCH is what is installed where
# torch is missing. Debian packages are installed when root, else named with the command.
# Takes well under a second when nothing is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${1:?usage: scripts/setup.sh run|test|tools|bench|base}
groups=(build run demo)
case $profile in
  test) groups+=(dev) ;;
  tools) groups+=(dev tools) ;;
  bench) groups+=(bench) ;;
esac

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# install_debian WHAT PACKAGE...   Returns non-zero where it was not possible, after saying how.
install_debian() {
  local what=$1
  shift
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing $* ($what)"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y --no-install-recommends "$@" >/dev/null 2>&1 ||
      { apt-get update >/dev/null && apt-get install -y --no-install-recommends "$@" >/dev/null; } && return
  fi
  say "$what: sudo apt-get install $*"
  return 1
}
compiler=${CXX:-c++}
has_header() { echo "#include <$1>" | "$compiler" -std=c++20 -x c++ -E - >/dev/null 2>&1; }

# --- compiler and C++ libraries (<span> is of C++20; its absence or no compiler look the same)
if ! has_header span; then
  install_debian "a C++20 compiler is missing" g++ || exit 1
  compiler=c++
  has_header span || fail "$compiler does not compile C++20; name one that does in CXX"
fi
if [ "$profile" = test ]; then
  has_header gtest/gtest.h || install_debian "GoogleTest is missing" libgtest-dev || exit 1
  has_header faiss/Index.h ||
    install_debian "FAISS is missing, index=faiss is left out" libfaiss-dev libopenblas-dev ||
    [ "${ICECACHE_FAISS:-AUTO}" != ON ] || exit 1
fi
if [ "$profile" = bench ]; then
  has_header benchmark/benchmark.h ||
    install_debian "google-benchmark is missing" libbenchmark-dev || exit 1
fi

# --- Python
# 0 where interpreter $1 is 3.10 or newer.
is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
# Prints the version of torch that interpreter $1 has, without importing it; nothing where it has none.
torch_version() {
  "$1" - 2>/dev/null <<'PY' || true
from importlib import metadata
print(metadata.version("torch"))
PY
}
# 0 where interpreter $1 has torch >= 2.11.
has_torch() {
  local version
  version=$(torch_version "$1")
  [ -n "$version" ] && [ "$(printf '%s\n' 2.11 "$version" | sort -V | head -n 1)" = 2.11 ]
}
# 0 where pip may install into the environment of interpreter $1.
is_writable() {
  "$1" - 2>/dev/null <<'PY'
import os, sys, sysconfig
managed = sys.prefix == sys.base_prefix and os.path.exists(
    os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
sys.exit(managed or not os.access(sysconfig.get_path("purelib"), os.W_OK))
PY
}

base=
candidates=(python3 python python3.{14,13,12,11,10} /usr/bin/python3)
if [ -n "${ICECACHE_PYTHON:-}" ]; then candidates=("$ICECACHE_PYTHON"); fi
for candidate in "${candidates[@]}"; do
  if is_recent "$candidate"; then
    base=$("$candidate" -c 'import sys; print(sys.executable)')
    break
  fi
done
[ -n "$base" ] || [ -z "${ICECACHE_PYTHON:-}" ] ||
  fail "ICECACHE_PYTHON must be Python 3.10 or newer, got $ICECACHE_PYTHON"
if [ -z "$base" ]; then
  install_debian "Python 3.10 or newer is missing" python3 python3-venv python3-dev || exit 1
  base=/usr/bin/python3
  is_recent "$base" || fail "Python 3.10 or newer is needed, got $("$base" --version)"
fi

# install_headers INTERPRETER
install_headers() {
  local headers
  headers=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [ -f "$headers/Python.h" ] ||
    install_debian "Python.h is missing" \
      "python$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-dev"
}
# install_venv INTERPRETER
install_venv() {
  "$1" -c 'import ensurepip' 2>/dev/null ||
    install_debian "Python's venv is missing" \
      "python$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
}

mkdir -p build
if [ "$profile" = base ]; then
  install_venv "$base" || exit 1
  install_headers "$base" || exit 1
  echo "$base" >build/base-python
  exit
fi

if has_torch "$base" && is_writable "$base" || [ -n "${ICECACHE_PYTHON:-}" ]; then
  python=$base
else
  python=$PWD/.venv/bin/python
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    options=()
    if has_torch "$base"; then options=(--system-site-packages); fi
    install_venv "$base" || exit 1
    say "making .venv with $("$base" --version)"
    scripts/new_venv.sh .venv "$base" "${options[@]}"
  fi
fi
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 ||
  fail "$python has no pip"
install_headers "$python" || exit 1

# --- Python packages
pip_install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
if [ -z "${ICECACHE_TORCH:-}" ]; then
  ICECACHE_TORCH="torch==2.13.0"
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    ICECACHE_TORCH="torch>=2.11"
  fi
fi
missing=$("$python" scripts/requirements.py --torch "$ICECACHE_TORCH" "${groups[@]}")
if [ -n "$missing" ]; then
  say "installing into $("$python" -c 'import sys; print(sys.prefix)'): ${missing//$'\n'/, }"
  installed_torch=$(torch_version "$python")
  echo "${installed_torch:+torch==$installed_torch}" >build/constraints.txt
  printf '%s\n' "$missing" >build/requirements.txt
  pip_install -c build/constraints.txt -r build/requirements.txt ||
    fail "pip could not install what is listed in build/requirements.txt"
fi
# kvpress, whose picks the benchmarks' are compared with, asks for an older transformers than ours; the
# parts that are compared run with any.
if [ "$profile" = test ] && ! "$python" -c 'from importlib.metadata import version; version("kvpress")' 2>/dev/null; then
  pip_install --no-deps "kvpress==0.5.5" ||
    say "kvpress is missing, what is compared with it is skipped"
fi
echo "$python" | cmp -s - build/python || echo "$python" >build/python
