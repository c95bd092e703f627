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


@pytest.fixture
def quality(repository: Path) -> str:
    return (repository / "docs" / "quality.md").read_text(encoding="utf-8")


def test_the_readme_is_short(readme: str) -> None:
    assert len(readme.splitlines()) <= 150


def test_the_parameters_are_those_of_the_command(repository: Path) -> None:
    page = (repository / "docs" / "parameters.md").read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["config", "--markdown"]).stdout.strip() in page


REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [page.relative_to(REPOSITORY) for page in sorted(REPOSITORY.glob("docs/*.md"))]
PAGES += [Path(name) for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]


def anchors(page: Path) -> set[str]:
    """What a link may name within the page: its headings as GitHub spells them, and ids."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    spelled = {re.sub(r"[^\w\- ]", "", one.lower()).strip().replace(" ", "-") for one in headings}
    return spelled | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path, repository: Path) -> None:
    text = (repository / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if "://" in target:
            continue
        found = (repository / page).parent / target if target else repository / page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_are_named_exist(page: Path, repository: Path) -> None:
    if page.name == "CHANGELOG.md":  # which names what went, too
        return
    files = [
        "/" + path.relative_to(repository).as_posix()
        for folder in ("benchmarks", "csrc", "docs", "include", "python", "scripts", "tests")
        for path in (repository / folder).rglob("*.*")
    ]
    text = (repository / page).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:cpp|cu|h|py|sh))`", text):
        assert any(path.endswith(f"/{name}") for path in files), name


@pytest.mark.parametrize("page", ["README.md", "docs/quality.md"])
def test_the_numbers_are_those_of_the_results(page: str, repository: Path) -> None:
    import json

    readme = (repository / page).read_text(encoding="utf-8")

    path = repository / "benchmarks" / "results" / "quality.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    rows = {"IceCache": "", "exact top-B": "topk_", "Quest": "quest_", "StreamingLLM": "streaming_"}
    values = {result["name"]: result["value"] for result in results}
    for row, name in rows.items():
        line = next(line for line in readme.splitlines() if line.startswith(f"| {row} |"))
        quoted = [float(cell) for cell in line.split("|")[2:5]]
        measured = [values[f"kl_{name}{budget}"] for budget in (64, 128, 256)]
        assert quoted == pytest.approx(measured, abs=5e-5 if max(measured) < 0.1 else 5e-4)


def test_the_longbench_numbers_are_those_of_the_run(quality: str, repository: Path) -> None:
    import json

    path = repository / "benchmarks" / "results" / "longbench.json"
    made = json.loads(path.read_text(encoding="utf-8"))
    section = quality[quality.index("On LongBench: n = ") :]
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
