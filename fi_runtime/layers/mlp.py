import torch
from torch.nn import functional

from fi_runtime.layers.linear import Linear


class GatedMLP:
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020). ``gate_up`` holds both, gate first."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(functional.silu(gate) * up)
