"""A second stream, for what the GPU can compute at the same time as something else."""

import contextlib
from collections.abc import Iterator

import torch


class Beside:
    """Between ``launching`` and ``join``, what is launched runs beside what was launched within.

    What both read must not be written between the two, nor freed; on a device without streams, all
    of it is computed in the order of the calls.
    """

    def __init__(self, device: torch.device) -> None:
        self._streams = _Streams(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Launch on the second stream within this context, after all that came before it."""
        if self._streams is None:
            yield
            return
        with self._streams.launching():
            yield

    def join(self) -> None:
        """Have what is launched from here on wait for both."""
        if self._streams is not None:
            self._streams.join()


class _Streams:
    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device)
        self._other = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._forked, self._done = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        self._forked.record(self._main)
        self._other.wait_event(self._forked)
        # The context that torch has for it looks for the current stream first, which takes longer.
        torch.cuda.set_stream(self._other)
        try:
            yield
        finally:
            torch.cuda.set_stream(self._main)
            self._done.record(self._other)

    def join(self) -> None:
        self._main.wait_event(self._done)
