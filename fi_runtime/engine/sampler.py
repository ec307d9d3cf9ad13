"""Chooses the next tokens from logits."""

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch

from fi_runtime.messages import SamplingParams, TokenLogprob


def sample(logits: torch.Tensor, params: Seq[SamplingParams], indices: Seq[int]) -> list[int]:
    """Choose one token a row.

    What a row gets depends on its own logits, parameters and index alone, never on the rows
    beside it: the random number is a hash of seed and index, and rows of a kind are computed in
    the same way wherever they stand.

    Args:
        logits: (rows, vocab), float32.
        params: of each row's sequence.
        indices: of the token in each row's output, 0 for the first.
    """
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    plain = [row for row in drawn if not _is_filtered(params[row])]
    filtered = [row for row in drawn if _is_filtered(params[row])]
    if plain:
        probabilities = _probabilities(logits, params, plain)
        chosen[plain] = _draw(probabilities, _uniforms_of(params, indices, plain)).to(chosen.device)
    if filtered:
        probabilities, tokens = _probabilities(logits, params, filtered).sort(
            dim=-1, descending=True, stable=True
        )
        _zero_filtered(probabilities, [params[row] for row in filtered])
        places = _draw(probabilities, _uniforms_of(params, indices, filtered))
        chosen[filtered] = tokens.gather(1, places[:, None])[:, 0]
    return chosen.tolist()


def logprobs(
    logits: torch.Tensor, tokens: Seq[int], params: Seq[SamplingParams]
) -> list[list[TokenLogprob] | None]:
    """Each row's chosen token and its likeliest ones, as many as asked for; None where none were.

    Args:
        logits: (rows, vocab), float32, as the model gave them.
        tokens: the chosen token of each row.
    """
    result: list[list[TokenLogprob] | None] = [None] * len(tokens)
    rows = [row for row, p in enumerate(params) if p.logprobs is not None]
    if not rows:
        return result
    table = logits[rows].log_softmax(dim=-1)
    own = table.gather(1, torch.tensor([[tokens[row]] for row in rows], device=table.device))
    ranks = (table > own).sum(dim=-1) + 1
    # the schema bounds params.logprobs, not the vocabulary
    most = min(max(params[row].logprobs or 0 for row in rows), table.shape[-1])
    values, ids = table.topk(most, dim=-1)
    for at, row in enumerate(rows):
        likeliest = zip(ids[at].tolist(), values[at].tolist(), range(1, most + 1), strict=True)
        result[row] = [
            TokenLogprob(tokens[row], own[at].item(), int(ranks[at])),
            *(TokenLogprob(*one) for one in list(likeliest)[: params[row].logprobs]),
        ]
    return result


def uniforms(seeds: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint64]) -> torch.Tensor:
    """Random numbers in [0, 1), float64, one for each pair of seed and index.

    SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014) over the seed's hash plus the index times the golden gamma.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        mixed = _mix(_mix(seeds) + (indices + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _uniforms_of(params: Seq[SamplingParams], indices: Seq[int], rows: list[int]) -> torch.Tensor:
    return uniforms(
        np.array([params[row].seed for row in rows], dtype=np.uint64),
        np.array([indices[row] for row in rows], dtype=np.uint64),
    )


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _probabilities(
    logits: torch.Tensor, params: Seq[SamplingParams], rows: list[int]
) -> torch.Tensor:
    """(rows, vocab), float64 so that sums over a large vocabulary keep their small terms."""
    temperatures = torch.tensor([params[row].temperature for row in rows], dtype=torch.float64)
    scaled = logits[rows].double()
    scaled -= scaled.amax(dim=-1, keepdim=True)  # so that a tiny temperature gives no inf - inf
    return (scaled / temperatures.to(logits.device)[:, None]).softmax(dim=-1)


def _zero_filtered(descending: torch.Tensor, params: list[SamplingParams]) -> None:
    """Zero what top-k, and then top-p of what is left, rule out. (rows, vocab), in place."""
    vocab = descending.shape[-1]
    device = descending.device
    top_k = torch.tensor([[p.top_k or vocab] for p in params], device=device)
    top_p = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=device)
    descending[torch.arange(vocab, device=device) >= top_k] = 0.0
    total = descending.sum(dim=-1, keepdim=True)
    before = descending.cumsum(dim=-1) - descending
    # The likeliest token has nothing before it and so always stays.
    descending[before >= top_p * total] = 0.0


def _draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The place in each row where the running sum of weights passes uniform * their total."""
    running = weights.cumsum(dim=-1)
    target = uniform.to(weights.device)[:, None] * running[:, -1:]
    return torch.searchsorted(running, target, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)
