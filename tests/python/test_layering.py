"""Dependencies only look down.

front ends -> python API -> bindings -> {host, device} -> compared -> index -> pages ->
{threads, cuda, cpu, simd} -> config -> include. Read from the sources, so that an include or an
import against the layers fails here and not at a later port.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# --- C++: the layers of our own headers that a file of each layer may include.
# A layer sees itself, include, and what is named.
_SEEN = {
    "include": "",
    "config": "",
    "simd": "",
    "cpu": "simd",
    "cuda": "",
    "threads": "config",
    "pages": "simd cuda",
    "index": "simd pages",
    "compared": "simd pages index",
    "host": "config simd cpu cuda threads pages index compared",
    "device": "config simd cuda threads pages index",
    "bindings": "config simd cpu cuda threads pages index compared host device",
}
CPP_LAYERS = {layer: {"include", layer, *seen.split()} for layer, seen in _SEEN.items()}
# Foreign headers, and the only files (by path under the repository) that may include them.
FOREIGN = {
    r"(torch|ATen|c10)/.*": r"csrc/bindings/ops_[^/]*",
    r"pybind11/.*|Python\.h": r"csrc/bindings/core_[^/]*",
    r"(cuda|cub|thrust|cooperative_groups|nv_).*|.*_fp8\.h": r"csrc/cuda/[^/]*",
    r"\w*intrin\.h|arm_neon\.h|arm_sve\.h": r"csrc/simd/.*",
    # build_info.cpp for its version.
    r"faiss/.*": r"csrc/compared/faiss_[^/]*|csrc/host/build_info\.cpp",
}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def layer_of_header(header: str) -> str | None:
    """The layer of a quoted header, None for a name that is not of our form."""
    folder = header.split("/")[0]
    return "include" if folder == "icecache" else folder if folder in CPP_LAYERS else None


def cpp_violations(path: str, text: str) -> Iterator[str]:
    """What `path` (relative to the repository) includes against the rules."""
    layer = "include" if path.startswith("include/") else path.split("/")[1]
    for quote, header in INCLUDE.findall(text):
        for pattern, allowed in FOREIGN.items():
            if quote == "<" and re.fullmatch(pattern, header) and not re.fullmatch(allowed, path):
                yield f"{path} includes <{header}>; only {allowed} may"
        if quote == "<":
            continue
        target = layer_of_header(header)
        if target is None and not header.startswith(("cuda_", "cuda.")):
            yield f'{path} includes "{header}"; ours are named from csrc/ or include/'
        elif target is not None and target not in CPP_LAYERS[layer]:
            yield f'{path} includes "{header}"; {layer} must not see {target}'


def cpp_files() -> list[Path]:
    return sorted(
        path
        for folder in ("include", "csrc")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".inc"}
    )


# --- Python: front ends stand on the API (icecache's own modules); each may see these parts.
FRONT_ENDS = {
    "hf": {"hf"},
    "vllm": {"vllm"},
    "bench": {"bench", "hf", "vllm"},
    "demo": {"demo", "bench", "hf"},
    "cli": {"cli", "demo", "bench", "hf", "vllm"},
}
# Foreign packages, and the parts that may import them ("" is the API).
FOREIGN_PACKAGES = {
    "vllm": {"vllm"},
    "transformers": {"hf", "bench", "demo", "cli", "vllm"},
    "typer": {"cli"},
}
# Modules of the API that are about transformers models themselves.
MODEL_MODULES = "icecache/models/"


def part_of(path: str) -> str:
    """The front end of a module (path under python/, or dotted name); "" for the API."""
    if path == "icecache/__main__.py":  # python -m icecache is the command
        return "cli"
    pieces = re.split(r"[./]", path)
    return pieces[1] if len(pieces) > 1 and pieces[1] in FRONT_ENDS else ""


def imports_of(path: str, text: str) -> Iterator[tuple[str, bool]]:
    """Dotted names that a module imports, with whether that happens when it is itself imported."""
    package = path.removesuffix(".py").split("/")[:-1]
    tree = ast.parse(text)
    deferred = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.dump(outer.test))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        eager = id(node) not in deferred
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", eager) for alias in node.names)


def python_violations(path: str, text: str) -> Iterator[str]:
    """What `path` (relative to python/) imports against the rules."""
    part = part_of(path)
    for name, eager in imports_of(path, text):
        root = name.split(".")[0]
        if root == "icecache":
            target = part_of(name)
            # icecache/__init__.py offers the front ends by name, without importing them by itself.
            facade = path == "icecache/__init__.py" and not eager
            if target and not facade and target not in FRONT_ENDS.get(part, set()):
                yield f"{path} imports {name}; {part or 'the API'} must not see {target}"
            if part and name.split(".")[1:2] in (["_core"], ["_ops"]):
                yield f"{path} imports {name}; front ends use the API"
        elif not path.startswith(MODEL_MODULES) and part not in FOREIGN_PACKAGES.get(root, {part}):
            yield f"{path} imports {name}; only {sorted(FOREIGN_PACKAGES[root])} may"


def python_files() -> list[Path]:
    return sorted((REPOSITORY / "python").rglob("*.py"))


def test_cpp_includes_look_down() -> None:
    files = cpp_files()
    assert files
    found = [
        violation
        for path in files
        for violation in cpp_violations(
            path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8")
        )
    ]
    assert not found, "\n".join(found)


def test_python_imports_look_down() -> None:
    files = python_files()
    assert files
    found = [
        violation
        for path in files
        for violation in python_violations(
            path.relative_to(REPOSITORY / "python").as_posix(), path.read_text(encoding="utf-8")
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "include"),
    [
        ("include/icecache/a.h", '"host/engine_impl.h"'),
        ("include/icecache/a.h", "<torch/torch.h>"),
        ("include/icecache/a.h", "<immintrin.h>"),
        ("csrc/simd/a.cpp", '"cuda/cuda_info.h"'),
        ("csrc/index/a.cpp", '"cuda/cuda_info.h"'),
        ("csrc/index/a.cpp", '"threads/thread_pool.h"'),
        ("csrc/index/a.cpp", '"compared/dci_index.h"'),
        ("csrc/host/a.cpp", '"device/device_shape.h"'),
        ("csrc/device/a.cpp", '"host/engine_impl.h"'),
        ("csrc/index/a.cpp", "<faiss/Index.h>"),
        ("csrc/cuda/a.cpp", '"index/tree.h"'),
        ("csrc/device/a.cpp", "<cuda_runtime.h>"),
        ("csrc/host/a.cpp", '"engine.h"'),
        ("csrc/bindings/core_a.cpp", "<torch/csrc/stable/library.h>"),
        ("csrc/bindings/ops_a.cpp", "<Python.h>"),
    ],
)
def test_an_include_upwards_is_found(path: str, include: str) -> None:
    assert list(cpp_violations(path, f"#include <vector>\n#  include {include}\n"))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("icecache/engine.py", "from icecache.hf import enable"),
        ("icecache/engine.py", "from .hf import enable"),
        ("icecache/engine.py", "def f():\n    import icecache.cli"),
        ("icecache/engine.py", "import transformers"),
        ("icecache/__init__.py", "from . import hf"),
        ("icecache/hf/cache.py", "from icecache import _core"),
        ("icecache/hf/cache.py", "from ..bench import tasks"),
        ("icecache/hf/cache.py", "import vllm.config"),
        ("icecache/vllm/plugin.py", "from icecache.hf.cache import IceCache"),
    ],
)
def test_an_import_upwards_is_found(path: str, text: str) -> None:
    assert list(python_violations(path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("icecache/__init__.py", "def __getattr__(name):\n    from . import hf"),
        ("icecache/hf/cache.py", "from icecache.engine import Engine\nimport transformers"),
        ("icecache/hf/cache.py", "from ..engine import Engine\nfrom . import attention"),
        ("icecache/cli/demo.py", "from icecache.bench import tasks\nimport typer"),
        ("icecache/engine.py", "from . import _core\nimport torch"),
    ],
)
def test_an_import_downwards_is_allowed(path: str, text: str) -> None:
    assert not list(python_violations(path, text))
