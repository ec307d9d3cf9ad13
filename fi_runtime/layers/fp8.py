import torch

from fi_runtime.kernels.fp8 import laid_out, product
from fi_runtime.layers.linear import Linear


class Fp8Linear(Linear):
    """A projection whose weight stays in fp8, and whose rows are rounded to it on their way.

    Args:
        weight: (out, in), in fp8.
        scale: of the weight, as ``dequantised`` takes it.
        blocks: whether it is of blocks.
        bias: (out,).
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        blocks: bool,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__(weight, bias)
        self._scale = laid_out(scale, blocks)
        self._blocks = blocks

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        y = product(x, self.weight, self._scale, self._blocks)
        if self.bias is not None:
            y += self.bias
        return y if out is None else out.copy_(y)
