"""Choice and validation of torch devices."""

from __future__ import annotations

import torch

from customize.errors import ConfigError


def choose_device(name: str | None, where: str) -> torch.device:
    """Check that a device works, or choose the fastest available one.

    Args:
        name: The device, such as ``"cpu"`` or ``"cuda:1"``; None: CUDA, else MPS, else the CPU.
        where: The flag or setting with the name, for the error.

    Raises:
        ConfigError: Tensors cannot be moved to and from the device.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # fails on the device "meta", which stores no data
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"the device {name} cannot be used: {str(error).splitlines()[0]}",
            where=where,
            fix="name an available device, such as cpu or cuda:0, or leave it out",
        ) from error
    return device


def current_accelerator() -> torch.device | None:
    """Return the current accelerator, or None if there is only a CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
