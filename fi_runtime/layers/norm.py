import torch

from fi_runtime.kernels.norm import add_offset_rms_norm, add_rms_norm, offset_rms_norm, rms_norm


class RMSNorm:
    """Root-mean-square norm over the last dimension, with a ``weight`` (size,)."""

    in_projections = True
    """whether the kernels of projections know it"""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add ``x`` to the residual stream and normalise it: (normalised, new residual)."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class OffsetRMSNorm(RMSNorm):
    """One that multiplies by 1 + weight, as Gemma's do."""

    in_projections = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return offset_rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return add_offset_rms_norm(x, residual, self.weight, self.eps)
