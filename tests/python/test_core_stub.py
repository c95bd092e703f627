"""`_core.pyi` declares what the C++ module has, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

# What stubtest says of every class that pybind11 makes.
_OF_PYBIND11 = re.compile(
    "metaclass differs|cannot be subclassed at runtime|__pybind11_module_local"
    "|__init__ is inconsistent, stub does not have"
)


def differences(module: str, path: Path, folder: Path) -> list[str]:
    """What stubtest says of a module in `path`, whose imports it does not follow."""
    settings = folder / "mypy.ini"
    settings.write_text("[mypy]\nfollow_imports = skip\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy.stubtest",
            "--concise",
            "--mypy-config-file",
            settings,
            module,
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(path), "MYPYPATH": str(path)},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert any(line.startswith(f"{module}.") for line in lines), done.stdout + done.stderr
    return [line for line in lines if not _OF_PYBIND11.search(line)]


def test_the_stub_is_that_of_the_module(repository: Path, tmp_path: Path) -> None:
    assert differences("icecache._core", repository / "python", tmp_path) == []
