"""What the fake kernels of torch operators check."""

from __future__ import annotations

import torch


def require_one_device(**tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError unless all tensors are on one device; None stands for no tensor.

    One meta tensor among real ones makes torch call the fake kernel, whose result would pass for
    the operator's.
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first, expected = next(iter(devices.items()))
    for name, device in devices.items():
        if device != expected:
            raise RuntimeError(
                f"icecache: {name} must be on the device of {first} ({expected}), got {device}"
            )
