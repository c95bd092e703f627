"""One decode step of one layer beside full attention: `icecache bench step`, with its options.

python benchmarks/python/bench_step.py --json benchmarks/results/step.json
"""

from __future__ import annotations

import typer
from icecache.cli.bench import step

if __name__ == "__main__":
    typer.run(step)
