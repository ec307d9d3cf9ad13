"""What tokens are drawn by, from requests' parameters, and the distributions that this means."""

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from fi_runtime.engine.core import Engine
from fi_runtime.engine.logit_edits import edited
from fi_runtime.engine.sampler import choose, draws_of, knobs_of, streams_of
from fi_runtime.engine.sequence import Sequence as Running
from fi_runtime.kernels.sampling import TokenSlots
from fi_runtime.messages import SamplingParams

PENALTIES: list[dict[str, float]] = [
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.7},
    {"temperature": 0.7, "presence_penalty": -1.0, "frequency_penalty": 0.6, "top_p": 0.9},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.8, "top_k": 6, "min_p": 0.02},
]


def draws_for(rows: Sequence[SamplingParams], indices: Sequence[int]) -> torch.Tensor:
    """Of each row's parameters, for its output's token of that index: (5, rows)."""
    return draws_of(
        np.array([knobs_of(row) for row in rows]).T,
        streams_of(np.array([row.seed for row in rows], dtype=np.uint64)),
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


def penalised(
    logits: torch.Tensor, prompt: list[int], output: list[int], params: SamplingParams
) -> torch.Tensor:
    """Of logits, (vocab,): what they are after the penalties, by their definition."""
    result = logits.double().clone()
    for token in set(prompt + output):
        penalty = params.repetition_penalty
        result[token] *= 1 / penalty if result[token] > 0 else penalty
    for token in output:
        result[token] -= params.frequency_penalty
    for token in set(output):
        result[token] -= params.presence_penalty
    return result


def counts_of_one(
    logits: torch.Tensor, prompt: list[int], output: list[int], params: SamplingParams, rows: int
) -> np.ndarray:
    """How often each token is drawn after the same prompt and output, for so many indices."""
    one = Running((b"", 0), list(prompt), params)
    one.tokens.extend(output)
    changed = edited(logits.repeat(rows, 1), [one] * rows)
    tokens = drawn(changed, draws_for([params] * rows, range(rows)))
    return tokens.bincount(minlength=logits.shape[-1]).cpu().numpy()


def distribution_of_one(
    logits: torch.Tensor, prompt: list[int], output: list[int], params: SamplingParams
) -> np.ndarray:
    """What those follow: (vocab,)."""
    temperature, top_k, top_p, min_p = knobs_of(params)
    after = penalised(logits.cpu(), prompt, output, params)
    return distribution(after, temperature, int(top_k), top_p, min_p)


def counts_of_pairs(
    engine: Engine, prompt: list[int], params: SamplingParams, times: int
) -> np.ndarray:
    """How often two tokens after the prompt are drawn, by seeds from 0: (vocab, vocab)."""
    vocab = engine.model_config.vocab_size
    counts = np.zeros((vocab, vocab))
    seeded = [msgspec.structs.replace(params, max_tokens=2, seed=seed) for seed in range(times)]
    for result in engine.generate([prompt] * times, seeded):
        first, second = result.tokens
        counts[first, second] += 1
    return counts


def distribution_of_pairs(
    model: PreTrainedModel, prompt: list[int], params: SamplingParams
) -> np.ndarray:
    """What those follow: (vocab, vocab)."""

    def logits_after(rows: list[list[int]]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor(rows, device=model.device)).logits[:, -1].float().cpu()

    first = distribution_of_one(logits_after([prompt])[0], prompt, [], params)
    result = np.zeros((len(first), len(first)))
    likely = first.nonzero()[0].tolist()
    each = logits_after([[*prompt, token] for token in likely])
    for token, logits in zip(likely, each, strict=True):
        result[token] = first[token] * distribution_of_one(logits, prompt, [token], params)
    return result


def assert_follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Counts, of independent draws, in the shape of their probabilities.

    What is expected seldom is counted together.
    """
    counts, probabilities = counts.ravel(), probabilities.ravel()
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


def assert_pairs_follow(engine: Engine, model: PreTrainedModel, knobs: dict[str, float]) -> None:
    """Two tokens drawn after a prompt follow the distribution of the model and those knobs.

    And not the one that there is without the knobs.
    """
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    params, plain = (
        SamplingParams(max_tokens=2, seed=0, **each)  # type: ignore[arg-type]
        for each in (knobs, {})
    )
    counts = counts_of_pairs(engine, prompt, params, 3000)
    assert_follows(counts, distribution_of_pairs(model, prompt, params))
    without = distribution_of_pairs(model, prompt, plain)
    with pytest.raises(AssertionError):
        assert_follows(counts, without)
