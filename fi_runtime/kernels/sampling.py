"""Drawing tokens from logits.

Each token runs a race: its time is exponential with its weight as the rate, so that it comes first
with a probability of its share of all weights. The first is the token of the greatest
logit / temperature - log(e), with e exponential of rate 1: no sum over the vocabulary is needed.
"""

from typing import NamedTuple

import torch

from fi_runtime.kernels.library import flashinfer
from fi_runtime.kernels.own import own

MIN_TEMPERATURE = 1e-5
"""Below it float32 logits could overflow; the likeliest token has all the weight long before."""
WORD = (1 << 32) - 1


class Draws(NamedTuple):
    """How each row is drawn: (rows,) each, on the device of the logits.

    In this order: divide by the temperature; keep tokens of at least ``min_p`` times the
    likeliest one's probability; of those the ``top_k`` likeliest; of those the likeliest that
    together have ``top_p`` of what is left; then the first in a race of the ``key``.
    """

    temperature: torch.Tensor
    """float64; 0: the likeliest token"""
    top_k: torch.Tensor
    """float64; 0: all tokens"""
    top_p: torch.Tensor
    """float64; 1: all tokens"""
    min_p: torch.Tensor
    """float64; 0: all tokens"""
    key: torch.Tensor
    """int64: its bits and the token's number say how long the token takes"""

    @classmethod
    def of(cls, table: torch.Tensor) -> "Draws":
        """From a table of (5, rows), float64, whose last row holds the bits of the keys."""
        temperature, top_k, top_p, min_p, key = table
        return cls(temperature, top_k, top_p, min_p, key.view(torch.int64))

    def filtered(self) -> torch.Tensor:
        """Which rows have a top_k, top_p or min_p: (rows,), bool."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)


class Slots(NamedTuple):
    """Where tokens go, for steps that begin before the host knows them."""

    last_tokens: torch.Tensor
    """(slots,), int64: the token chosen last in each"""
    own: torch.Tensor
    """(rows,), int64: each row's"""


def scratch_for(rows: int, device: torch.device) -> torch.Tensor:
    """What ``race`` works in; it leaves it as it was."""
    return torch.zeros((2, rows), dtype=torch.int64, device=device)


def choose(
    logits: torch.Tensor, draws: Draws, slots: Slots, filtered: bool, scratch: torch.Tensor
) -> torch.Tensor:
    """One token a row, drawn or, at temperature 0, the likeliest; it goes to the row's slot too.

    Of fixed shapes on a GPU and without a look at any value, so that a CUDA graph can hold it.

    Args:
        logits: (rows, vocab), floating point.
        filtered: whether any row has a top_k, top_p or min_p; to look takes longer than to draw.
        scratch: of ``scratch_for``, of as many rows at least.

    Returns:
        (rows,), int64.
    """
    if not logits.is_cuda:
        tokens = choose_reference(logits, draws)
        slots.last_tokens[slots.own] = tokens
        return tokens
    temperature = draws.temperature
    if filtered:
        clamped = temperature.clamp(min=MIN_TEMPERATURE).float()
        weights = flashinfer().sampling.softmax(logits.float(), clamped)
        logits = _keep(weights, draws).log_()
        # They are divided already; rows of temperature 0 still want the likeliest.
        temperature = temperature.ceil().clamp(max=1.0)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    own().race_tokens(logits, temperature, draws.key, slots.own, slots.last_tokens, tokens, scratch)
    return tokens


def _keep(weights: torch.Tensor, draws: Draws) -> torch.Tensor:
    """As ``_filter``, of weights in any order. (rows, vocab)."""
    sampling = flashinfer().sampling
    vocab = weights.shape[-1]
    least = draws.min_p.float()[:, None] * weights.amax(dim=-1, keepdim=True)
    weights = weights.where(weights >= least, 0.0)
    top_k = torch.where(draws.top_k > 0, draws.top_k, vocab).clamp(max=vocab).int()
    weights = sampling.top_k_renorm_probs(weights, top_k)
    # Deterministic, or else it would depend on which block came first what a row keeps.
    # It reads the shares one after another, wherever a view's strides say that they lie.
    top_p = draws.top_p.float().contiguous()
    nucleus = sampling.top_p_renorm_probs(weights, top_p, is_deterministic=True)
    # Its sums are rounded: at 1 it could still drop the unlikeliest.
    return torch.where(draws.top_p[:, None] < 1, nucleus, weights)


def choose_reference(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """``choose`` in plain torch and float64: (rows,), int64."""
    tokens = logits.argmax(dim=-1)
    drawn = draws.temperature.nonzero()[:, 0]
    if not len(drawn):
        return tokens
    own = Draws(*(each[drawn] for each in draws))
    wide = logits[drawn].double()
    wide -= wide.amax(dim=-1, keepdim=True)  # so that a tiny temperature gives no inf - inf
    scaled = wide / own.temperature[:, None]
    # Only filters need the order, and to sort takes far longer than all the rest.
    filtered = own.filtered().nonzero()[:, 0]
    if len(filtered):
        kept = _filter(scaled[filtered].softmax(dim=-1), Draws(*(each[filtered] for each in own)))
        scaled[filtered] = scaled[filtered].where(kept, float("-inf"))
    tokens[drawn] = (scaled - log_times(own.key, logits.shape[-1])).argmax(dim=-1)
    return tokens


def _filter(weights: torch.Tensor, draws: Draws) -> torch.Tensor:
    """What is left of min-p, then top-k, then top-p of what is left. (rows, vocab), bool."""
    vocab = weights.shape[-1]
    descending, order = weights.sort(dim=-1, descending=True, stable=True)
    left = descending.where(descending >= draws.min_p[:, None] * descending[:, :1], 0.0)
    top_k = torch.where(draws.top_k > 0, draws.top_k, vocab)
    left = left.where(torch.arange(vocab, device=left.device) < top_k[:, None], 0.0)
    total = left.sum(dim=-1, keepdim=True)
    before = left.cumsum(dim=-1) - left
    # The likeliest token has nothing before it and so always stays.
    nucleus = (before < draws.top_p[:, None] * total) | (draws.top_p[:, None] >= 1)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, nucleus & (left > 0))


def log_times(keys: torch.Tensor, vocab: int) -> torch.Tensor:
    """The logarithm of each token's time in a race of equal weights: (rows, vocab), float64.

    Args:
        keys: (rows,), int64.
    """
    low, high = keys & WORD, keys >> 32 & WORD
    tokens = torch.arange(vocab, device=keys.device)
    shares = _mix(_mix(tokens ^ low[:, None]) ^ high[:, None]).double()
    return (-torch.log1p(-(shares + 0.5) * 2.0**-32)).log()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A permutation of 32-bit numbers (Wellons, "Prospecting for Hash Functions", 2018)."""
    x = (x ^ x >> 16) * 0x7FEB352D & WORD
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    return x ^ x >> 16
