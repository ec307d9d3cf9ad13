"""What a request may say, and what it hears when it says something else."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fi_runtime.config import ConfigError, RequestLimits
from fi_runtime.frontend.deadline import Deadline
from fi_runtime.frontend.errors import RequestError
from fi_runtime.frontend.requests import Request, Served, parse_request
from fi_runtime.messages import EngineInfo
from tests.test_text import BYTES

INFO = EngineInfo(pid=1, vocab_size=256, max_context=100, tokenizer="")
SERVED = Served.of(Path("nowhere"), BYTES, INFO, RequestLimits())


def tensor(value: Any) -> np.ndarray:
    """A value as the Python backend hands it over, with a batch dimension of 1."""
    values = value if isinstance(value, list) else [value]
    if isinstance(values[0], str | bytes):
        raw = [v.encode() if isinstance(v, str) else v for v in values]
        return np.array([raw], dtype=np.object_)
    dtypes = {bool: np.bool_, int: np.int32, float: np.float32}
    return np.array([values], dtype=dtypes[type(values[0])])


def parse(parameters: dict[str, object] | None = None, **inputs: Any) -> Request:
    tensors = {name: tensor(value) for name, value in inputs.items()}
    return parse_request(tensors, parameters or {}, SERVED)


def refused(parameters: dict[str, object] | None = None, **inputs: Any) -> tuple[str, str]:
    with pytest.raises(RequestError) as caught:
        parse(parameters, **inputs)
    return caught.value.code, str(caught.value)


def test_defaults_are_those_of_both_dialects() -> None:
    request = parse(text_input="hello")
    assert request.prompt == BYTES.encode("hello").ids
    assert request.echo == "hello"
    assert request.samples[0].max_tokens == 16
    assert request.samples[0].temperature == 1.0
    assert (request.samples[0].top_k, request.samples[0].top_p) == (0, 1.0)
    assert request.samples[0].logprobs is None
    assert request.stop == []
    assert parse(text_input="a").samples[0].seed != parse(text_input="a").samples[0].seed


def test_what_requests_ask_for_is_not_mixed_up_with_what_others_did() -> None:
    served = Served.of(Path("nowhere"), BYTES, INFO, RequestLimits())

    def ask(served: Served, prompt: str, **inputs: Any) -> Request:
        tensors = {name: tensor(value) for name, value in inputs.items()}
        return parse_request({"text_input": tensor(prompt), **tensors}, {}, served)

    asked: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 0},
        {"temperature": 1, "seed": 0},
        {"temperature": "1", "seed": 0},
        {"top_p": 1.0, "seed": 0},
        {"seed": 0, "max_tokens": 60},
        {"seed": 0, "min_length": 5, "max_tokens": 90, "n": 2},
        {"seed": 0, "stop": "a", "return_token_ids": True},
        {"seed": 0, "sampling_parameters": '{"max_tokens": 5, "stop": ["b"]}'},
        *({"seed": 0, "max_tokens": 1 + count % 90, "top_k": count} for count in range(300)),
    ]
    for prompt, inputs in itertools.product(("a", "b" * 50), asked + asked[::-1]):
        fresh = Served.of(Path("nowhere"), BYTES, INFO, RequestLimits())
        request, alone = ask(served, prompt, **inputs), ask(fresh, prompt, **inputs)
        if "seed" in inputs:
            assert request == alone
        assert request.prompt == BYTES.encode(prompt).ids


def test_the_prompt_is_repeated_unless_streaming_or_told_not_to() -> None:
    assert parse(text_input="hi", stream=True).echo == ""
    assert parse(text_input="hi", exclude_input_in_output=True).echo == ""
    assert parse(text_input="hi", exclude_input_in_output=False).echo == "hi"
    assert parse(input_ids=BYTES.encode("hé").ids).echo == "hé"
    code, message = refused(text_input="hi", stream=True, exclude_input_in_output=False)
    assert code == "INVALID_ARG"
    assert "exclude_input_in_output=false with stream=true" in message


def test_sampling_parameters_come_before_tensors_before_the_requests_own() -> None:
    own = {"temperature": 0.1, "top_k": 2, "top_p": 0.3}
    request = parse(own, text_input="a", top_k=5)
    assert request.samples[0].temperature == 0.1
    assert request.samples[0].top_k == 5
    request = parse(own, text_input="a", top_k=5, sampling_parameters='{"top_p": 0.9}')
    assert request.samples[0].top_p == 0.9
    assert request.samples[0].top_k == 5
    assert request.samples[0].temperature == 1.0, "the request's own are ignored, not merged"


def write_generation_config(folder: Path, **values: Any) -> Served:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return Served.of(folder, BYTES, INFO, RequestLimits())


def test_what_a_request_leaves_out_is_the_checkpoints(tmp_path: Path) -> None:
    values = {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    others = {"eos_token_id": [1, 2], "max_new_tokens": 99, "min_p": None, "num_beams": 1}
    served = write_generation_config(tmp_path, do_sample=True, **values, **others)

    def sampling(**inputs: Any) -> tuple[float, ...]:
        tensors = {name: tensor(value) for name, value in {"text_input": "a", **inputs}.items()}
        [params] = parse_request(tensors, {"top_k": 7}, served).samples
        assert (params.max_tokens, params.min_p) == (16, 0.0)
        return params.temperature, params.top_k, params.top_p, params.repetition_penalty

    assert sampling() == (0.6, 7, 0.8, 1.05)
    assert sampling(sampling_parameters='{"top_p": null}') == (0.6, 20, 0.8, 1.05)
    json = '{"temperature": 0, "top_p": 1, "repetition_penalty": 1}'
    assert sampling(sampling_parameters=json, top_k=0) == (0.0, 0, 1.0, 1.0)


def test_a_checkpoint_that_does_not_sample_says_nothing_of_how_to(tmp_path: Path) -> None:
    served = write_generation_config(tmp_path, temperature=0.6, top_k=20, repetition_penalty=1.05)
    assert served.defaults == {"repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("values", "word"),
    [({"temperature": -1}, "temperature=-1"), ({"top_p": "high"}, "top_p='high'")],
)
def test_a_generation_config_that_cannot_be(
    tmp_path: Path, values: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=f"generation_config.json: {word}: Expected"):
        write_generation_config(tmp_path, do_sample=True, **values)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"generation_config\.json: cannot be read as a JSON obj"):
        Served.of(tmp_path, BYTES, INFO, RequestLimits())


def test_values_may_be_strings() -> None:
    json = (
        '{"temperature": "0", "max_tokens": "30", "top_p": "0.5", "top_k": "-1", "seed": "7",'
        ' "ignore_eos": "true", "logprobs": "2", "n": "1", "stop": "x"}'
    )
    request = parse(text_input="a", sampling_parameters=json)
    params = request.samples[0]
    assert (params.temperature, params.max_tokens, params.top_p) == (0.0, 30, 0.5)
    assert (params.top_k, params.seed, params.ignore_eos, params.logprobs) == (0, 7, True, 2)
    assert request.stop == ["x"]
    assert parse({"stream": "true"}, text_input="a").flags.stream


def test_stop_strings_come_from_both_dialects() -> None:
    request = parse(
        text_input="a", sampling_parameters='{"stop": ["x", "y"]}', stop_words=["z", ""]
    )
    assert request.stop == ["x", "y", "z"]


def test_names_that_are_no_input_of_ours_are_left_alone() -> None:
    assert parse({"id": "7", "x-forwarded-for": "me"}, text_input="a").samples[0].max_tokens == 16


def test_the_answer_is_cut_to_the_context() -> None:
    assert parse(text_input="a" * 90, max_tokens=50).samples[0].max_tokens == 10
    assert parse(text_input="a" * 99, max_tokens=50).samples[0].max_tokens == 1
    code, message = refused(text_input="a" * 100)
    assert code == "INVALID_ARG"
    assert "100 tokens; at most 99" in message


def test_without_a_seed_or_with_minus_one_any_is_drawn() -> None:
    for knobs in ("{}", '{"seed": -1}', '{"seed": null}'):
        seeds = {parse(text_input="a", sampling_parameters=knobs).samples[0].seed for _ in "12"}
        assert len(seeds) == 2


def test_any_seed_of_64_bits_is_taken() -> None:
    biggest = np.array([[(1 << 64) - 1]], dtype=np.uint64)
    parsed = parse_request({"text_input": tensor("a"), "seed": biggest}, {}, SERVED)
    assert parsed.samples[0].seed == (1 << 63) - 1


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, ["give one of text_input, input_ids, messages; found none of them"]),
        ({"text_input": "a", "input_ids": [1]}, ["found text_input and input_ids"]),
        ({"text_input": ""}, ["empty"]),
        ({"text_input": b"\xff\xfe"}, ["text_input", "UTF-8"]),
        ({"text_input": ["a", "b"]}, ["text_input", "2 elements", "give 1"]),
        ({"input_ids": [1, 256]}, ["256", "0 to 255"]),
        ({"input_ids": [-1]}, ["-1", "0 to 255"]),
        ({"text_input": "a", "max_tokens": 0}, ["max_tokens=0", ">= 1"]),
        ({"text_input": "a", "temperature": -0.5}, ["temperature=-0.5", ">= 0"]),
        ({"text_input": "a", "temperature": float("nan")}, ["temperature=nan", ">= 0"]),
        ({"text_input": "a", "temperature": float("inf")}, ["temperature=inf", "finite"]),
        ({"text_input": "a", "top_p": 0.0}, ["top_p=0.0", "> 0"]),
        ({"text_input": "a", "top_p": 1.5}, ["top_p=1.5", "<= 1"]),
        ({"text_input": "a", "presence_penalty": 2.5}, ["presence_penalty=2.5", "<= 2"]),
        ({"text_input": "a", "repetition_penalty": 0.0}, ["repetition_penalty=0.0", ">= 0.01"]),
        ({"text_input": "a", "min_tokens": 17}, ["min_tokens=17 is more than max_tokens=16"]),
        ({"text_input": "a", "min_length": 2, "min_tokens": 3}, ["min_length=2", "min_tokens=3"]),
        ({"text_input": "a", "sampling_parameters": '{"n": 0}'}, ["n=0", ">= 1"]),
        ({"text_input": "a", "sampling_parameters": '{"n": 129}'}, ["n=129", "<= 128"]),
        (
            {"text_input": "a", "sampling_parameters": '{"logit_bias": {"x": 1}}'},
            ["logit_bias={'x': 1}", "int"],
        ),
        (
            {"text_input": "a", "sampling_parameters": '{"logit_bias": {"5": 101}}'},
            ["logit_bias=", "<= 100"],
        ),
        ({"text_input": "a" * 1000}, ["text_input has 1000 bytes; more than 200 do not fit"]),
        (
            {"text_input": "a", "sampling_parameters": json.dumps({"stop": ["x"] * 1025})},
            ["stop=", "length <= 1024"],
        ),
        ({"text_input": "a", "min_p": 1.5}, ["min_p=1.5", "<= 1"]),
        ({"text_input": "a", "top_k": -2}, ["top_k=-2", ">= -1"]),
        ({"text_input": "a", "end_id": -2}, ["end_id=-2", ">= -1"]),
        ({"text_input": "a", "end_id": 256}, ["end_id", "256", "-1 to 255"]),
        (
            {"text_input": "a", "sampling_parameters": '{"stop_token_ids": [1, 256]}'},
            ["stop_token_ids", "256", "0 to 255"],
        ),
        (
            {"text_input": "a", "sampling_parameters": '{"logit_bias": {"256": 1}}'},
            ["logit_bias", "256", "0 to 255"],
        ),
        ({"text_input": "a", "sampling_parameters": '{"tempo": 1}'}, ["tempo", "known are"]),
        ({"text_input": "a", "sampling_parameters": "[1]"}, ["sampling_parameters", "JSON object"]),
        ({"text_input": "a", "sampling_parameters": "{"}, ["sampling_parameters", "JSON object"]),
        ({"text_input": "a", "sampling_parameters": "[" * 50_000}, ["JSON object"]),
        ({"text_input": "a", "sampling_parameters": '{"seed": -2}'}, ["seed=-2", "2^64 - 1"]),
        ({"text_input": "a", "sampling_parameters": '{"max_tokens": "x"}'}, ["max_tokens='x'"]),
        ({"text_input": "a", "sampling_parameters": '{"logprobs": 21}'}, ["logprobs=21", "<= 20"]),
        ({"text_input": "a", "sampling_parameters": '{"stop": [1]}'}, ["stop=[1]", "str"]),
        ({"text_input": "a", "sampling_parameters": '{"top_k": 9223372036854775808}'}, ["top_k="]),
        ({"text_input": "a", "sampling_parameters": '{"top_k": 1e30}'}, ["top_k="]),
        (
            {"text_input": "a", "sampling_parameters": f'{{"stop_token_ids": [{10**26}]}}'},
            ["stop_token_ids="],
        ),
        ({"text_input": "a", "sampling_parameters": f'{{"max_tokens": {2**31}}}'}, ["max_tokens="]),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(
    inputs: dict[str, Any], words: list[str]
) -> None:
    code, message = refused(**inputs)
    assert code == "INVALID_ARG"
    for word in words:
        assert word in message
    assert len(message) < 500


def test_a_batch_in_one_request_is_refused() -> None:
    two = np.array([[b"a"], [b"b"]], dtype=np.object_)
    with pytest.raises(RequestError, match="holds one prompt"):
        parse_request({"text_input": two}, {}, SERVED)


@pytest.mark.parametrize(
    "given",
    [
        '{"best_of": 2}',
        '{"prompt_logprobs": 1}',
        '{"truncate_prompt_tokens": 5}',
        '{"flat_logprobs": true}',
        '{"extra_args": {"a": 1}}',
    ],
)
def test_known_features_that_are_missing_are_said_to_be(given: str) -> None:
    code, message = refused(text_input="a", sampling_parameters=given)
    assert code == "UNSUPPORTED"
    assert "is not supported" in message


def test_features_that_are_missing_may_be_declined() -> None:
    given = '{"best_of": 1, "prompt_logprobs": null, "flat_logprobs": false, "extra_args": null}'
    assert parse(text_input="a", sampling_parameters=given).samples[0].max_tokens == 16


def test_request_parameters_that_are_not_served_are_not_ignored() -> None:
    given = {"best_of": 10, "prompt_logprobs": 3, "detokenize": False, "beam_width": 4}
    tensorrts = {"embedding_bias_words": "x", "num_draft_tokens": 5, "lora_task_id": 1}
    for name, value in {**given, **tensorrts}.items():
        code, message = refused({name: value}, text_input="a")
        assert code == "UNSUPPORTED"
        assert name in message


def test_stop_words_of_a_wrong_type_are_told() -> None:
    assert parse({"stop_words": "x"}, text_input="a").stop == ["x"]
    code, message = refused({"stop_words": 5}, text_input="a")
    assert code == "INVALID_ARG"
    assert "stop_words=5" in message


def test_the_cumulative_logprob_needs_the_engines_but_reports_none() -> None:
    request = parse(text_input="a", return_cumulative_logprob=True)
    assert request.samples[0].logprobs == 0
    assert not request.logprobs
    assert parse(text_input="a", sampling_parameters='{"logprobs": 2}').logprobs


@pytest.mark.parametrize(("given", "asked"), [("false", None), ("true", 1), ("0", 0)])
def test_logprobs_may_be_a_truth_value(given: str, asked: int | None) -> None:
    """As the OpenAI frontend has sent it with every chat."""
    request = parse(text_input="a", sampling_parameters=f'{{"logprobs": {given}}}')
    assert request.samples[0].logprobs == asked
    assert request.logprobs == (asked is not None)


@pytest.mark.parametrize(
    "given",
    [
        "{}",
        '{"n": 1, "presence_penalty": "0"}',
        '{"n": "1", "repetition_penalty": "1.0", "skip_special_tokens": "true"}',
        '{"guided_decoding": null, "logit_bias": {}, "bad_words": []}',
        '{"beam_width": 1, "num_return_sequences": "1", "return_context_logits": "false"}',
    ],
)
def test_asking_for_nothing_special_is_no_special_feature(given: str) -> None:
    assert parse(text_input="a", sampling_parameters=given).samples[0].max_tokens == 16


def test_tensorrt_llms_names_mean_the_same() -> None:
    request = parse(
        text_input="a",
        min_length=3,
        random_seed=7,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        end_id=9,
        pad_id=0,
        bad_words=["xy", ""],
        return_log_probs=True,
    )
    [params] = request.samples
    assert (params.min_tokens, params.seed, params.end_ids) == (3, 7, (9,))
    assert (params.repetition_penalty, params.presence_penalty) == (1.5, 0.5)
    assert params.frequency_penalty == 0.25
    # One token a byte: the word alone, and after a blank.
    assert params.bad_tokens == (tuple(BYTES.encode("xy").ids), tuple(BYTES.encode(" xy").ids))
    assert params.logprobs == 0
    json = '{"min_tokens": 5, "logit_bias": {"5": -100, "6": "2.5"}}'
    [params] = parse(text_input="a", min_length=3, sampling_parameters=json).samples
    assert params.min_tokens == 5, "the JSON comes before tensors, whatever the name"
    assert params.logit_bias == {5: -100.0, 6: 2.5}


def test_an_end_id_of_minus_one_is_no_end_at_all() -> None:
    for given in ({"end_id": -1, "pad_id": -1}, {"sampling_parameters": '{"end_id": "-1"}'}):
        assert parse(text_input="a", **given).samples[0].end_ids == ()
    assert parse(text_input="a", pad_id=-1).samples[0].end_ids is None, "the checkpoint's own"


def test_each_answer_to_a_prompt_has_a_seed_of_its_own() -> None:
    json = '{"n": 3, "seed": 5}'
    seeds = [params.seed for params in parse(text_input="a", sampling_parameters=json).samples]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert seeds == [p.seed for p in parse(text_input="a", sampling_parameters=json).samples]


# Limits


@pytest.mark.parametrize(
    ("limits", "within", "beyond", "words"),
    [
        ({"max_prompt_tokens": 5}, {}, {"text_input": "123456"}, ["6 tokens", "at most 5"]),
        ({"max_prompt_tokens": 5}, {}, {"text_input": "x" * 5000}, ["5000 bytes", "fit"]),
        ({"max_n": 2}, {"n": 2}, {"n": 3}, ["n=3", "at most 2"]),
        ({"max_stop_strings": 2}, {"stop": ["a", "b"]}, {"stop": ["a", "b", "c"]}, ["at most 2"]),
        ({"max_stop_strings": 0}, {}, {"stop": "a"}, ["1 strings", "at most 0"]),
        ({}, {"stop": "a" * 256}, {"stop": "a" * 257}, ["257 characters", "of 256 characters"]),
        (
            {"max_guide_bytes": 9},
            {"structured_outputs": {"regex": "a{1}bcdef"}},
            {"structured_outputs": {"regex": "a{1}bcdefg"}},
            ["10 bytes", "at most 9"],
        ),
        (
            {"max_guide_bytes": 8},
            {"guided_decoding": {"choice": ["abcd"]}},
            {"guided_decoding": {"choice": ["abcde"]}},
            ["9 bytes", "at most 8"],
        ),
        ({"max_request_bytes": 40}, {}, {"text_input": "x" * 41}, ["bytes; at most 40"]),
        ({"max_request_bytes": 40}, {}, {"input_ids": [1] * 11}, ["bytes; at most 40"]),
    ],
)
def test_a_limit_holds_and_says_so(
    limits: dict[str, Any], within: dict[str, Any], beyond: dict[str, Any], words: list[str]
) -> None:
    served = Served.of(Path("nowhere"), BYTES, INFO, RequestLimits(**limits))

    def ask(given: dict[str, Any]) -> Request:
        names = {"text_input", "input_ids"}
        inputs = {name: tensor(value) for name, value in given.items() if name in names}
        knobs = {name: value for name, value in given.items() if name not in names}
        if "input_ids" not in inputs:
            inputs = {"text_input": tensor("12345"), **inputs}
        if knobs:
            inputs["sampling_parameters"] = tensor(json.dumps(knobs))
        return parse_request(inputs, {}, served)

    assert ask(within).prompt == BYTES.encode("12345").ids
    with pytest.raises(RequestError) as caught:
        ask(beyond)
    assert caught.value.code == "INVALID_ARG"
    for word in words:
        assert word in str(caught.value)


def test_an_answer_is_cut_to_what_may_be_asked_for() -> None:
    served = Served.of(Path("nowhere"), BYTES, INFO, RequestLimits(max_output_tokens=7))
    inputs = {"text_input": tensor("a"), "max_tokens": tensor(50), "min_tokens": tensor(20)}
    [params] = parse_request(inputs, {}, served).samples
    assert (params.max_tokens, params.min_tokens) == (7, 7)


def test_what_comes_as_parameters_counts_as_bytes_of_the_request() -> None:
    served = Served.of(Path("nowhere"), BYTES, INFO, RequestLimits(max_request_bytes=100))
    with pytest.raises(RequestError, match="bytes; at most 100"):
        parse_request({"text_input": tensor("a")}, {"unknown": "x" * 100}, served)


def test_a_request_has_as_long_as_it_asks_for_and_no_longer_than_it_may() -> None:
    now = time.monotonic()
    assert Deadline.of(now, 60.0, 0).seconds == 60
    assert Deadline.of(now, 60.0, 90_000_000).seconds == 60
    assert Deadline.of(now, 60.0, 250_000).seconds == 0.25
    assert Deadline.of(now, 60.0, 0).error is None
    late = Deadline.of(now - 61, 60.0, 0).error
    assert late is not None
    assert (late.code, "not done within 60 s" in str(late)) == ("UNAVAILABLE", True)
