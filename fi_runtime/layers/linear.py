import torch
from torch.nn import functional


class Linear:
    """y = x W^T + b. ``weight``: (out, in), ``bias``: (out,)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)
