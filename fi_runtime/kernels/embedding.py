"""Rows of the embedding."""

import torch
from torch.nn import functional

from fi_runtime.kernels.own import own


def embed(tokens: torch.Tensor, last_tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Each token's row of the table: (tokens, hidden).

    Args:
        tokens: (tokens,), int64; -1 - slot stands for the token chosen last in that slot, where
            the host did not know it yet.
        last_tokens: (slots,), int64.
        table: (vocab, hidden).
    """
    if not table.is_cuda:
        return embed_reference(tokens, last_tokens, table)
    out = torch.empty((len(tokens), table.shape[1]), dtype=table.dtype, device=table.device)
    own().embed_tokens(tokens, last_tokens, table, out)
    return out


def embed_reference(
    tokens: torch.Tensor, last_tokens: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    known = torch.where(tokens < 0, last_tokens[(-1 - tokens).clamp(min=0)], tokens)
    return functional.embedding(known, table)
