"""Sampled frequencies against exact distributions, and what a seed promises."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fi_runtime.engine.sampler import choose, logprobs, uniforms
from fi_runtime.messages import SamplingParams
from tests.draws import draws_for

VOCAB = 12
DRAWS = 20_000
LOGITS = torch.linspace(-2.0, 1.5, VOCAB)[
    torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))
]


def params(seed: int = 5, **values: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, seed=seed, **values)  # type: ignore[arg-type]


def sample(logits: torch.Tensor, rows: list[SamplingParams], indices: Sequence[int]) -> list[int]:
    return choose(logits, draws_for(rows, indices)).tolist()


def exact(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """The distribution by its definition, written with sets and loops."""
    weights = np.exp(LOGITS.double().numpy() / temperature)
    weights /= weights.sum()
    order = sorted(range(VOCAB), key=lambda token: -weights[token])
    order = [token for token in order if weights[token] >= min_p * weights.max()]
    kept = order[: top_k or VOCAB]
    total = sum(weights[token] for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= top_p * total:
            break
        nucleus.append(token)
        mass += weights[token]
    result = np.zeros(VOCAB)
    result[nucleus] = weights[nucleus] / mass
    return result


def test_the_draws_of_a_step_are_contiguous() -> None:
    """Kernels read a row of it with no regard to strides."""
    rows = [params(seed=i, top_p=0.5) for i in range(4)]
    draws = draws_for(rows, range(4))
    assert draws.float().is_contiguous()


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 500},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 5, "top_p": 0.7, "temperature": 1.7},
        {"min_p": 0.1, "top_k": 8, "top_p": 0.9, "temperature": 1.3},
    ],
)
def test_frequencies_follow_the_exact_distribution(knobs: dict[str, float]) -> None:
    tokens = sample(LOGITS.repeat(DRAWS, 1), [params(**knobs)] * DRAWS, range(DRAWS))
    counts = np.bincount(tokens, minlength=VOCAB)
    expected = exact(**knobs) * DRAWS  # type: ignore[arg-type]
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_squared = (((counts - expected) ** 2)[possible] / expected[possible]).sum()
    degrees = possible.sum() - 1
    # mean + 5 standard deviations of the chi-squared distribution; the seed is fixed
    assert chi_squared <= degrees + 5 * np.sqrt(2 * degrees)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 300, generator=rng) * 3
    kinds = [
        {"temperature": 0.0},
        {},
        {"top_k": 7},
        {"top_p": 0.8},
        {"temperature": 1e-4},
        {"top_k": 30, "top_p": 0.5},
        {"min_p": 0.1},
    ]
    rows = [params(seed=i * 1_000_003, **kinds[i % len(kinds)]) for i in range(40)]
    together = sample(logits, rows, range(40))
    alone = [sample(logits[i : i + 1], [rows[i]], [i])[0] for i in range(40)]
    assert together == alone


def test_zero_and_tiny_temperature_choose_the_likeliest() -> None:
    for temperature in (0.0, 1e-6, 1e-30):
        assert sample(LOGITS[None], [params(temperature=temperature)], [0]) == [
            int(LOGITS.argmax())
        ]


def test_uniforms_are_uniform_and_differ_by_seed_and_index() -> None:
    seeds = np.repeat(np.arange(100, dtype=np.uint64), 100)
    indices = np.tile(np.arange(100, dtype=np.uint64), 100)
    numbers = uniforms(seeds, indices)
    assert len(set(numbers)) == len(numbers)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 19 + 5 * np.sqrt(38)
    grid = numbers.reshape(100, 100)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.05


def test_logprobs_report_the_chosen_token_its_rank_and_the_likeliest() -> None:
    table = LOGITS.double().log_softmax(0)
    order = table.argsort(descending=True).tolist()
    rows = [params(), params(logprobs=0), params(logprobs=3)]
    chosen = [order[2]] * 3
    found = logprobs(LOGITS.repeat(3, 1), torch.tensor(chosen), rows)
    assert found is not None
    none, own, likeliest = found.wait(chosen)
    assert none is None
    assert own is not None
    assert likeliest is not None
    assert [(one.token, one.rank) for one in own] == [(order[2], 3)]
    assert [(one.token, one.rank) for one in likeliest] == [
        (order[2], 3),
        (order[0], 1),
        (order[1], 2),
        (order[2], 3),
    ]
    for one in likeliest:
        assert one.logprob == pytest.approx(table[one.token].item(), abs=1e-5)
