"""Wild command lines: each is refused by one line that names the option and what came.

All run in one process that cannot import torch: what is wrong is told before anything is loaded.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import icecache
import pytest
from icecache.cli import app
from icecache.cli.bench import bench
from icecache.cli.bench_suites import SUITES

FILES = Path("/tmp")  # replaced by the folder of the run: cases are made before it is
UNDECODABLE = "caf\udce9"
HUGE = "9" * 25
LONG = "x" * 300

CHILD = """
import contextlib, io, json, os, sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
from typer.main import get_command
from icecache.cli import app
command, results = get_command(app), []
for arguments in json.load(sys.stdin):
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command.main(arguments, prog_name="icecache")
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = repr(error)
    results.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""

Case = tuple[list[str], list[str]]  # arguments, and what the line must hold


def commands() -> Iterator[tuple[list[str], Any]]:
    """Each command with arguments that it needs, and its function."""
    for name, function in registered(app):
        yield [name, *(["m"] if name in ("generate", "serve") else [])], function
    for name, function in registered(bench):
        if name != "lm-eval":  # whose arguments are lm_eval's
            yield ["bench", name], function


def registered(group: Any) -> Iterator[tuple[str, Any]]:
    for info in group.registered_commands:
        yield info.name or info.callback.__name__, info.callback


def options(function: Any) -> Iterator[tuple[str, type, Any]]:
    """Name, type, and typer's description of each option."""
    for name, hint in get_type_hints(inspect.unwrap(function), include_extras=True).items():
        if get_args(hint)[1:] and hasattr(get_args(hint)[1], "param_decls"):
            kind, info = get_args(hint)[:2]
            kinds = [one for one in get_args(kind) or (kind,) if one is not type(None)]
            given = (info.default, *(info.param_decls or ()))  # typer takes the first as a default
            names = [one for one in given if isinstance(one, str) and one.startswith("--")]
            if type(info).__name__ == "OptionInfo":
                yield (names or [f"--{name.replace('_', '-')}"])[0], kinds[0], info


def wild_numbers() -> Iterator[Case]:
    for base, function in commands():
        for option, kind, info in options(function):
            if kind is not int:
                continue
            values = ["abc", "", "1.5", "0x10", "1e3", "NaN", "1 2", "--", UNDECODABLE]
            values += [str(info.min - 1), "-1"] if info.min is not None else []
            values += [str(info.max + 1), HUGE] if info.max is not None else []
            for value in values:
                yield [*base, f"{option}={value}"], [option, f"got {value!r}"]


def wild_words() -> Iterator[Case]:
    for base, function in commands():
        for option, kind, _ in options(function):
            if isinstance(kind, type) and issubclass(kind, Enum):
                for value in ("nonsense", "", "FLOAT32", "float32,float16", UNDECODABLE):
                    yield [*base, f"{option}={value}"], [option, "float16", f"got {value!r}"]
            elif kind is not bool and kind is not int:
                yield [*base, f"{option}={UNDECODABLE}"], [option, "UTF-8", ascii(UNDECODABLE)]
            elif kind is bool:
                yield [*base, f"{option.partition('/')[0]}=3"], [option.partition("/")[0]]


def unknown_options() -> Iterator[Case]:
    for base, _ in commands():
        if base[0] != "serve":  # whose other options are vLLM's
            yield [*base, "--nothing-like-it"], ["--nothing-like-it", "--help"]


def wild_lists() -> Iterator[Case]:
    numbers = ["0", "-1", "a", "", "1,,2", ",", "1;2", f"64,{HUGE}", "\u0661", "1_0", "6.5", "1e3"]
    for option, command in (("--budget", "passkey"), ("--lengths", "ruler"), ("--lengths", "step")):
        for value in numbers:
            yield ["bench", command, option, value], [option, f"got {value!r}"]
    yield ["bench", "step", "--lengths", "255"], ["--lengths", "256", "'255'"]
    for value in ("", ",", "full,,quest"):
        yield ["bench", "gsm8k", "--method", value], ["--method", f"got {value!r}"]
        yield ["bench", "gsm8k", "--task", value], ["--task", f"got {value!r}"]
    yield ["bench", "passkey", "--method", "icecash"], ["method", "'icecash'", "icecache"]
    yield ["bench", "passkey", "--method", "full,all"], ["method", "'all'"]
    for suite in SUITES:
        yield ["bench", suite, "--task", "qaspar"], ["task", "qaspar"]


def wild_outputs() -> Iterator[Case]:
    wrong = [f"{FILES}/folder", f"{FILES}/file/below", f"{FILES}/{LONG}", f"{FILES}/circle", ""]
    for command, option in (
        (["demo"], "--report"),
        (["demo"], "--picture"),
        (["bench", "step"], "--json"),
        (["bench", "passkey"], "--json"),
    ):
        for value in wrong:
            yield [*command, option, value], [option, "must be a file", value or "."]
    yield ["demo", "--report", f"{FILES}/absent/report.html"], ["--report", "existing folder"]
    for suite in (*SUITES, "generation"):
        data = ["--data-dir", f"{FILES}/text.txt"] if suite == "text" else []
        for value in (f"{FILES}/file", f"{FILES}/file/below", f"{FILES}/{LONG}"):
            yield ["bench", suite, *data, "--out", value], ["--out", "must be a folder", value]


def wild_data() -> Iterator[Case]:
    wrong = ["absent", "empty", "empty.txt", "folder", LONG]
    for suite in (*SUITES, "generation"):
        for name in wrong:
            path = f"{FILES}/{name}"
            yield ["bench", suite, "--data-dir", path], ["--data-dir", path]
        yield ["bench", suite, "--data-dir", "/dev/zero"], ["--data-dir", "/dev/zero"]
        if suite not in ("text", "generation"):  # of the folder that it runs in
            yield ["bench", suite, "--data-dir", ""], ["--data-dir", "."]
    yield ["bench", "passkey", "--data-dir", f"{FILES}/text.txt"], ["--data-dir", "made up"]
    yield ["bench", "ruler", "--data-dir", f"{FILES}/text.txt"], ["--data-dir", "not JSON"]
    yield ["bench", "ruler", "--task", "qa_1"], ["--data-dir", "dev-v2.0.json", "nothing"]
    yield ["bench", "text"], ["--data-dir", "got nothing"]
    for suite in ("gsm8k", "longbench", "longbench-e", "longbench-v2"):
        for option in ("--samples", "--seed"):
            yield ["bench", suite, option, "7"], [option, suite, "got 7"]
    yield ["bench", "gsm8k", "--lengths", "100"], ["--lengths", "[100]"]
    for command, option in (["generate", "m"], "--prompt-file"), (["demo"], "--document"):
        for name in ("absent", "folder", "empty.txt", "latin1.txt", LONG):
            yield [*command, option, f"{FILES}/{name}"], [f"{FILES}/{name}"]
        yield [*command, option, "/dev/zero"], ["/dev/zero", "at most 64 MiB"]
    for name in ("absent", "file", "folder", LONG):
        path = f"{FILES}/{name}"
        yield ["generate", path, "-p", "x"], ["model", path]
        yield ["demo", "--model", path], ["model", path]
        yield ["bench", "passkey", "--model", path], ["model", path]
        yield ["bench", "generation", "--model", path], ["model", path]
    yield ["generate", "", "-p", "x"], ["model", "empty"]
    yield ["generate", "~no-such-user/m", "-p", "x"], ["model", "~no-such-user/m"]


def contradictions() -> Iterator[Case]:
    generate = ["generate", "m", "-p", "x"]
    yield ["generate", "m"], ["--prompt", "neither"]
    yield [*generate, "--full", "--lossless"], ["--full", "--lossless"]
    yield [*generate, "--full", "--token-budget", "64"], ["--full", "--token-budget 64"]
    yield [*generate, "--full", "--set", "page_size=8"], ["--full", "page_size=8"]
    yield [*generate, "--token-budget", "30"], ["token_budget", "got 30"]
    yield [*generate, "--set", "page_size"], ["--set", "NAME=VALUE", "'page_size'"]
    yield [*generate, "--set", "pagesize=8"], ["pagesize", "page_size"]
    yield [*generate, "--set", "page_size=17"], ["page_size", "got 17"]
    yield [*generate, "--set", "host_memory=1"], ["host_memory", "got 1"]
    yield [*generate, "--set", "dense_layers=a"], ["dense_layers", '"a"']
    yield [*generate, "--set", "page_size=8", "--set", "page_size=8"], ["page_size", "twice"]
    yield ["bench", "step", "--token-budget", "20"], ["token_budget", "got 20"]
    yield ["bench", "step", "--head-dim", "12"], ["--head-dim", "got 12"]
    yield ["bench", "passkey", "--budget", "64,20"], ["token_budget", "got 20"]
    yield ["bench", "passkey", "--budget", "1000000000"], ["host_memory", "half"]
    yield ["bench", "passkey", "--set", "sink_tokens=60"], ["token_budget", "got 64"]
    grow = ["bench", "generation"]
    yield [*grow, "--prompt", "99", "--length", "99"], ["--prompt", "--length 99", "got 99"]
    yield [*grow, "--switch-at", "9"], ["--switch-at", "--prompt 256", "got 9"]
    yield [*grow, "--switch-at", "2048"], ["--switch-at", "--length 2048", "got 2048"]
    yield [*grow, "--switch-at", "999", "--own"], ["--switch-at", "--own"]
    steps = ["--rebuilt-every", "9", "--rebuilt-steps", "44"]
    yield [*grow, *steps, "--length", "300"], ["--rebuilt-steps", "the 44 tokens", "got 44"]
    yield [*grow, "--budget", "64,20"], ["token_budget", "got 20"]
    ask = ["bench", "gsm8k", "--endpoint"]
    for url in ("", "localhost", "localhost:8000", "ftp://a/v1", "http://", "http://[", "/v1"):
        yield [*ask, url], ["--endpoint", f"got {url!r}"]
    for option, value in (("--method", "full"), ("--budget", "64"), ("--set", "page_size=8")):
        yield [*ask, "http://localhost/v1", option, value], ["--endpoint", option, value]
    yield [*ask, "http://localhost/v1", "--max-length", "99"], ["--endpoint", "--max-length", "99"]
    yield [*ask, "http://localhost/v1", "--dtype", "float16"], ["--endpoint", "--dtype", "float16"]


def wrong_forms() -> Iterator[Case]:
    for line, told in (
        ("nonsense", "nonsense"),
        ("bench nonsense", "nonsense"),
        ("--nonsense", "--nonsense"),
        ("bench --nonsense", "--nonsense"),
        ("generate", "MODEL"),
        ("serve", "MODEL"),
        ("generate m n", "n"),
        ("doctor x", "x"),
        ("config x", "x"),
        ("demo x", "x"),
        ("bench step --steps", "--steps"),
        ("generate m -p", "-p"),
        ("bench longbench --set", "--set"),
    ):
        yield line.split(), [told, "--help"]


CASES: dict[str, Case] = {}
for make in (
    *(wild_numbers, wild_words, unknown_options, wild_lists, wild_outputs, wild_data),
    *(contradictions, wrong_forms),
):
    for case in make():
        CASES.setdefault(" ".join(map(ascii, case[0])), case)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("arguments")
    (made / "folder").mkdir()
    (made / "folder" / "other").write_text("x")
    (made / "empty").mkdir()
    (made / "file").write_text("x")
    (made / "empty.txt").write_text("")
    (made / "text.txt").write_text("A text.")
    (made / "latin1.txt").write_bytes(b"caf\xe9")
    (made / "circle").symlink_to(made / "circle")
    return made


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, tuple[object, str, str]]:
    """What every case ended with: status, stdout, stderr."""
    package = str(Path(icecache.__file__).resolve().parents[1])
    before = sorted(folder.rglob("*"))
    given = [[_in(folder, word) for word in arguments] for arguments, _ in CASES.values()]
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(given),
        env={**os.environ, "ICECACHE_CACHE": str(folder / "cache"), "PYTHONPATH": package},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(folder.rglob("*")) == before, "something was written"
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


def _in(folder: Path, word: str) -> str:
    return word.replace(f"{FILES}/", f"{folder}/")


def test_each_is_refused_by_one_line(
    folder: Path, told: dict[str, tuple[object, str, str]]
) -> None:
    wrong = []
    for name, (_, parts) in CASES.items():
        status, out, err = told[name]
        one_line = err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        named = all(_in(folder, part) in err for part in parts)
        if status != 2 or out or not one_line or not named:
            wrong.append(f"{name}: {parts} wanted; {status}, {out!r}, {err!r}")
    assert not wrong, "\n".join(wrong)


def test_there_are_many() -> None:
    assert len(CASES) > 500
