"""From a device to the host without waiting before it has to be there."""

import torch

AT_A_TIME = 3


class Download:
    """A copy of a tensor on its way to the host, queued behind what computes the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> torch.Tensor:
        """The tensor on the host, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class TokenDownload:
    """The tokens that a step chose on the CPU, where they are already."""

    def __init__(self) -> None:
        self._tokens = torch.empty(0, dtype=torch.int64)

    def start(self, tokens: torch.Tensor) -> "TokenDownload":
        """Fetch these, (sequences,) int64; those before must have been waited for."""
        self._tokens = tokens
        return self

    def wait(self) -> torch.Tensor:
        """The tokens on the host, once they are there, and until others are fetched."""
        return self._tokens


class GpuTokenDownload(TokenDownload):
    """A place for the tokens that a step chose on a GPU, used again and again.

    Copied on a stream of its own, so that the next step does not wait for it; the graph that chose
    them may choose others meanwhile.

    Args:
        most: tokens.
        stream: for the copies, shared by all such places.
    """

    def __init__(self, most: int, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._steps = torch.cuda.current_stream(device)
        self._stream = stream
        self._there = torch.zeros(most, dtype=torch.int64, device=device)
        self._host = torch.zeros(most, dtype=torch.int64, pin_memory=True)
        self._chosen = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._here = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._count = 0

    def start(self, tokens: torch.Tensor) -> "GpuTokenDownload":
        self._count = count = len(tokens)
        # RACE: those before may not have been copied yet, where nobody waited for them.
        self._steps.wait_event(self._here)
        there = self._there[:count]
        there.copy_(tokens)
        self._chosen.record(self._steps)
        self._stream.wait_event(self._chosen)
        # The context that torch has for it looks for the current stream first, which takes longer.
        torch.cuda.set_stream(self._stream)
        try:
            self._host[:count].copy_(there, non_blocking=True)
            self._here.record(self._stream)
        finally:
            torch.cuda.set_stream(self._steps)
        return self

    def wait(self) -> torch.Tensor:
        self._here.synchronize()
        return self._host[: self._count]


def token_downloads(most: int, device: torch.device) -> list[TokenDownload]:
    """As many as steps are launched before the tokens of one have been waited for, and one."""
    if device.type != "cuda":
        return [TokenDownload() for _ in range(AT_A_TIME)]
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return [GpuTokenDownload(most, device, stream) for _ in range(AT_A_TIME)]
