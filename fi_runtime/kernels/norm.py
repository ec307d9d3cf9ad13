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
