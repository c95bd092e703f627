"""A function is read in one sitting: at most 60 lines, device code 100."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HOST, DEVICE = 60, 100
# Longer ones, which may only become shorter.
LONGER = {
    ("python/icecache/cli/bench_suites.py", "_command"): 119,  # options with their help
    ("benchmarks/python/bench_vllm_capacity.py", "main"): 102,
}
# A line in the first column that begins something else than a function.
_ELSE = re.compile(
    r"[}#/]|(namespace|using|enum|struct|class|union|template|constexpr|extern|static_assert)\b"
)


_BOUNDS = re.compile(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)")


def cpp_functions(text: str) -> Iterator[tuple[str, int]]:
    """Names of the functions that begin in the first column, and the lines of each.

    In clang-format's form, where a function ends with a brace in that column.
    """
    head: list[str] = []
    body: int | None = None
    for line in text.splitlines():
        if body is not None:
            if line.startswith("}"):
                declared = _BOUNDS.sub("", " ".join(head))
                if name := re.search(r"(\w+)\s*\(", declared):  # else it is data
                    yield name[1], body
                head, body = [], None
            else:
                body += 1
            continue
        if head or (line and not line[0].isspace() and not _ELSE.match(line)):
            head.append(line)
            if line.endswith("{"):
                body = 0
            elif line.endswith((";", "}")) or not line:
                head = []


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """Names of functions and the lines of their bodies."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.body[0].lineno + 1


def functions() -> Iterator[tuple[str, str, int]]:
    """(path, name, lines) of all but the tests'."""
    for folder in ("include", "csrc", "python", "benchmarks"):
        for path in sorted((REPOSITORY / folder).rglob("*.*")):
            found = {".py": python_functions, ".h": cpp_functions, ".cpp": cpp_functions}
            found[".cu"] = cpp_functions
            if path.suffix in found:
                name = path.relative_to(REPOSITORY).as_posix()
                for function, lines in found[path.suffix](path.read_text(encoding="utf-8")):
                    yield name, function, lines


def test_functions_are_short() -> None:
    found = list(functions())
    assert len(found) > 2000
    longer = []
    for path, name, lines in found:
        limit = DEVICE if path.startswith("csrc/cuda/") else HOST
        if lines > LONGER.get((path, name), limit):
            longer.append(f"{path}: {name} has {lines} lines")
    assert not longer, "\n".join(longer)


def test_what_is_allowed_to_be_longer_is() -> None:
    lines = {(path, name): size for path, name, size in functions()}
    assert all(lines[key] > HOST for key in LONGER)


def test_functions_are_found() -> None:
    text = "int a() {\n  x;\n}\n\nvoid C::d(int e,\n     int f) const {\n  g(e);\n  h();\n}\n"
    assert list(cpp_functions(text)) == [("a", 1), ("d", 2)]
    assert list(python_functions("def a(b):\n    c = b\n    return c\n")) == [("a", 2)]
