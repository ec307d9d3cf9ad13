"""Sampled frequencies against exact distributions, and what a seed promises."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fi_runtime.engine.sampler import keys, logprobs
from fi_runtime.kernels.sampling import log_times
from fi_runtime.messages import SamplingParams
from tests.draws import (
    PENALTIES,
    assert_follows,
    counts_of_one,
    distribution,
    distribution_of_one,
    drawn,
    draws_for,
)

VOCAB = 12
DRAWS = 20_000
LOGITS = torch.linspace(-2.0, 1.5, VOCAB)[
    torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))
]


def params(seed: int = 5, **values: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, seed=seed, **values)  # type: ignore[arg-type]


def sample(logits: torch.Tensor, rows: list[SamplingParams], indices: Sequence[int]) -> list[int]:
    return drawn(logits, draws_for(rows, indices)).tolist()


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
    assert_follows(np.bincount(tokens, minlength=VOCAB), distribution(LOGITS, **knobs))  # type: ignore[arg-type]


@pytest.mark.parametrize("knobs", PENALTIES)
def test_frequencies_after_penalties_follow_the_exact_distribution(
    knobs: dict[str, float],
) -> None:
    wanted, prompt, output = params(**knobs), [2, 5, 5, 9], [5, 0, 7, 7, 7]
    counts = counts_of_one(LOGITS, prompt, output, wanted, 8000)
    assert_follows(counts, distribution_of_one(LOGITS, prompt, output, wanted))
    # Whoever takes the prompt for output, or output for the prompt, fails.
    for others in ((prompt + output, []), ([], prompt + output)):
        if not np.allclose(
            distribution_of_one(LOGITS, *others, wanted),
            distribution_of_one(LOGITS, prompt, output, wanted),
        ):
            with pytest.raises(AssertionError):
                assert_follows(counts, distribution_of_one(LOGITS, *others, wanted))


@pytest.mark.parametrize(
    ("knobs", "left"),
    [
        ({"top_k": 1}, {1, 3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {0, 1, 3, 4}),
        ({"top_p": 0.3}, {1, 3}),
        ({"top_p": 0.7}, {1, 3}),
        ({"top_p": 0.8}, {0, 1, 3, 4}),
        ({"top_k": 3, "top_p": 0.75}, {1, 3}),
        ({"min_p": 0.2}, {0, 1, 3, 4}),
        ({"min_p": 0.3}, {1, 3}),
    ],
)
def test_tokens_that_are_as_likely_stay_or_go_together(
    knobs: dict[str, float], left: set[int]
) -> None:
    logits = torch.tensor([1.0, 4.0, 0.04, 4.0, 1.0]).log().repeat(400, 1)
    assert set(sample(logits, [params(**knobs)] * 400, range(400))) == left


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


def test_times_are_exponential_and_differ_by_seed_index_and_token() -> None:
    seeds = np.repeat(np.arange(20, dtype=np.uint64), 20)
    indices = np.tile(np.arange(20, dtype=np.uint64), 20)
    own = keys(seeds, indices)
    assert len(set(own)) == len(own)
    times = log_times(torch.from_numpy(own.view(np.int64)), 500).exp().numpy()
    assert (times > 0).all()
    shares = 1 - np.exp(-times)  # uniform
    assert_follows(np.histogram(shares, bins=50, range=(0, 1))[0], np.full(50, 1 / 50))
    smallest = shares.min(axis=1) * 500  # nearly exponential, since many race
    assert abs(smallest.mean() - 1) < 0.2
    cube = shares.reshape(20, 20, 500)
    for axis in range(3):
        first, second = np.delete(cube, -1, axis), np.delete(cube, 0, axis)
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.012


def test_logprobs_report_the_chosen_token_its_rank_and_the_likeliest() -> None:
    table = LOGITS.double().log_softmax(0)
    order = table.argsort(descending=True).tolist()
    chosen = [order[2]] * 3
    found = logprobs(LOGITS.repeat(3, 1), torch.tensor(chosen), {1: 0, 2: 3})
    assert found is not None
    told = found.wait(np.array(chosen))
    assert told.keys() == {1, 2}
    own, likeliest = told[1], told[2]
    assert [(one.token, one.rank) for one in own] == [(order[2], 3)]
    assert [(one.token, one.rank) for one in likeliest] == [
        (order[2], 3),
        (order[0], 1),
        (order[1], 2),
        (order[2], 3),
    ]
    for one in likeliest:
        assert one.logprob == pytest.approx(table[one.token].item(), abs=1e-5)
