#!/usr/bin/env bash
# vLLM's OpenAI server with IceCache on port PORT (8000), and one question to it. Needs `make setup-vllm`.
set -euo pipefail
cd "$(dirname "$0")/.."
port=${PORT:-8000}
.venv-vllm/bin/icecache serve smollm2 --token-budget 256 --host-memory 2G --port "$port" &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
until curl --silent --fail "localhost:$port/health"; do
  kill -0 "$server" 2>/dev/null || exit 1 # the server has said why
  sleep 1
done
curl --silent --show-error --fail "localhost:$port/v1/completions" -H 'Content-Type: application/json' \
  -d '{"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 8}'
