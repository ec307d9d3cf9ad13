"""Root-mean-square norms."""

import torch

from fi_runtime.kernels.library import flashinfer


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """X / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019).

    Args:
        x: (..., size), any strides but the last dimension's.
        weight: (size,).
        eps: added to the mean.
    """
    if x.is_cuda:
        out: torch.Tensor = flashinfer().norm.rmsnorm(x, weight, eps)
        return out
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The mean is taken in float32 whatever the dtype of ``x``."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``x`` to ``residual``, both (tokens, size): the sum's norm, and the sum.

    Both arguments may be overwritten.
    """
    if x.is_cuda:
        flashinfer().norm.fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual
    residual = residual + x
    return rms_norm_reference(residual, weight, eps), residual


def offset_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As ``rms_norm``, times 1 + weight (Gemma team, 2024)."""
    if x.is_cuda:
        rows = x.reshape(-1, x.shape[-1])
        out: torch.Tensor = flashinfer().norm.gemma_rmsnorm(rows, weight, eps)
        return out.view(x.shape)
    return offset_rms_norm_reference(x, weight, eps)


def offset_rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In float32 up to the end: 1 + weight has no room in a narrower one."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * (1.0 + weight.float())).to(x.dtype)


def add_offset_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``add_rms_norm``, times 1 + weight."""
    if x.is_cuda:
        flashinfer().norm.gemma_fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual
    residual = residual + x
    return offset_rms_norm_reference(residual, weight, eps), residual
