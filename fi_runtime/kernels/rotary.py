"""Rotary position embedding."""

import torch

from fi_runtime.kernels.library import flashinfer


def rotate(
    positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn each head's element i with element i + head_dim / 2 by its angle (Su et al., 2021).

    Args:
        positions: (tokens,), int32.
        q: (tokens, heads, head_dim); may be overwritten.
        k: (tokens, kv_heads, head_dim); may be overwritten.
        cos_sin: (positions, head_dim), float32: the cosines of the head_dim / 2 angles, then sines.
    """
    if not q.is_cuda:
        return rotate_reference(positions, q, k, cos_sin)
    flashinfer().rope.apply_rope_with_cos_sin_cache_inplace(
        positions, q.flatten(1), k.flatten(1), q.shape[-1], cos_sin
    )
    return q, k


def rotate_reference(
    positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers: in the dtype of ``q``."""
    cos, sin = cos_sin[positions].unsqueeze(1).to(q.dtype).chunk(2, dim=-1)
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
