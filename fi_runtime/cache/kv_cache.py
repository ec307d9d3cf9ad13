"""The cache's memory."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheShape:
    layers: int
    pages: int
    page_size: int
    kv_heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        return self.pages * self.page_size

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values of all layers."""
        return 2 * self.layers * self.tokens * self.kv_heads * self.head_dim * dtype.itemsize


class KVCache:
    """Keys and values of every layer, in pages.

    ``data``: (layers, 2, pages, page_size, kv_heads, head_dim), keys at 0 and values at 1: per
    layer the NHD layout that FlashInfer's paged wrappers read.
    """

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        # Zeros, not whatever lay there: masked positions are multiplied by 0, and 0 * NaN is NaN.
        self.data = torch.zeros(
            (shape.layers, 2, shape.pages, shape.page_size, shape.kv_heads, shape.head_dim),
            dtype=dtype,
            device=device,
        )

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer: (pages, page_size, kv_heads, head_dim) each."""
        return self.data[index, 0], self.data[index, 1]
