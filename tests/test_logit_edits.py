"""Biases, bans and penalties against transformers' own processors, and against loops."""

import random

import msgspec
import pytest
import torch
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from fi_runtime.engine.logit_edits import edited
from fi_runtime.engine.sequence import Sequence
from fi_runtime.messages import SamplingParams

VOCAB = 40
PLAIN = SamplingParams(max_tokens=50, seed=0)


def sequence(
    prompt: list[int], output: list[int], end_ids: tuple[int, ...] = (), **values: object
) -> Sequence:
    params = msgspec.structs.replace(PLAIN, **values)
    made = Sequence((b"", 0), list(prompt), params, frozenset(end_ids))
    made.tokens.extend(output)
    return made


def random_logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)) * 4


def test_nothing_asked_for_costs_nothing() -> None:
    logits = random_logits(2)
    assert edited(logits, [sequence([1], []), sequence([2], [3])]) is logits


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_the_repetition_penalty_is_transformers(penalty: float) -> None:
    logits = random_logits(1)
    tokens = [5, 5, 9, 1], [9, 30, 2]
    found = edited(logits, [sequence(*tokens, repetition_penalty=penalty)])
    process = RepetitionPenaltyLogitsProcessor(penalty)
    expected = process(torch.tensor([tokens[0] + tokens[1]]), logits.clone())
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, logits)


@pytest.mark.parametrize("output", [[], [1], [1, 2], [7, 1, 2], [2, 1], [4, 4]])
def test_bad_tokens_are_banned_as_transformers_bans_them(output: list[int]) -> None:
    bad = [[3], [1, 2, 8], [2, 9], [4, 4, 4]]
    logits = random_logits(1)
    found = edited(logits, [sequence([6], output, bad_tokens=tuple(map(tuple, bad)))])
    process = NoBadWordsLogitsProcessor(bad)
    expected = process(torch.tensor([[6, *output]]), logits.clone())
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found[~found.isinf()], logits[~found.isinf()])


def test_bad_tokens_look_at_the_output_alone() -> None:
    found = edited(random_logits(1), [sequence([1], [2], bad_tokens=((1, 2, 8), (2, 9)))])
    assert found.isinf().nonzero()[:, 1].tolist() == [9]


def test_frequency_and_presence_count_the_output() -> None:
    logits = random_logits(1)
    output = [3, 3, 3, 7]
    found = edited(
        logits, [sequence([1, 3], output, frequency_penalty=0.5, presence_penalty=-1.25)]
    )
    for token in range(VOCAB):
        count = output.count(token)
        expected = logits[0, token].item() - 0.5 * count + 1.25 * (count > 0)
        assert found[0, token].item() == pytest.approx(expected, abs=1e-5)


def test_nothing_ends_a_sequence_before_its_min_tokens() -> None:
    for generated, banned in ((0, True), (3, True), (4, False)):
        one = sequence([1], [2] * generated, end_ids=(11, 12), min_tokens=4)
        found = edited(random_logits(1), [one])
        assert found[0, [11, 12]].isinf().all() == banned
        assert found.isinf().sum() == 2 * banned


def test_all_of_it_in_a_batch_row_by_row_in_vllms_order() -> None:
    rng = random.Random(3)
    sequences = [
        sequence(
            rng.choices(range(VOCAB), k=6),
            rng.choices(range(VOCAB), k=rng.randint(0, 9)),
            end_ids=(5,),
            repetition_penalty=rng.choice([1.0, 1.5]),
            frequency_penalty=rng.choice([0.0, 0.7]),
            presence_penalty=rng.choice([0.0, 0.4]),
            min_tokens=rng.choice([0, 5]),
            logit_bias=rng.choice([{}, {5: 3.0, 7: -100.0, 8: 1.5}]),
        )
        for _ in range(24)
    ]
    logits = random_logits(len(sequences))
    before = logits.clone()
    found = edited(logits, sequences)
    assert torch.equal(logits, before)
    for row, one in enumerate(sequences):
        params, output = one.params, one.tokens[one.prompt_length :]
        for token in range(VOCAB):
            value = logits[row, token].item() + params.logit_bias.get(token, 0.0)
            if token in one.end_ids and len(output) < params.min_tokens:
                value = float("-inf")
            if token in one.tokens:
                value *= params.repetition_penalty ** (1 if value < 0 else -1)
            count = output.count(token)
            value -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
            assert found[row, token].item() == pytest.approx(value, abs=1e-4)
