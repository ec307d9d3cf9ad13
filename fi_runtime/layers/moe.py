import torch

from fi_runtime.kernels.activation import GatedActivation
from fi_runtime.kernels.moe import ExpertMLPs, experts, route
from fi_runtime.layers.linear import Linear
from fi_runtime.layers.norm import RMSNorm
from fi_runtime.layers.residual import ResidualStream


class SharedExpert:
    """A gated MLP for all tokens, each of which says how much of it is added.

    Args:
        gate: hidden -> 1, whose sigmoid is that share.
        gate_up: hidden -> both, gate first.
        down: back to hidden.
    """

    def __init__(
        self, gate: Linear, gate_up: Linear, down: Linear, activation: GatedActivation
    ) -> None:
        self._gate = gate
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._gate(x).sigmoid() * self._down(self._activation(self._gate_up(x)))


class MixtureOfExperts:
    """Adds a gated MLP of the norm, of which each token uses some parts (Shazeer et al., 2017).

    Args:
        router: hidden -> experts.
        mlps: of all experts.
        per_token: experts that each token uses.
        normalised: whether their weights are scaled to a sum of 1.
        shared: added to what those give, if there is one.
    """

    def __init__(
        self,
        norm: RMSNorm,
        router: Linear,
        mlps: ExpertMLPs,
        per_token: int,
        normalised: bool,
        shared: SharedExpert | None = None,
    ) -> None:
        self._norm = norm
        self._router = router
        self._mlps = mlps
        self._per_token = per_token
        self._normalised = normalised
        self._shared = shared

    def __call__(self, residual: ResidualStream) -> None:
        x = residual.normed(self._norm)
        weights, chosen = route(self._router(x), self._per_token, self._normalised)
        out = experts(x, weights, chosen, self._mlps)
        residual.add_all(out if self._shared is None else out + self._shared(x))
