import torch

from fi_runtime.attention.base import Attention
from fi_runtime.layers.linear import Linear
from fi_runtime.layers.norm import RMSNorm
from fi_runtime.layers.rotary import Rotary


class SelfAttention:
    """Grouped-query attention with rotary positions and, where given, norms on q and k heads.

    Args:
        qkv: hidden -> (heads + 2 * kv_heads) * head_dim, queries first, then keys, then values.
        out: heads * head_dim -> hidden.
    """

    def __init__(
        self,
        layer: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        qkv: Linear,
        out: Linear,
        rotary: Rotary,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        self._layer = layer
        self._head_dim = head_dim
        self._split = [heads, kv_heads, kv_heads]
        self._qkv = qkv
        self._out = out
        self._rotary = rotary
        self._q_norm = q_norm
        self._k_norm = k_norm

    def __call__(
        self, x: torch.Tensor, positions: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """``x``: (tokens, hidden), ``positions``: (tokens,); returns (tokens, hidden)."""
        heads = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        q, k, v = torch.split(heads, self._split, dim=1)
        if self._q_norm is not None:
            q = self._q_norm(q)
        if self._k_norm is not None:
            k = self._k_norm(k)
        q, k = self._rotary(positions, q, k)
        return self._out(attention(self._layer, q, k, v).flatten(1))
