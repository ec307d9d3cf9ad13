"""From a device to the host without waiting before it has to be there."""

import torch


class Download:
    """A copy of a tensor on its way to the host, queued behind what computes the tensor.

    Args:
        stream: for the copy, so that nothing waits for it that is launched from now on, which may
            overwrite the tensor; default: the current one.
    """

    def __init__(self, tensor: torch.Tensor, stream: torch.cuda.Stream | None = None) -> None:
        self._event: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._host = tensor
            return
        current = torch.cuda.current_stream(tensor.device)
        if stream is not None:
            tensor = tensor.clone()
            stream.wait_stream(current)
        # RACE: memory of the clone is used again once nothing here holds it, so it is held.
        self._tensor = tensor
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream or current):
            self._host.copy_(tensor, non_blocking=True)
            self._event.record()

    def wait(self) -> torch.Tensor:
        """The tensor on the host, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
