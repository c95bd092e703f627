"""Where a model computes, and which model is within a wrapper."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from icecache import InvalidArgument

DEVICES = ("cpu", "cuda")


def wrapped_model(model: Any) -> Any:
    """The transformers model within torch.compile's and PEFT's wrappers; else `model` itself."""
    while not isinstance(model, PreTrainedModel):
        base = getattr(model, "get_base_model", None)
        inner = base() if callable(base) else getattr(model, "_orig_mod", None)
        if inner is None or inner is model:
            break
        model = inner
    return model


def compute_device(model: PreTrainedModel) -> torch.device:
    """The device that all layers of `model` compute on.

    accelerate may hold weights elsewhere (CPU, disk) and bring them to that device for each call.
    Raises InvalidArgument where layers are on several devices, on one that is not served, or have
    no weights.
    """
    devices = _devices(model, None)
    if torch.device("meta") in devices:
        raise InvalidArgument(
            "model: some parameters have no data (device meta); load the weights first"
        )
    if len(devices) != 1 or any(device.type not in DEVICES for device in devices):
        raise InvalidArgument(
            "model: expected all layers to compute on the CPU or on one CUDA device, found them "
            f"on {', '.join(sorted(map(str, devices)))}; load the model with "
            'device_map={"": "cpu"} or {"": "cuda:0"}'
        )
    return devices.pop()


def _devices(module: torch.nn.Module, outer: torch.device | None) -> set[torch.device]:
    """Devices that `module` and its parts compute on; `outer` is that of offloaded weights."""
    execution = _execution_device(getattr(module, "_hf_hook", None)) or outer
    devices = {
        execution if parameter.device.type == "meta" and execution else parameter.device
        for parameter in module.parameters(recurse=False)
    }
    for child in module.children():
        devices |= _devices(child, execution)
    return devices


def _execution_device(hook: Any) -> torch.device | None:
    """Where a hook of accelerate, or a sequence of hooks, has its module compute."""
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if isinstance(device, (int, str, torch.device)):
            return torch.device(device)
    return None
