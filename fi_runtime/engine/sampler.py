"""Chooses the next tokens from logits."""

import numpy as np
import numpy.typing as npt
import torch

from fi_runtime.engine.download import Download
from fi_runtime.kernels import sampling
from fi_runtime.messages import SamplingParams, TokenLogprob
from fi_runtime.upload import upload

Float64s = npt.NDArray[np.float64]


def knobs_of(params: SamplingParams) -> tuple[float, float, float, float]:
    """Temperature, top_k, top_p and min_p, as ``Draws`` orders them."""
    return params.temperature, params.top_k, params.top_p, params.min_p


def streams_of(seeds: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """What of ``keys`` is the same for all of a sequence's tokens: (rows,)."""
    return _mix(seeds)


def draws_of(
    knobs: Float64s, streams: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint64]
) -> torch.Tensor:
    """The table of ``Draws.of``: (5, rows), float64, on the host.

    What a row gets depends on its own logits, parameters and index alone, never on the rows
    beside it: its key is a hash of its seed and index.

    Args:
        knobs: (4, rows), a column of ``knobs_of`` for each.
        streams: (rows,), of ``streams_of``.
        indices: (rows,), of the token in each row's output, 0 for the first.
    """
    draws = np.empty((5, len(streams)))
    draws[:4], draws[4] = knobs, keys(streams, indices).view(np.float64)
    return torch.from_numpy(draws)


def filters(draws: torch.Tensor) -> bool:
    """Whether any row of ``draws_of``'s has a top_k, top_p or min_p."""
    _, top_k, top_p, min_p, _ = draws.numpy()
    return bool(top_k.any() or (top_p < 1).any() or min_p.any())


def choose(logits: torch.Tensor, draws: torch.Tensor, slots: sampling.TokenSlots) -> torch.Tensor:
    """One token a row, which goes to its slot too: (rows,), int64, on the device of the logits.

    Args:
        logits: (rows, vocab), floating point.
        draws: of ``draws_of``.
    """
    there = sampling.Draws.of(upload(draws, logits.device))
    scratch = sampling.scratch_for(len(logits), logits.device)
    return sampling.choose(logits, there, slots, filters(draws), scratch)


class Logprobs:
    """Of each row's chosen token and its likeliest ones, on their way from the device."""

    def __init__(
        self, logits: torch.Tensor, chosen: torch.Tensor, rows: list[int], counts: list[int]
    ) -> None:
        self._rows, self._counts = rows, counts
        there = upload(np.array(rows, dtype=np.int64), logits.device)
        table = logits[there].float().log_softmax(dim=-1)
        own = table.gather(1, chosen[there][:, None])
        ranks = (table > own).sum(dim=-1) + 1
        # the schema bounds params.logprobs, not the vocabulary
        values, ids = table.topk(min(max(counts), table.shape[-1]), dim=-1)
        self._own, self._ranks = Download(own[:, 0]), Download(ranks)
        self._values, self._ids = Download(values), Download(ids)

    def wait(self, tokens: npt.NDArray[np.int64]) -> dict[int, list[TokenLogprob]]:
        """Each row's chosen token, then its likeliest ones; of rows that ask for them."""
        result = {}
        parts = (self._own, self._ranks, self._values, self._ids)
        columns = (part.wait().tolist() for part in parts)
        for row, count, own, rank, values, ids in zip(
            self._rows, self._counts, *columns, strict=True
        ):
            likeliest = zip(ids, values, range(1, len(ids) + 1), strict=True)
            result[row] = [
                TokenLogprob(int(tokens[row]), own, rank),
                *(TokenLogprob(*one) for one in list(likeliest)[:count]),
            ]
        return result


def logprobs(logits: torch.Tensor, chosen: torch.Tensor, counts: dict[int, int]) -> Logprobs | None:
    """What rows ask to be told of their tokens' probabilities; None if nothing.

    Args:
        logits: (rows, vocab), as the model gave them.
        chosen: (rows,), int64: the token of each row.
        counts: of the likeliest tokens, by row, for rows that ask for their own and those.
    """
    if not counts:
        return None
    return Logprobs(logits, chosen, [*counts], [*counts.values()])


def keys(
    streams: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Random bits, 64 for each pair of a seed, of ``streams_of``, and an index.

    SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014) over the seed's hash plus the index times the golden gamma.
    """
    # Modulo 2^64, of which numpy says nothing where they are arrays.
    return _mix(streams + (indices + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
