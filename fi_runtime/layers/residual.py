import torch

from fi_runtime.kernels import projection
from fi_runtime.kernels.activation import GatedActivation, silu_and_mul
from fi_runtime.layers.adapted import AdaptedLinear
from fi_runtime.layers.linear import Linear
from fi_runtime.layers.norm import RMSNorm


class ResidualStream:
    """What layers read through a norm, and add to: (tokens, hidden).

    Which kernels that takes is decided here. Of few tokens, norms and additions are part of the
    projections beside them; of many, what was added last waits for the next norm.

    Args:
        others: (tokens, ranks), as ``AdaptedLinear`` takes it.
    """

    def __init__(self, x: torch.Tensor, others: torch.Tensor | None = None) -> None:
        self._x = x
        self._others = others
        self._added: torch.Tensor | None = None

    @property
    def total(self) -> torch.Tensor:
        """All that has been added."""
        if self._added is not None:
            self._x, self._added = self._x + self._added, None
        return self._x

    def normed(self, norm: RMSNorm) -> torch.Tensor:
        if self._added is None:
            return norm(self._x)
        normed, self._x = norm.add(self._added, self._x)
        self._added = None
        return normed

    def project(
        self, norm: RMSNorm, linear: Linear, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """linear(norm): (tokens, out); written to ``out`` if it is given."""
        if norm.in_projections and projection.is_few(self._x, linear.weight):
            product = projection.norm_linear(
                self.total, norm.weight, norm.eps, linear.weight, linear.bias, out
            )
        else:
            product = linear(self.normed(norm), out)
        return self._adapted(linear, product)

    def project_gated(
        self, norm: RMSNorm, gate_up: Linear, activation: GatedActivation
    ) -> torch.Tensor:
        """The activation of linear(norm), gate first: (tokens, out / 2)."""
        known = norm.in_projections and activation is silu_and_mul
        known = known and not isinstance(gate_up, AdaptedLinear)
        if known and projection.is_few(self._x, gate_up.weight):
            return projection.norm_linear_silu_and_mul(
                self.total, norm.weight, norm.eps, gate_up.weight, gate_up.bias
            )
        return activation(self.project(norm, gate_up))

    def add(self, x: torch.Tensor, linear: Linear, norm: RMSNorm | None = None) -> None:
        """Add linear(x), or its norm if there is one, of ``x``: (tokens, in)."""
        if norm is not None:
            self.add_all(norm(self._adapted(linear, linear(x))))
        elif isinstance(linear, AdaptedLinear):
            self.add_all(self._adapted(linear, linear(x)))
        elif projection.is_few(x, linear.weight):
            projection.add_linear(self.total, x, linear.weight, linear.bias)
        else:
            self.add_all(linear(x))

    def add_all(self, x: torch.Tensor) -> None:
        """Add ``x``: (tokens, hidden)."""
        self._x, self._added = self.total, x

    def _adapted(self, linear: Linear, product: torch.Tensor) -> torch.Tensor:
        """A product with what adapters add to it, where there are any."""
        if isinstance(linear, AdaptedLinear):
            return linear.adapted(product, self._others)
        return product
