from fi_runtime.layers.linear import Linear
from fi_runtime.layers.norm import RMSNorm
from fi_runtime.layers.residual import ResidualStream


class GatedMLP:
    """Adds down(silu(gate(x)) * up(x)) of the norm x (Shazeer, 2020).

    Args:
        gate_up: hidden -> both, gate first.
        down: back to hidden.
    """

    def __init__(self, norm: RMSNorm, gate_up: Linear, down: Linear) -> None:
        self._norm = norm
        self._gate_up = gate_up
        self._down = down

    def __call__(self, residual: ResidualStream) -> None:
        residual.add(residual.project_gated(self._norm, self._gate_up), self._down)
