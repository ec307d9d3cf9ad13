"""How sequences end, what is refused, and that pages come back."""

import random
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.families import VOCAB, write
from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.engine.core import BadRequest, Engine
from fi_runtime.engine.runner import Runner
from fi_runtime.messages import SamplingParams
from tests.draws import assert_pairs_follow
from tests.serving import byte_tokenizer, write_checkpoint

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, seed=0)
SEEDED = SamplingParams(max_tokens=20, temperature=1.0, seed=99, top_p=0.95)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model: PreTrainedModel = write("llama 3.1", folder)
    assert model.config.eos_token_id is None
    return folder


def engine(checkpoint: Path, **knobs: object) -> Engine:
    return Engine(EngineConfig(checkpoint=str(checkpoint), cache_tokens=4096, **knobs))  # type: ignore[arg-type]


def test_a_stop_token_ends_the_sequence_and_is_its_last_token(checkpoint: Path) -> None:
    plain = engine(checkpoint).generate([PROMPT], GREEDY)[0]
    assert (len(plain.tokens), plain.finish) == (20, "length")
    stop = plain.tokens[7]
    expected = plain.tokens[: plain.tokens.index(stop) + 1]
    params = msgspec.structs.replace(GREEDY, stop_token_ids=(stop,))
    stopped = engine(checkpoint).generate([PROMPT], params)[0]
    assert (stopped.tokens, stopped.finish) == (expected, "stop")


def test_the_checkpoints_own_end_token_ends_it_unless_ignored(
    checkpoint: Path, tmp_path: Path
) -> None:
    plain = engine(checkpoint).generate([PROMPT], GREEDY)[0]
    eos = plain.tokens[7]
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{VOCAB - 1}, {eos}]}}')
    ended = engine(tmp_path).generate([PROMPT], GREEDY)[0]
    assert ended.tokens == plain.tokens[: plain.tokens.index(eos) + 1]
    assert ended.finish == "stop"
    for without in ({"ignore_eos": True}, {"end_ids": ()}):
        params = msgspec.structs.replace(GREEDY, **without)
        assert engine(tmp_path).generate([PROMPT], params)[0] == plain


@pytest.mark.parametrize("count", [0, 7, 8, 40])
def test_each_of_however_many_stop_tokens_ends_it(checkpoint: Path, count: int) -> None:
    running = engine(checkpoint)
    plain = running.generate([PROMPT], GREEDY)[0].tokens
    others = [token for token in range(199) if token not in plain][:count]
    for stop in dict.fromkeys(plain):
        params = msgspec.structs.replace(GREEDY, stop_token_ids=(*others, stop))
        results = running.generate([PROMPT] * 2, [params, GREEDY])
        assert (results[0].tokens, results[0].finish) == (plain[: plain.index(stop) + 1], "stop")
        assert results[1].tokens == plain


def test_no_end_before_min_tokens(checkpoint: Path) -> None:
    plain = engine(checkpoint).generate([PROMPT], GREEDY)[0].tokens
    params = msgspec.structs.replace(GREEDY, end_ids=(plain[3],), min_tokens=10)
    tokens = engine(checkpoint).generate([PROMPT], params)[0].tokens
    assert plain[3] not in tokens[:10]
    assert len(tokens) >= 10
    ended = engine(checkpoint).generate([PROMPT], msgspec.structs.replace(params, min_tokens=0))[0]
    assert (ended.tokens, ended.finish) == (plain[: plain.index(plain[3]) + 1], "stop")


def test_biases_force_and_forbid_tokens_and_leave_logprobs_alone(checkpoint: Path) -> None:
    plain = engine(checkpoint).generate([PROMPT], GREEDY)[0]
    params = msgspec.structs.replace(GREEDY, logit_bias={7: 100.0}, logprobs=0)
    forced = engine(checkpoint).generate([PROMPT], params)[0]
    assert forced.tokens == [7] * 20
    assert max(forced.logprobs) < -0.1, "as the model gave them, before the bias"
    params = msgspec.structs.replace(GREEDY, bad_tokens=((plain.tokens[0],),))
    assert plain.tokens[0] not in engine(checkpoint).generate([PROMPT], params)[0].tokens


def test_edits_of_one_sequence_are_not_its_neighbours(checkpoint: Path) -> None:
    alone = engine(checkpoint).generate([PROMPT], GREEDY)[0]
    other = msgspec.structs.replace(
        GREEDY, repetition_penalty=1.8, frequency_penalty=1.0, logit_bias={3: 5.0}
    )
    results = engine(checkpoint).generate([PROMPT] * 3, [other, GREEDY, other])
    assert results[1] == alone
    assert results[0] == results[2] != alone


@pytest.mark.parametrize(
    "knobs",
    [
        {"top_p": 0.95},
        {"temperature": 0.7, "top_k": 20, "min_p": 0.01},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    ],
)
def test_a_seed_gives_the_same_tokens_alone_batched_and_preempted(
    knobs: dict[str, float], checkpoint: Path
) -> None:
    seeded = SamplingParams(max_tokens=20, seed=99, **knobs)  # type: ignore[arg-type]
    alone = engine(checkpoint).generate([PROMPT], seeded)[0]
    others = [msgspec.structs.replace(SEEDED, seed=seed) for seed in range(11)]
    batch = engine(checkpoint).generate([PROMPT] * 12, [*others, seeded])
    assert batch[-1] == alone
    assert len({tuple(result.tokens) for result in batch}) > 6, "seeds make no difference"
    tight = Engine(
        EngineConfig(checkpoint=str(checkpoint), cache_tokens=48, page_size=4, max_context=40)
    )
    assert tight.generate([PROMPT] * 12, [*others, seeded])[-1] == alone
    assert tight.scheduler.num_preemptions > 0


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 0.6},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 0.4},
        {"presence_penalty": -2.0},
        {"frequency_penalty": -2.0, "top_k": 30},
    ],
)
def test_tokens_in_a_row_follow_the_exact_distribution(
    knobs: dict[str, float], checkpoint: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert_pairs_follow(engine(checkpoint), model, knobs)


def test_aborted_sequences_give_their_pages_back(checkpoint: Path) -> None:
    running = engine(checkpoint, max_sequences=4)
    for number in range(8):
        running.add((b"a", number), PROMPT, GREEDY)
    for _ in range(3):
        running.step()
    assert running.tree.free < running.tree.usable
    assert all(running.abort(key) for key in running.keys_of(b"a"))
    assert running.tree.free == running.tree.usable
    assert not running.busy
    assert not running.abort((b"a", 0)), "it has ended already"


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], GREEDY, "the prompt is empty"),
        ([1, VOCAB], GREEDY, f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        (
            [1],
            msgspec.structs.replace(GREEDY, logit_bias={VOCAB + 1: 1.0}),
            f"token id {VOCAB + 1} is outside the vocabulary of {VOCAB}",
        ),
        (
            [1],
            msgspec.structs.replace(GREEDY, stop_token_ids=(10**6,), min_tokens=2),
            f"token id {10**6} is outside the vocabulary of {VOCAB}",
        ),
        ([1] * 500, GREEDY, "500 prompt tokens and max_tokens=20 .* context of 512 tokens"),
    ],
)
def test_what_cannot_run_is_refused_and_costs_nothing(
    checkpoint: Path, prompt: list[int], params: SamplingParams, words: str
) -> None:
    refusing = engine(checkpoint)
    with pytest.raises(BadRequest, match=words):
        refusing.add((b"a", 1), prompt, params)
    assert not refusing.busy
    assert refusing.tree.free == refusing.tree.usable


def test_a_step_that_fails_ends_its_sequences_and_not_the_engine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(checkpoint)
    expected = running.generate([PROMPT], GREEDY)
    running.add((b"a", 1), PROMPT, GREEDY)
    running.add((b"a", 2), PROMPT, GREEDY)

    def broken(self: Runner, chunks: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "launch", broken)
        outputs = dict(running.step())
    assert {key: output.finish for key, output in outputs.items()} == {
        (b"a", 1): "failed",
        (b"a", 2): "failed",
    }
    assert all("out of luck" in output.error for output in outputs.values())
    assert not running.busy
    assert running.tree.free == running.tree.usable
    assert running.generate([PROMPT], GREEDY) == expected


DIGITS = LLMatcher.grammar_from_regex("[0-9]+")
END = 0
"""a byte that no digit is"""


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer and an end."""
    folder = tmp_path_factory.mktemp("guided")
    write_checkpoint(folder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {END}}}')
    return folder


@pytest.fixture(scope="module")
def guided_engine(guided: Path) -> Engine:
    config = EngineConfig(checkpoint=str(guided), cache_tokens=4096)
    return Engine(config, tokenizer=guided / "tokenizer.json")


@pytest.mark.parametrize(
    ("knobs", "digits"),
    [
        ({}, 1),
        ({"min_tokens": 6}, 6),
        ({"ignore_eos": True}, 12),
        ({"end_ids": (5,)}, 12),
        ({"end_ids": ()}, 12),
    ],
    ids=str,
)
def test_a_guide_ends_where_the_request_says(
    guided_engine: Engine, knobs: dict[str, Any], digits: int
) -> None:
    biased = {"logit_bias": {END: 100.0}, "max_tokens": 12}  # it ends as soon as it may
    params = msgspec.structs.replace(GREEDY, guide=DIGITS, **biased, **knobs)
    result = guided_engine.generate([PROMPT], params)[0]
    zero = byte_tokenizer().encode("0").ids[0]
    assert all(zero <= token <= zero + 9 for token in result.tokens[:digits])
    if digits < 12:
        assert (result.tokens[digits:], result.finish) == ([END], "stop")
    else:
        assert (len(result.tokens), result.finish) == (12, "length")


def test_a_guide_that_cannot_be_is_told_also_when_the_step_fails(
    guided_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = msgspec.structs.replace(GREEDY, guide="no grammar")
    guided_engine.add((b"a", 1), PROMPT, GREEDY)
    guided_engine.add((b"a", 2), PROMPT, bad)
    time.sleep(0.5)  # it has been looked at when the step begins

    def broken(self: Runner, chunks: object) -> None:
        raise RuntimeError("out of luck")

    outputs: dict[Any, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "launch", broken)
        while guided_engine.busy:
            outputs |= dict(guided_engine.step())
    assert outputs[b"a", 1].finish == "failed"
    assert outputs[b"a", 2].finish == "refused"


def test_a_cache_for_which_there_is_no_memory_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"GB \(960 bytes a token\); there is memory for"):
        Engine(EngineConfig(checkpoint=str(checkpoint), cache_tokens=1 << 30))


def test_a_context_that_fits_neither_model_nor_cache_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="max_context=600 is more than the 512 positions"):
        engine(checkpoint, max_context=600)
    with pytest.raises(ConfigError, match="it holds 96 tokens"):
        Engine(EngineConfig(checkpoint=str(checkpoint), cache_tokens=100, max_context=100))


def test_a_step_is_launched_each_time_the_one_before_it_is_collected(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "runs_ahead", True)
    running = engine(checkpoint)
    for number in range(3):
        running.add((b"a", number), PROMPT, GREEDY)
    told = []
    while running.busy:
        told.append(len(running.step()))
    # The first step's tokens come with the second, and so on: no step is left out.
    assert told == [0, *[3] * GREEDY.max_tokens]


@pytest.mark.parametrize("cache_tokens", [4096, 240])
def test_launching_ahead_changes_no_answer(
    guided: Path, monkeypatch: pytest.MonkeyPatch, cache_tokens: int
) -> None:
    """Stops, penalties, guides, seeds and set-backs beside one another, some ended by hand."""
    config = EngineConfig(checkpoint=str(guided), cache_tokens=cache_tokens, max_sequences=5)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.0, "stop_token_ids": tuple(range(100, 140))},
        {"repetition_penalty": 1.3, "min_tokens": 4, "logprobs": 2},
        {"guide": DIGITS, "temperature": 1.0},
        {"temperature": 0.8, "logprobs": 0},
    ]

    def answers(ahead: bool) -> dict[int, list[Any]]:
        monkeypatch.setattr(Runner, "runs_ahead", ahead)
        running = Engine(config, tokenizer=guided / "tokenizer.json")
        found: dict[int, list[Any]] = {}
        rng = random.Random(4)
        for number in range(24):
            params = SamplingParams(
                seed=number, max_tokens=rng.randint(1, 40), **kinds[number % len(kinds)]
            )
            found[number] = []
            running.add((b"a", number), rng.choices(range(1, 256), k=rng.randint(1, 60)), params)
        steps = 0
        while running.busy:
            steps += 1
            for (_, number), output in running.step():
                # Of logprobs only whose they are: they round as the batch is cut.
                told = [[one.token for one in row] for row in output.logprobs or ()]
                found[number].append((output.tokens, told, output.finish))
            if steps == 9:
                assert running.abort((b"a", 6)) or found[6][-1][2] is not None
        assert running.tree.free == running.tree.usable
        assert (running.scheduler.num_preemptions > 0) == (cache_tokens < 1000)
        del found[6]
        return found

    assert answers(ahead=True) == answers(ahead=False)
