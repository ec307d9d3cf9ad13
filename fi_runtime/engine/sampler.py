"""Chooses the next tokens from logits."""

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch

from fi_runtime.kernels import sampling
from fi_runtime.messages import SamplingParams, TokenLogprob
from fi_runtime.upload import upload


def draws_of(params: Seq[SamplingParams], indices: Seq[int]) -> torch.Tensor | None:
    """What ``Draws`` holds, row by row: (5, rows), float64, on the host; None if all are greedy.

    What a row gets depends on its own logits, parameters and index alone, never on the rows
    beside it: its random number is a hash of its seed and index.

    Args:
        params: of each row's sequence.
        indices: of the token in each row's output, 0 for the first.
    """
    if all(p.temperature == 0 for p in params):
        return None
    table = np.array([(p.temperature, p.top_k, p.top_p, p.min_p) for p in params]).T
    seeds = np.array([p.seed for p in params], dtype=np.uint64)
    random = uniforms(seeds, np.array(indices, dtype=np.uint64))
    return torch.from_numpy(np.ascontiguousarray(np.concatenate((table, random[None]))))


def choose(logits: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
    """One token a row: (rows,), int64, on the device of the logits.

    Args:
        logits: (rows, vocab), float32.
        draws: of ``draws_of``.
    """
    if draws is None:
        return logits.argmax(dim=-1)
    there = upload(draws.float() if logits.is_cuda else draws, logits.device)
    return sampling.choose(logits, sampling.Draws(*there))


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


def uniforms(
    seeds: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1), one for each pair of seed and index.

    SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014) over the seed's hash plus the index times the golden gamma.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        mixed = _mix(_mix(seeds) + (indices + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
