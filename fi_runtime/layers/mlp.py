import torch

from fi_runtime.kernels.activation import silu_and_mul
from fi_runtime.layers.linear import Linear


class GatedMLP:
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020). ``gate_up`` holds both, gate first."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(silu_and_mul(self._gate_up(x)))
