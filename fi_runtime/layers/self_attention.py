from fi_runtime.attention.base import Attention
from fi_runtime.kernels.heads import Heads
from fi_runtime.layers.linear import Linear
from fi_runtime.layers.norm import RMSNorm
from fi_runtime.layers.residual import ResidualStream


class SelfAttention:
    """Adds grouped-query attention of the norm.

    Args:
        qkv: hidden -> what ``heads`` says.
        out: heads * head_dim -> hidden.
        post_norm: of what is added, if there is one.
    """

    def __init__(
        self,
        layer: int,
        norm: RMSNorm,
        qkv: Linear,
        heads: Heads,
        out: Linear,
        post_norm: RMSNorm | None = None,
    ) -> None:
        self._layer = layer
        self._norm = norm
        self._qkv = qkv
        self._heads = heads
        self._out = out
        self._post_norm = post_norm

    def __call__(self, residual: ResidualStream, attention: Attention) -> None:
        qkv = residual.project(self._norm, self._qkv)
        attended = attention(self._layer, qkv, self._heads).flatten(1)
        residual.add(attended, self._out, self._post_norm)
