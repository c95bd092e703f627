#!/usr/bin/env bash
# vLLM's OpenAI server with IceCache, and one question to it. Needs `make setup-vllm`.
set -euo pipefail
cd "$(dirname "$0")/.."
port=${PORT:-8000}
.venv-vllm/bin/icecache serve smollm2 --token-budget 256 --host-memory 2G --port "$port" &
trap 'kill $!' EXIT
until curl --silent --fail "localhost:$port/health"; do sleep 1; done
curl "localhost:$port/v1/completions" -H 'Content-Type: application/json' \
  -d '{"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 8}'
