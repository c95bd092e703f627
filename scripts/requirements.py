"""Prints the Python requirements of pyproject.toml that this interpreter does not meet.

Usage: requirements.py [--torch REQUIREMENT] GROUP...
Groups: `build` (build-system.requires), `run` (dependencies), or an extra such as `dev`.
One requirement a line; --torch replaces torch's own requirement where torch is missing. Needs
nothing but pip, so that it runs in an environment that was made a moment ago.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pip._vendor.packaging.requirements import Requirement

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def load_pyproject() -> dict[str, Any]:
    """pyproject.toml as a dictionary."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from pip._vendor import tomli as tomllib
    return dict(tomllib.loads(PYPROJECT.read_text(encoding="utf-8")))


def requirements(groups: list[str]) -> Iterator[Requirement]:
    """The requirements of `groups`, in order. Raises KeyError for a group that does not exist."""
    pyproject = load_pyproject()
    tables: dict[str, list[str]] = {
        "build": pyproject["build-system"]["requires"],
        "run": pyproject["project"]["dependencies"],
        **pyproject["project"]["optional-dependencies"],
    }
    for group in groups:
        yield from map(Requirement, tables[group])


def is_met(requirement: Requirement) -> bool:
    """Whether the installed version, if any, satisfies `requirement`."""
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return bool(requirement.specifier.contains(version, prereleases=True))


def main() -> None:
    """Prints what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", help="what to ask for where torch is missing")
    parser.add_argument("groups", nargs="+")
    arguments = parser.parse_args()
    for requirement in requirements(arguments.groups):
        if not is_met(requirement):
            wanted = arguments.torch if requirement.name == "torch" else None
            print(wanted or requirement)


if __name__ == "__main__":
    main()
