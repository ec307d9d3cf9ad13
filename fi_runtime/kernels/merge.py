"""Results of attention to the parts of a context, merged to that of the whole."""

import itertools
import math

import torch

from fi_runtime.kernels.own import own


def merge_parts(
    parts: torch.Tensor,
    sums: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    out_sums: torch.Tensor | None = None,
) -> None:
    """Weigh each token's parts by how much of the softmax they hold.

    Args:
        parts: (parts, heads, head_dim): of all tokens, one token's after the other's.
        sums: (parts, heads), float32: the logarithm to the base of 2 of the sum of the
            exponentials of a part's scores; far below all others' where it has none.
        starts: (tokens + 1,), int32: where each one's parts begin, and those of the last end.
        out: (tokens, heads, head_dim), of the parts' dtype; 0 where there is no part.
        out_sums: (tokens, heads), float32: ``sums`` of the whole.
    """
    if out.is_cuda:
        own().merge_parts(parts, sums, starts, out, out_sums)
        return
    merge_parts_reference(parts, sums, starts, out, out_sums)


def merge_parts_reference(
    parts: torch.Tensor,
    sums: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    out_sums: torch.Tensor | None = None,
) -> None:
    for token, (first, end) in enumerate(itertools.pairwise(starts.tolist())):
        scores = sums[first:end] * math.log(2)
        weights = torch.softmax(scores, dim=0).unsqueeze(-1)
        out[token] = (parts[first:end].float() * weights).sum(0)
        if out_sums is not None:
            out_sums[token] = torch.logsumexp(scores, dim=0) / math.log(2)
