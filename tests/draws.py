"""What tokens are drawn by, from requests' parameters, and the distributions that this means."""

from collections.abc import Sequence

import numpy as np
import torch

from fi_runtime.engine.sampler import choose, draws_of, knobs_of
from fi_runtime.kernels.sampling import TokenSlots
from fi_runtime.messages import SamplingParams


def draws_for(rows: Sequence[SamplingParams], indices: Sequence[int]) -> torch.Tensor:
    """Of each row's parameters, for its output's token of that index: (5, rows)."""
    return draws_of(
        np.array([knobs_of(row) for row in rows]).T,
        np.array([row.seed for row in rows], dtype=np.uint64),
        np.array(indices, dtype=np.uint64),
    )


def drawn(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """A token of each row, (rows,), which must have gone to the row's slot, too."""
    rows = len(logits)
    slots = torch.arange(rows, device=logits.device).flip(0)
    last_tokens = torch.full((rows + 1,), -1, dtype=torch.int64, device=logits.device)
    tokens = choose(logits, draws, TokenSlots(last_tokens, slots))
    assert torch.equal(last_tokens[slots], tokens)
    assert last_tokens[-1] == -1
    return tokens


def distribution(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> np.ndarray:
    """Of logits, (vocab,): each token's probability by its definition, with lists and loops."""
    weights = np.exp(logits.double().numpy() / temperature)
    weights /= weights.sum()
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    order = [token for token in order if weights[token] >= min_p * weights.max()]
    kept = order[: top_k or len(order)]
    total = sum(weights[token] for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= top_p * total:
            break
        nucleus.append(token)
        mass += weights[token]
    result = np.zeros(len(weights))
    result[nucleus] = weights[nucleus] / mass
    return result


def assert_follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Counts by token, of independent draws. Tokens expected seldom are counted together."""
    expected = probabilities * counts.sum()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    seen, wanted = counts[common], expected[common]
    rest = expected[~common].sum()
    if rest >= 5:
        seen, wanted = np.append(seen, counts[~common].sum()), np.append(wanted, rest)
    degrees = len(seen) - 1
    # mean + 5 standard deviations of the chi-squared distribution; seeds are fixed
    assert ((seen - wanted) ** 2 / wanted).sum() <= degrees + 5 * np.sqrt(2 * degrees)
