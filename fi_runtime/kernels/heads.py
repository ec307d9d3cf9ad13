"""Queries, keys and values, from their projection to attention and the cache."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fi_runtime.kernels.norm import offset_rms_norm_reference, rms_norm_reference
from fi_runtime.kernels.own import own


@dataclass(frozen=True)
class Heads:
    """What a row of the projection holds, and what is done to queries and keys before attention.

    A row holds the queries of ``heads`` heads, then the keys of ``kv_heads``, then their values.
    """

    heads: int
    kv_heads: int
    head_dim: int
    cos_sin: torch.Tensor | None = None
    """(positions, rotary_dim), float32: the cosines of rotary_dim / 2 angles, then their sines.
    Each head's element i turns with element i + rotary_dim / 2 by its angle (Su et al., 2021);
    those from rotary_dim on stay."""
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    """(head_dim,): weights of the norms that come before the turning"""
    eps: float = 0.0
    """of the norms"""
    norms_add_one: bool = False
    """whether the norms multiply by 1 + weight"""
    sinks: torch.Tensor | None = None
    """(heads,), float32: of each head a score that its softmax has beside those of the keys, for
    which there is no value (OpenAI, 2025); None: there is none"""

    @property
    def has_kernel(self) -> bool:
        """Whether a GPU's kernel does all of it; else plain torch does it there, too."""
        whole = self.cos_sin is None or self.cos_sin.shape[1] == self.head_dim
        return whole and not (self.norms_add_one and self.q_norm is not None)


class Places(NamedTuple):
    """Where a step's tokens lie in the paged cache; int32, on its device."""

    rows: torch.Tensor | None
    """(tokens,): each one's sequence; None: token i is of sequence i"""
    positions: torch.Tensor
    """(tokens,)"""
    page_starts: torch.Tensor
    """(sequences + 1,): where each one's pages begin in ``pages``"""
    pages: torch.Tensor


def place(
    qkv: torch.Tensor,
    heads: Heads,
    places: Places,
    cache: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm and turn queries and keys; keys and values go to the cache.

    Args:
        qkv: (tokens, (heads + 2 * kv_heads) * head_dim).
        cache: keys and values, (pages, page_size, kv_heads, head_dim) each, in the dtype of
            ``qkv`` or float8_e4m3fn.
        out: of the queries, if they are to be put somewhere.

    Returns:
        The queries: (tokens, heads, head_dim).
    """
    if out is None:
        shape = (len(qkv), heads.heads, heads.head_dim)
        out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    if qkv.is_cuda and heads.has_kernel:
        own().place_qkv(
            qkv, out, heads.q_norm, heads.k_norm, heads.cos_sin, *cache, *places, heads.eps
        )
    else:
        place_reference(qkv, heads, places, cache, out)
    return out


def place_reference(
    qkv: torch.Tensor,
    heads: Heads,
    places: Places,
    cache: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
) -> None:
    """``place`` in plain torch."""
    q, *sides = turned(qkv, heads, places.positions)
    out.copy_(q)
    rows = torch.arange(len(qkv), device=qkv.device) if places.rows is None else places.rows.long()
    page_size = cache[0].shape[1]
    pages = places.pages[(places.page_starts[rows] + places.positions // page_size).long()].long()
    for side, values in zip(cache, sides, strict=True):
        side[pages, (places.positions % page_size).long()] = as_kept(values, side.dtype)


def as_kept(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values in the cache's dtype; in fp8 what is too large becomes its largest number."""
    if dtype != torch.float8_e4m3fn:
        return x
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def turned(
    qkv: torch.Tensor, heads: Heads, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, the first two as attention takes them, as transformers does it.

    Args:
        qkv: (tokens, (heads + 2 * kv_heads) * head_dim).
        positions: (tokens,), int32.

    Returns:
        (tokens, heads or kv_heads, head_dim) each.
    """
    split = [heads.heads, heads.kv_heads, heads.kv_heads]
    q, k, v = torch.split(qkv.view(len(qkv), -1, heads.head_dim), split, dim=1)
    norm = offset_rms_norm_reference if heads.norms_add_one else rms_norm_reference
    if heads.q_norm is not None:
        q = norm(q, heads.q_norm, heads.eps)
    if heads.k_norm is not None:
        k = norm(k, heads.k_norm, heads.eps)
    if heads.cos_sin is not None:
        cos, sin = heads.cos_sin[positions].unsqueeze(1).to(q.dtype).chunk(2, dim=-1)
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)
    return q, k, v


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
