"""The report of a run, as a browser shows it."""

from __future__ import annotations

import html
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from icecache.bench.html_report import html_report
from icecache.bench.runner import Record
from icecache.demo.document import Document, Needle
from icecache.demo.report import Facts, write_report
from icecache.demo.run import Row
from test_bench_suites import TASK, answer, question

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> str:
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip(f"none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)")


def opened(browser: str, page: Path, *flags: str) -> tuple[str, list[str]]:
    """The page's elements once it is shown, and what it wrote to the console."""
    profile = page.parent / "profile"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--dump-dom", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def records() -> list[Record]:
    made = [question(n).record(answer(TASK, question(n).sample)) for n in range(1, 5)]
    for record in made:
        record["fields"] = {"depth": 0.5}
    return made


# Tells cells whose text is cut off, a page wider than the window, plots that show nothing.
CHECK = """<script>
const clipped = [...document.querySelectorAll("th, td")]
  .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent);
const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth + 1;
const empty = [...document.querySelectorAll("svg")]
  .filter(e => e.getBoundingClientRect().width < 100 || !e.querySelector("path, image"));
document.title = JSON.stringify({clipped, wide, empty: empty.length});
</script></body>"""


@pytest.mark.slow
def test_it_opens_without_errors(browser: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "report.html"
    text = html_report("a run", {"machine": "some"}, records())
    page.write_text(text.replace("</body>", CHECK), encoding="utf-8")
    shown, console = opened(browser, page, "--window-size=1280,900")
    assert console == []
    assert shown.count("<svg") == text.count("<svg") > 0
    assert '<title>{"clipped":[],"wide":false,"empty":0}</title>' in shown


ODD = "-->]]>&lt;</script><b><!--<script>"  # no end of it comes behind


@pytest.mark.slow
def test_any_text_leaves_the_reports_whole(browser: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = records()
    for record in made:
        record["task"] = f"text/{ODD}"
    page = tmp_path / "report.html"
    page.write_text(html_report(ODD, {"machine": ODD}, made), encoding="utf-8")
    shown, console = opened(browser, page)
    assert console == [] and "<b>" not in shown and shown.count("<svg") > 0
    tokens = [ODD] * 3
    needle = Needle("key", ODD, 0, 1, torch.tensor([0]))
    rows = [
        Row("full attention", None, ODD, [ODD], [True]),
        Row("IceCache", 128, "", [ODD], [True]),
    ]
    facts = Facts(ODD, 1, 1, 128, ODD, {})
    write_report(page, facts, Document(ODD, torch.tensor([0, 1, 2]), [needle]), tokens, rows, [])
    shown, _ = opened(browser, page)
    assert f"3 tokens of {html.escape(ODD, quote=False)}" in shown


@pytest.mark.slow
def test_errors_of_a_page_are_seen(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><body><script>nothing.here()</script></body>")
    _, console = opened(browser, page)
    assert any("nothing is not defined" in line for line in console)
