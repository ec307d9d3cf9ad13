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


def upload_to(target: torch.Tensor, array: npt.NDArray[Any]) -> None:
    """``upload`` to the first elements of a tensor that stays where it is."""
    host = torch.from_numpy(array)
    target[: len(host)].copy_(host if target.device.type == "cpu" else host.pin_memory(), True)
