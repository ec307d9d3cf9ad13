import torch
from torch.nn import functional


class Linear:
    """y = x W^T + b. ``weight``: (out, in), ``bias``: (out,)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Of ``x``: (rows, in); written to ``out`` if it is given."""
        if out is None:
            return functional.linear(x, self.weight, self.bias)
        torch.mm(x, self.weight.T, out=out)
        if self.bias is not None:
            out += self.bias
        return out
