"""Drawing tokens from logits."""

import math
from typing import NamedTuple

import torch

from fi_runtime.kernels.library import flashinfer

MIN_TEMPERATURE = 1e-5
"""Below it float32 logits could overflow; the likeliest token has all the weight long before."""
BLOCK = 1024
"""tokens at most of those that are summed together before one of them is looked for"""


class Draws(NamedTuple):
    """How each row is drawn: (rows,) each, floats, on the device of the logits.

    In this order: divide by the temperature; keep tokens of at least ``min_p`` times the
    likeliest one's probability; of those the ``top_k`` likeliest; of those the likeliest that
    together have ``top_p`` of what is left; then the token where their running sum passes
    ``uniform`` of its total.
    """

    temperature: torch.Tensor
    """0: the likeliest token"""
    top_k: torch.Tensor
    """0: all tokens"""
    top_p: torch.Tensor
    """1: all tokens"""
    min_p: torch.Tensor
    """0: all tokens"""
    uniform: torch.Tensor
    """random, in [0, 1)"""


def choose(logits: torch.Tensor, draws: Draws, filtered: bool = True) -> torch.Tensor:
    """One token a row, drawn or, at temperature 0, the likeliest.

    Args:
        logits: (rows, vocab), float32.
        filtered: whether any row has a top_k, top_p or min_p; to look takes longer than to draw.

    Returns:
        (rows,), int64.
    """
    likeliest = logits.argmax(dim=-1)
    if logits.is_cuda:
        return torch.where(draws.temperature > 0, _draw(logits, draws, filtered), likeliest)
    drawn = draws.temperature.nonzero()[:, 0]
    likeliest[drawn] = draw_reference(logits[drawn], Draws(*(each[drawn] for each in draws)))
    return likeliest


def _draw(logits: torch.Tensor, draws: Draws, filtered: bool) -> torch.Tensor:
    """Of fixed shapes and without a look at any value, so that a CUDA graph can hold it."""
    temperature = draws.temperature.clamp(min=MIN_TEMPERATURE)
    weights = flashinfer().sampling.softmax(logits, temperature)
    return _pick(_keep(weights, draws) if filtered else weights, draws.uniform)


def _keep(weights: torch.Tensor, draws: Draws) -> torch.Tensor:
    """As ``_filter``, of weights in any order. (rows, vocab)."""
    sampling = flashinfer().sampling
    vocab = weights.shape[-1]
    least = draws.min_p[:, None] * weights.amax(dim=-1, keepdim=True)
    weights = weights.where(weights >= least, 0.0)
    top_k = torch.where(draws.top_k > 0, draws.top_k, vocab).clamp(max=vocab).int()
    weights = sampling.top_k_renorm_probs(weights, top_k)
    # Deterministic, or else it would depend on which block came first what a row keeps.
    # It reads the shares one after another, wherever a view's strides say that they lie.
    top_p = draws.top_p.contiguous()
    nucleus = sampling.top_p_renorm_probs(weights, top_p, is_deterministic=True)
    # Its sums are rounded: at 1 it could still drop the unlikeliest.
    return torch.where(draws.top_p[:, None] < 1, nucleus, weights)


def draw_reference(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """In float64, so that sums over a large vocabulary keep their small terms; (rows,) int64."""
    scaled = logits.double()
    scaled -= scaled.amax(dim=-1, keepdim=True)  # so that a tiny temperature gives no inf - inf
    weights = (scaled / draws.temperature[:, None]).softmax(dim=-1)
    filtered = (draws.top_k > 0) | (draws.top_p < 1) | (draws.min_p > 0)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    # Only filters need the order, and to sort takes far longer than all the rest.
    plain, sorted_ = (~filtered).nonzero()[:, 0], filtered.nonzero()[:, 0]
    tokens[plain] = _pick(weights[plain], draws.uniform[plain])
    descending, order = weights[sorted_].sort(dim=-1, descending=True, stable=True)
    own = Draws(*(each[sorted_] for each in draws))
    kept = torch.zeros_like(descending).scatter_(1, order, _filter(descending, own))
    tokens[sorted_] = _pick(kept, own.uniform)
    return tokens


def _filter(descending: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Zero what min-p, then top-k, then top-p of what is left rule out. (rows, vocab)."""
    vocab = descending.shape[-1]
    kept = descending.where(descending >= draws.min_p[:, None] * descending[:, :1], 0.0)
    top_k = torch.where(draws.top_k > 0, draws.top_k, vocab)
    kept = kept.where(torch.arange(vocab, device=kept.device) < top_k[:, None], 0.0)
    total = kept.sum(dim=-1, keepdim=True)
    before = kept.cumsum(dim=-1) - kept
    # The likeliest token has nothing before it and so always stays.
    return kept.where(before < draws.top_p[:, None] * total, 0.0)


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token of each row whose running sum passes uniform * total, never one of weight 0.

    First the block of tokens that has it, then the token: most of the sums are never needed.

    Args:
        weights: (rows, vocab), in float32 or float64.
        uniform: (rows,), of that dtype.
    """
    rows, vocab = weights.shape
    size = math.gcd(vocab, BLOCK)
    blocks = weights.view(rows, vocab // size, size)
    sums = blocks.sum(dim=-1)
    running = sums.cumsum(dim=-1)
    target = uniform * running[:, -1]
    block = _first_above(running.where(sums > 0, 0.0), target)
    at = torch.arange(rows, device=weights.device), block
    own = blocks[at]
    running = (running[at] - sums[at])[:, None] + own.cumsum(dim=-1)
    return block * size + _first_above(running.where(own > 0, 0.0), target)


def _first_above(running: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first place of each row that is above the row's target; there always is one.

    Said with comparisons, since sums of many terms in parallel are not sorted to the last bit.
    """
    most = running.amax(dim=-1)
    # Below the most, so that there is one that passes it.
    target = torch.minimum(target, most.nextafter(torch.zeros_like(most)))
    return (running > target[:, None]).byte().argmax(dim=-1)
