"""From the host to a device without waiting for it."""

from typing import Any

import numpy.typing as npt
import torch


def upload(array: npt.NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The array on the device; the copy is queued behind what the device has to do.

    From pinned memory that torch keeps until the copy has happened: from any other, the host
    would wait for all that the device was given before.
    """
    host = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
