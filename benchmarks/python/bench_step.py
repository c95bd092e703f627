"""One decode step of one layer beside full attention: `icecache bench step`, with its options.

python benchmarks/python/bench_step.py --json benchmarks/results/step.json
python benchmarks/python/bench_step.py --busy 2 --steps 100    # beside two busy processes, too
"""

from __future__ import annotations

import typer
from icecache.cli.bench import step
from icecache.cli.environment import prepare

if __name__ == "__main__":
    prepare()
    typer.run(step)
