"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from absence import absent
from emulated import emulate_device, require_emulator

REPOSITORY = Path(__file__).resolve().parents[2]


def _require_folder(folder: Path) -> Path:
    """`folder`; skips where it is absent, fails there with ICECACHE_REQUIRE_SHARED=1."""
    if not folder.is_dir():
        reason = f"{folder} is absent: test data that is not part of the repository"
        absent(reason, "ICECACHE_SHARED names another folder")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Test data beside the checkout: `../shared`, or the folder that ICECACHE_SHARED names."""
    return _require_folder(Path(os.environ.get("ICECACHE_SHARED", REPOSITORY.parent / "shared")))


@pytest.fixture(params=["emulated", "cuda"])
def any_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Torch's default device: a GPU, or the CPU with DeviceCache on the emulator."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "emulated":
        require_emulator()
    device = torch.device("cuda" if request.param == "cuda" else "cpu")
    with pytest.MonkeyPatch.context() as patch, device:
        if request.param == "emulated":
            emulate_device(patch)
        yield device
        gc.collect()  # caches that are let go of later would ask CUDA for a stream
