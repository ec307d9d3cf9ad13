"""What captured steps read, uploaded while the step before them is computed."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

ALIGNED = 256
"""bytes at whose multiples parts of a buffer begin"""


class Twice(NamedTuple):
    """A part of a device's memory that is there twice."""

    put: torch.Tensor
    """where the next step's contents are put"""
    read: torch.Tensor
    """where steps read them"""


class Staging:
    """Where the host writes what is to be put: pinned, and used again every second time.

    Args:
        turn: 0 or 1, of the two that there are.
        inputs: bytes of the first part.
        layout: bytes of the second.
    """

    def __init__(self, turn: int, inputs: int, layout: int, device: torch.device) -> None:
        self.turn = turn
        cuda = device.type == "cuda"
        self.whole = torch.zeros(inputs + layout, dtype=torch.uint8, pin_memory=cuda)
        self.inputs = self.whole[:inputs].view(torch.int64)
        self.layout = self.whole[inputs:].view(torch.int32)
        self.layout_words = 0
        """of the layout, that the step needs: to be set each time"""


class Ahead:
    """Fills what captured steps read for the next one while the device computes the last.

    Copies from the host would else stand between two steps, each with a pause before it and after.
    So all of it is put in one place on a stream of its own, and just before the step goes to the
    place where it reads it, in one copy on the device. All is allocated before: each call costs
    the host some microseconds, of which a step of few sequences has not many.

    Its steps are launched on the stream that is the current one when it is made.

    Args:
        plans: bytes of parts that something else copies to the device.
        inputs: words of 8 bytes.
        layout: words of 4 bytes, of which a step may need the first ones alone.
    """

    def __init__(
        self, device: torch.device, plans: Sequence[int], inputs: int, layout: int
    ) -> None:
        sizes = [_aligned(size) for size in (*plans, 8 * inputs)] + [4 * layout]
        self._put, self._read = (
            torch.zeros(sum(sizes), dtype=torch.uint8, device=device) for _ in range(2)
        )
        sides = (torch.split(side, sizes) for side in (self._put, self._read))
        *self.plans, words, last = (Twice(*parts) for parts in zip(*sides, strict=True))
        self.inputs = Twice(*(part.view(torch.int64) for part in words))
        self.layout = Twice(*(part.view(torch.int32) for part in last))
        self._first = sum(sizes[:-2])
        """byte of what is uploaded"""
        self.stagings = [Staging(turn, sizes[-2], sizes[-1], device) for turn in (0, 1)]
        self._turn = 0
        self._streams = _Streams(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def filling(self) -> Iterator[Staging]:
        """Write what a step needs within this context, and launch the step after it."""
        self._turn = 1 - self._turn
        staging, streams = self.stagings[self._turn], self._streams
        if streams is None:
            yield staging
            end = self._upload(staging)
        else:
            with streams.uploading(self._turn):
                yield staging
                end = self._upload(staging)
        self._read[:end].copy_(self._put[:end])
        if streams is not None:
            streams.taken.record(streams.steps)

    def _upload(self, staging: Staging) -> int:
        """The byte after the last one that was put."""
        size = staging.inputs.nbytes + 4 * staging.layout_words
        end = self._first + size
        self._put[self._first : end].copy_(staging.whole[:size], non_blocking=True)
        return end


class _Streams:
    """Who waits for whom, where the device does not wait for the host."""

    def __init__(self, device: torch.device) -> None:
        self.steps = torch.cuda.current_stream(device)
        self._uploads = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self.taken = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # Not before the zeros are there.
        self.taken.record(self.steps)

    @contextlib.contextmanager
    def uploading(self, turn: int) -> Iterator[None]:
        """Launch uploads within this context; what is launched after it waits for them."""
        copied = self._copied[turn]
        # RACE: what was written here two steps ago may not have been copied yet, and what was put
        # for the step before may not have been taken.
        copied.synchronize()
        self._uploads.wait_event(self.taken)
        # The context that torch has for it looks for the current stream first, which takes longer.
        torch.cuda.set_stream(self._uploads)
        try:
            yield
        finally:
            torch.cuda.set_stream(self.steps)
            copied.record(self._uploads)
        self.steps.wait_event(copied)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
