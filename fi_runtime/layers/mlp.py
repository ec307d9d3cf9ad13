from fi_runtime.kernels.activation import GatedActivation, silu_and_mul
from fi_runtime.layers.linear import Linear
from fi_runtime.layers.norm import RMSNorm
from fi_runtime.layers.residual import ResidualStream


class GatedMLP:
    """Adds down(activation(gate(x)) * up(x)) of the norm x (Shazeer, 2020).

    Args:
        gate_up: hidden -> both, gate first.
        down: back to hidden.
        activation: of the gate, times up.
        post_norm: of what is added, if there is one.
    """

    def __init__(
        self,
        norm: RMSNorm,
        gate_up: Linear,
        down: Linear,
        activation: GatedActivation = silu_and_mul,
        post_norm: RMSNorm | None = None,
    ) -> None:
        self._norm = norm
        self._gate_up = gate_up
        self._down = down
        self._activation = activation
        self._post_norm = post_norm

    def __call__(self, residual: ResidualStream) -> None:
        x = residual.project_gated(self._norm, self._gate_up, self._activation)
        residual.add(x, self._down, self._post_norm)
