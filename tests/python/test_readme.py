"""README and docs say what is so."""

from __future__ import annotations

import re
from pathlib import Path

import icecache
import pytest
from icecache.cli import app
from typer.testing import CliRunner


@pytest.fixture
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def test_the_parameters_are_those_of_the_command(readme: str) -> None:
    assert CliRunner().invoke(app, ["config", "--markdown"]).stdout.strip() in readme


PAGES = [
    "README.md",
    "CHANGELOG.md",
    *(
        f"docs/{n}.md"
        for n in ("benchmarks", "index", "threads", "performance", "vllm", "vllm-design")
    ),
]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str, repository: Path) -> None:
    text = (repository / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (repository / page).parent.joinpath(target).is_file(), target


def test_the_numbers_are_those_of_the_results(readme: str, repository: Path) -> None:
    import json

    path = repository / "benchmarks" / "results" / "quality.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    rows = {"IceCache": "", "exact top-B": "topk_", "Quest": "quest_", "StreamingLLM": "streaming_"}
    values = {result["name"]: result["value"] for result in results}
    for row, name in rows.items():
        line = next(line for line in readme.splitlines() if line.startswith(f"| {row} |"))
        quoted = [float(cell) for cell in line.split("|")[2:5]]
        measured = [values[f"kl_{name}{budget}"] for budget in (64, 128, 256)]
        assert quoted == pytest.approx(measured, abs=5e-5 if max(measured) < 0.1 else 5e-4)


def test_the_longbench_numbers_are_those_of_the_run(readme: str, repository: Path) -> None:
    import json

    path = repository / "benchmarks" / "results" / "longbench.json"
    made = json.loads(path.read_text(encoding="utf-8"))
    section = readme[readme.index("On LongBench: n = ") :]
    assert section.startswith(f"On LongBench: n = {made['meta']['n']} samples")
    rows = {"IceCache": "icecache", "exact top-B": "exact top-B", "Quest": "quest"}
    rows["StreamingLLM"] = "streaming"
    for row, method in rows.items():
        line = next(line for line in section.splitlines() if line.startswith(f"| {row} |"))
        quoted = [float(cell.rstrip("% ")) for cell in line.split("|")[2:8]]
        of_method = [one for one in made["rows"] if (one["part"], one["method"]) == ("all", method)]
        measured = [one["kl"] for one in of_method]
        measured += [100 * one["gold_likelihood"] for one in of_method]
        assert quoted == pytest.approx(measured, abs=0.0501, rel=0.02)
        assert quoted[:3] == pytest.approx(measured[:3], abs=5.01e-4)


@pytest.mark.model
def test_the_python_example_runs(readme: str, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    icecache.models.smollm2()
    exec(compile(example, "README.md", "exec"), {})
    *answer, worst_mass = capsys.readouterr().out.strip().splitlines()
    assert "sequence" in "\n".join(answer)
    assert 0 < float(worst_mass) <= 1
