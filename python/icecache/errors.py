"""Every error that a user can cause. The C++ engine raises the same classes."""

from __future__ import annotations


class Error(RuntimeError):
    """Base of all errors of icecache."""


class InvalidArgument(Error, ValueError):
    """A parameter or an input that is not supported: names it, what was expected, what came."""


class OutOfPages(Error):
    """The page pool is exhausted. Nothing was changed; other sequences go on."""


class IntegrityError(Error):
    """A page is not what its owner wrote: stale, foreign or altered memory."""


class CudaError(Error):
    """A call to CUDA failed: names it. Nothing on the device can be relied on."""


class Unavailable(Error):
    """A part that was left out of this build (CUDA, FAISS); says how to get it."""
