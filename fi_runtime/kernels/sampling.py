"""Drawing tokens from logits.

Each token runs a race: its time is exponential with its weight as the rate, so that it comes first
with a probability of its share of all weights. The first is the token of the greatest
logit / temperature - log(e), with e exponential of rate 1: no sum over the vocabulary is needed.
"""

from typing import NamedTuple

import torch

from fi_runtime.kernels.own import own

WORD = (1 << 32) - 1


class Draws(NamedTuple):
    """How each row is drawn: (rows,) each, on the device of the logits.

    In this order: divide by the temperature; keep tokens of at least ``min_p`` times the
    likeliest one's probability; of those the ``top_k`` likeliest; of those the likeliest that
    together have ``top_p`` of what is left; then the first in a race of the ``key``. Tokens as
    likely as the last that is kept are kept, too.
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


class TokenSlots(NamedTuple):
    """Where tokens go, for steps that begin before the host knows them."""

    last_tokens: torch.Tensor
    """(slots,), int64: the token chosen last in each"""
    own: torch.Tensor
    """(rows,), int64: each row's"""


def scratch_for(rows: int, device: torch.device) -> torch.Tensor:
    """What drawing without filters works in; it leaves it as it was."""
    return torch.zeros((2, rows), dtype=torch.int64, device=device)


def choose(
    logits: torch.Tensor, draws: Draws, slots: TokenSlots, filtered: bool, scratch: torch.Tensor
) -> torch.Tensor:
    """One token a row, drawn or, at temperature 0, the likeliest; it goes to the row's slot too.

    Of fixed shapes on a GPU and without a look at any value, so that a CUDA graph can hold it.

    Args:
        logits: (rows, vocab), floating point.
        filtered: whether any row has a top_k, top_p or min_p, which take more looks at its logits.
        scratch: of ``scratch_for``, of as many rows at least.

    Returns:
        (rows,), int64.
    """
    if not logits.is_cuda:
        tokens = choose_reference(logits, draws)
        slots.last_tokens[slots.own] = tokens
        return tokens
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if filtered:
        own().draw_filtered_tokens(logits, *draws, slots.own, slots.last_tokens, tokens)
    else:
        own().race_tokens(
            logits, draws.temperature, draws.key, slots.own, slots.last_tokens, tokens, scratch
        )
    return tokens


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
    """What is left of min-p, then top-k, then top-p of what is left. (rows, vocab), bool.

    Tokens of equal weights stay or go together.
    """
    vocab = weights.shape[-1]
    descending, order = weights.sort(dim=-1, descending=True, stable=True)
    top_k = torch.where(draws.top_k > 0, draws.top_k, vocab).clamp(max=vocab).long()
    least = torch.maximum(
        draws.min_p[:, None] * descending[:, :1], descending.gather(1, top_k[:, None] - 1)
    )
    left = descending.where(descending >= least, 0.0)
    # What the heavier tokens have together: all before the first of equal weight.
    before = left.cumsum(dim=-1) - left
    first = torch.ones_like(left, dtype=torch.bool)
    first[:, 1:] = left[:, 1:] < left[:, :-1]
    heavier = before.where(first, 0.0).cummax(dim=-1).values
    # The likeliest token has nothing before it and so always stays.
    nucleus = heavier < draws.top_p[:, None] * left.sum(dim=-1, keepdim=True)
    nucleus |= draws.top_p[:, None] >= 1
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
