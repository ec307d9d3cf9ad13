"""From the host to a device without waiting for it."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

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


SLICE = 8192
"""words of a buffer that one thread block copies: many at a time take as long as one"""


class Twice(NamedTuple):
    """A buffer that is there twice; of whole words."""

    put: torch.Tensor
    """where the next step's contents are put"""
    read: torch.Tensor
    """where steps read them"""

    def after(self, first: int) -> "Twice":
        """All from element ``first`` on."""
        return Twice(self.put[first:], self.read[first:])


class Ahead:
    """Fills what captured steps read for the next one while the device computes the last.

    Copies from the host would else stand between two steps, each with a pause before it and after.
    So contents are put in one place on a stream of their own, and in one kernel, just before the
    step, go to the place where it reads them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._full: list[Twice] = []
        self._stream = self._taken = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._taken = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def twice(self, size: int, dtype: torch.dtype) -> Twice:
        """A new buffer, of zeros: (size,) each."""
        twice = Twice(*(torch.zeros(size, dtype=dtype, device=self._device) for _ in "12"))
        if self._taken is not None:
            self._taken.record()  # the zeros must not come after what is put there
        return twice

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Fill buffers within this context, and launch the step that reads them after it."""
        self._full = []
        if self._stream is None or self._taken is None:
            yield
        else:
            # RACE: the step before may not have taken yet what is there.
            self._stream.wait_event(self._taken)
            with torch.cuda.stream(self._stream):
                yield
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        parts = [
            [part for each in side for part in torch.split(each.view(torch.int32), SLICE)]
            for side in zip(*self._full, strict=True)
        ]
        if parts:
            put, read = parts
            torch._foreach_copy_(read, put)
        if self._taken is not None:
            self._taken.record()

    def put(self, twice: Twice, array: npt.NDArray[Any]) -> None:
        """Upload an array to the first elements of a buffer."""
        upload_to(twice.put, array)
        count = len(array)
        self._full.append(Twice(twice.put[:count], twice.read[:count]))

    def has(self, twice: Twice) -> None:
        """Something else has put all of a buffer's contents there."""
        self._full.append(twice)
