"""Drawing tokens from logits."""

from typing import NamedTuple

import torch

from fi_runtime.kernels.library import flashinfer

MIN_TEMPERATURE = 1e-5
"""Below it float32 logits could overflow; the likeliest token has all the weight long before."""


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


def choose(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """One token a row, drawn or, at temperature 0, the likeliest.

    Args:
        logits: (rows, vocab), float32.

    Returns:
        (rows,), int64.
    """
    likeliest = logits.argmax(dim=-1)
    if logits.is_cuda:
        return torch.where(draws.temperature > 0, _draw(logits, draws), likeliest)
    drawn = draws.temperature.nonzero()[:, 0]
    likeliest[drawn] = draw_reference(logits[drawn], Draws(*(each[drawn] for each in draws)))
    return likeliest


def _draw(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Of fixed shapes and without a look at any value, so that a CUDA graph can hold it."""
    sampling = flashinfer().sampling
    vocab = logits.shape[-1]
    temperature = draws.temperature.clamp(min=MIN_TEMPERATURE)
    weights = sampling.softmax(logits, temperature)
    least = draws.min_p[:, None] * weights.amax(dim=-1, keepdim=True)
    weights = weights.where(weights >= least, 0.0)
    top_k = torch.where(draws.top_k > 0, draws.top_k, vocab).clamp(max=vocab).int()
    weights = sampling.top_k_renorm_probs(weights, top_k)
    # Deterministic, or else it would depend on which block came first what a row keeps.
    # It reads the shares one after another, wherever a view's strides say that they lie.
    top_p = draws.top_p.contiguous()
    nucleus = sampling.top_p_renorm_probs(weights, top_p, is_deterministic=True)
    # Its sums are rounded: at 1 it could still drop the unlikeliest.
    weights = torch.where(draws.top_p[:, None] < 1, nucleus, weights)
    return _pick(weights, draws.uniform)


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

    Said with comparisons, since sums of many terms in parallel are not sorted to the last bit.

    Args:
        weights: (rows, vocab), in float32 or float64.
        uniform: (rows,), of that dtype.
    """
    running = weights.cumsum(dim=-1).where(weights > 0, 0.0)
    total = running.amax(dim=-1)
    # Below the total, so that there is one that passes it.
    target = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return (running > target[:, None]).byte().argmax(dim=-1)
