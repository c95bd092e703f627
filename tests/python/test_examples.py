"""The examples run, those in C++ against an installed icecache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import icecache.models
import pytest
from absence import absent


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_engine_alone(repository: Path) -> None:
    said = run(sys.executable, repository / "examples" / "engine_alone.py")
    assert "of what full attention reads" in said


def test_telemetry(repository: Path) -> None:
    said = run(sys.executable, repository / "examples" / "telemetry.py")
    assert said.count("1234 among them") == 2


@pytest.mark.model
@pytest.mark.slow
def test_many_questions(repository: Path) -> None:
    icecache.models.smollm2()
    said = run(sys.executable, repository / "examples" / "many_questions.py")
    assert "sequence" in said and "MiB" in said


def test_a_program_in_cpp(repository: Path, tmp_path: Path) -> None:
    build = repository / "build" / "release"
    if not (build / "CMakeCache.txt").is_file():
        absent(f"{build} is absent", "make build makes it")
    run("cmake", "--install", build, "--prefix", tmp_path / "installed")
    headers = sorted(path.name for path in (tmp_path / "installed/include/icecache").iterdir())
    assert headers == sorted(path.name for path in (repository / "include/icecache").iterdir())
    given = f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}"
    source, made = repository / "examples" / "cpp", tmp_path / "made"
    run("cmake", "-S", source, "-B", made, given, "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror")
    run("cmake", "--build", made)
    assert run(made / "decode").startswith("20050 tokens, 50 steps, ")
