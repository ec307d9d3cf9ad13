"""What clients of Triton's vLLM and TensorRT-LLM backends send, and what they read."""

import itertools
import json
import queue
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from tests.serving import (
    HANG_S,
    TENSORRT,
    VLLM,
    Reference,
    Stream,
    at_once,
    byte_tokenizer,
    generate,
    generate_stream,
    infer_grpc,
    infer_http,
    joined,
    list_of,
    stream,
    tensors_of,
)
from tools.serve import TritonServer

TOKENS = 24
GREEDY = {"temperature": 0.0}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def sampling(**knobs: Any) -> str:
    return json.dumps({"max_tokens": TOKENS, "temperature": 0, **knobs})


# Several answers to one prompt


def test_n_answers_come_in_one_response(server: TritonServer) -> None:
    knobs = sampling(n=3, temperature=1.0, seed=4)
    flags = {"return_finish_reason": True, "return_num_output_tokens": True}
    for ask in (infer_grpc, infer_http):
        response = ask(server, text_input="many", sampling_parameters=knobs, **flags)
        texts = list_of(response, "text_output")
        assert len(set(texts)) == 3
        assert all(text.startswith("many") for text in texts)
        assert list_of(response, "finish_reason") == ["length"] * 3
        assert list_of(response, "num_output_tokens") == [TOKENS] * 3
        first = infer_grpc(
            server, text_input="many", sampling_parameters=sampling(temperature=1.0, seed=4)
        )
        assert first.text == texts[0], "the first is what the seed gives alone"


def test_n_answers_stream_side_by_side(server: TritonServer) -> None:
    knobs = sampling(n=3, temperature=1.0, seed=4)
    whole = infer_grpc(
        server, text_input="many", sampling_parameters=knobs, exclude_input_in_output=True
    )
    with Stream(
        server,
        text_input="many",
        sampling_parameters=knobs,
        stream=True,
        return_finish_reason=True,
        return_num_output_tokens=True,
    ) as opened:
        responses = list(opened)
    pieces = [list_of(response, "text_output") for response in responses]
    assert ["".join(part) for part in zip(*pieces, strict=True)] == list_of(whole, "text_output")
    assert list_of(responses[0], "finish_reason") == ["None"] * 3
    assert list_of(responses[-1], "finish_reason") == ["length"] * 3
    counts = np.array([list_of(response, "num_output_tokens") for response in responses])
    assert counts.sum(axis=0).tolist() == [TOKENS] * 3


def test_answers_of_one_prompt_may_end_at_different_times(
    server: TritonServer, reference: Reference
) -> None:
    knobs = sampling(n=4, temperature=1.0, seed=1, stop=["e", "o"])
    flags = {"return_finish_reason": True, "exclude_input_in_output": True}
    response = infer_grpc(server, text_input="ends", sampling_parameters=knobs, **flags)
    for text, finish in zip(
        list_of(response, "text_output"), list_of(response, "finish_reason"), strict=True
    ):
        assert not {"e", "o"} & set(text)
        assert finish == ("length" if len(text.encode()) == TOKENS else "stop")
    assert infer_grpc(server, text_input="after", max_tokens=TOKENS, **GREEDY).text == (
        "after" + reference.text("after", TOKENS)
    ), "nothing of them is left behind"


# Outputs


def test_token_ids_are_the_answers_tokens(server: TritonServer, reference: Reference) -> None:
    expected = reference.tokens("ids", TOKENS)
    inputs = {"text_input": "ids", "max_tokens": TOKENS, "return_token_ids": True, **GREEDY}
    assert list_of(infer_http(server, **inputs), "token_ids") == expected
    streamed = [token for r in stream(server, **inputs) for token in list_of(r, "token_ids")]
    assert streamed == expected


def test_tensorrt_llms_log_probs(server: TritonServer, reference: Reference) -> None:
    expected = reference.logprobs("probable", TOKENS)
    inputs = {"text_input": "probable", "max_tokens": TOKENS, "return_log_probs": True, **GREEDY}
    response = infer_grpc(server, **inputs)
    assert response.outputs["output_log_probs"].shape == (1, 1, TOKENS)
    assert response.outputs["output_log_probs"][0, 0] == pytest.approx(expected, abs=1e-3)
    assert list_of(response, "cum_log_probs") == pytest.approx([sum(expected)], abs=1e-2)
    assert "logprobs" not in response.outputs
    last = stream(server, **inputs)[-1]
    assert list_of(last, "cum_log_probs") == pytest.approx([sum(expected)], abs=1e-2)


def test_what_was_not_asked_for_is_not_sent(server: TritonServer) -> None:
    response = infer_grpc(server, text_input="a", max_tokens=2)
    assert set(response.outputs) == {"text_output"}


# Stops, bans, penalties


def test_a_stop_string_may_be_part_of_the_answer(
    server: TritonServer, reference: Reference
) -> None:
    whole = reference.text("stops", 60)
    stop = whole[10:12]
    knobs = sampling(max_tokens=60, stop=[stop], include_stop_str_in_output=True)
    found = joined(stream(server, text_input="stops", sampling_parameters=knobs))
    assert found == whole[: whole.index(stop) + len(stop)]


def test_no_stop_string_ends_an_answer_before_min_tokens(
    server: TritonServer, reference: Reference
) -> None:
    whole = reference.text("stops", 60)
    at = len(whole.encode()[:30].decode(errors="ignore"))
    stop = whole[4:5]
    knobs = sampling(max_tokens=60, min_tokens=30, stop=[stop])
    found = joined(stream(server, text_input="stops", sampling_parameters=knobs))
    later = whole.find(stop, at)
    assert found == (whole if later < 0 else whole[:later])
    assert stop in found


def test_bad_words_are_never_said(server: TritonServer, reference: Reference) -> None:
    plain = reference.text("banned", TOKENS)
    bad = [plain[1:3], plain[6:7]]
    found = infer_grpc(
        server,
        text_input="banned",
        max_tokens=TOKENS,
        bad_words=bad,
        exclude_input_in_output=True,
        **GREEDY,
    ).text
    assert found
    assert not any(word in found for word in bad)


def test_end_id_is_the_end_of_the_answer(server: TritonServer, reference: Reference) -> None:
    tokens = reference.tokens("end", TOKENS)
    response = infer_grpc(
        server,
        text_input="end",
        max_tokens=TOKENS,
        end_id=tokens[9],
        pad_id=0,
        return_finish_reason=True,
        return_token_ids=True,
        **GREEDY,
    )
    assert list_of(response, "token_ids") == tokens[: tokens.index(tokens[9]) + 1]
    assert response.finish == "stop"


def test_penalties_keep_an_answer_from_repeating_itself(server: TritonServer) -> None:
    plain, *penalised = (
        list_of(
            infer_grpc(
                server,
                text_input="again and again",
                max_tokens=60,
                return_token_ids=True,
                **GREEDY,
                **penalty,
            ),
            "token_ids",
        )
        for penalty in (
            {},
            {"repetition_penalty": 3.0},
            {"frequency_penalty": 2.0},
            {"presence_penalty": 2.0},
        )
    )
    for tokens in penalised:
        assert tokens != plain
        assert len(set(tokens)) >= len(set(plain))


# The dialects, shapes and all


def test_the_vllm_dialect(server: TritonServer, reference: Reference) -> None:
    """As Triton's vLLM client sends it: shapes [1], sampling parameters as strings in JSON."""
    expected = reference.text("vllm", TOKENS)
    knobs = json.dumps({"temperature": "0", "max_tokens": str(TOKENS), "ignore_eos": "true"})
    with Stream(
        server,
        door=VLLM,
        text_input="vllm",
        stream=True,
        sampling_parameters=knobs,
        exclude_input_in_output=True,
        return_finish_reason=True,
        return_num_output_tokens=True,
    ) as opened:
        responses = list(opened)
    assert joined(responses) == expected
    for response in responses:
        assert response.outputs["text_output"].shape == (1,)
        assert response.outputs["num_output_tokens"].shape == (1,)
    assert responses[-1].outputs["finish_reason"].tolist() == [b"length"]
    with Stream(server, door=VLLM, text_input="vllm", sampling_parameters=knobs) as opened:
        [whole] = list(opened)
    assert whole.outputs["text_output"].tolist() == [("vllm" + expected).encode()]


def test_the_openai_frontends_tensorrt_llm_dialect(
    server: TritonServer, reference: Reference
) -> None:
    """Shapes [1, 1], FP32 penalties of 0, and both counts, each read as one element."""
    inputs = {
        "text_input": "openai",
        "stream": False,
        "max_tokens": TOKENS,
        "temperature": 0.0,
        "top_p": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "seed": 3,
        "stop_words": ["never said", "nor this"],
        "exclude_input_in_output": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }
    with Stream(server, **inputs) as opened:
        [response] = list(opened)
    assert response.text == reference.text("openai", TOKENS)
    assert int(response.value("num_input_tokens")) == len(b"openai")
    assert int(response.value("num_output_tokens")) == TOKENS


TENSORRTS = {
    "text_input": "tensorrt",
    "max_tokens": TOKENS,
    "stream": False,
    "beam_width": 1,
    "temperature": 0.0,
    "num_return_sequences": 1,
    "bad_words": [""],
    "stop_words": [""],
    "pad_id": 2,
    "exclude_input_in_output": False,
    "return_log_probs": True,
    "return_context_logits": False,
    "return_generation_logits": False,
}
"""What TensorRT-LLM's end_to_end_grpc_client.py sends, all of it in shapes [1, 1]."""


@pytest.mark.parametrize("door", [TENSORRT, "llm"])
def test_tensorrt_llms_own_client(server: TritonServer, reference: Reference, door: str) -> None:
    """Its tensors, dtypes and outputs; it reads text_output as a list of the beams' texts."""
    tensors = tensors_of(tritonclient.grpc, TENSORRTS)
    assert all(tensor.shape() == [1, 1] for tensor in tensors)
    names = ["text_output", "cum_log_probs", "output_log_probs"]
    came: queue.Queue[Any] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: came.put(error or result))
        outputs = [tritonclient.grpc.InferRequestedOutput(name) for name in names]
        client.async_stream_infer(door, tensors, outputs=outputs, request_id="1")
        result = came.get(timeout=HANG_S)
        client.stop_stream()
    assert not isinstance(result, Exception), result
    text = result.as_numpy("text_output")
    [first] = text if door == TENSORRT else text[0]
    assert first.decode("utf-8") == "tensorrt" + reference.text("tensorrt", TOKENS)
    assert result.as_numpy("output_log_probs").size == TOKENS


def test_tensorrt_llms_door_over_http(server: TritonServer, reference: Reference) -> None:
    """The requests of its documentation, and a stream."""
    inputs = {"text_input": "curl", "max_tokens": TOKENS, **GREEDY}
    expected = reference.text("curl", TOKENS)
    status, body = generate(server, TENSORRT, **inputs, bad_words="", stop_words="", pad_id=2)
    assert (status, body["text_output"]) == (200, "curl" + expected)
    stop = expected[4:6]
    status, body = generate(server, TENSORRT, **inputs, stop_words=["never", stop])
    assert (status, body["text_output"]) == (200, "curl" + expected[: expected.index(stop)])
    events = generate_stream(server, TENSORRT, **inputs, stream=True)
    assert "".join(event["text_output"] for event in events) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beam_width", 4),
        ("num_return_sequences", 2),
        ("return_context_logits", True),
        ("return_generation_logits", True),
        ("return_perf_metrics", True),
    ],
)
def test_what_tensorrt_llm_can_beside_is_refused(
    server: TritonServer, name: str, value: object
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer_grpc(server, text_input="a", **{name: value})
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    assert f"{name}={value} is not supported" in caught.value.message()


def test_genai_perfs_default_dialect(server: TritonServer) -> None:
    """min_length equal to max_tokens, so that answers are as long as was asked for."""
    inputs = {
        "text_input": "perf",
        "max_tokens": TOKENS,
        "min_length": TOKENS,
        "exclude_input_in_output": True,
        "stream": True,
        "return_num_output_tokens": True,
    }
    responses = stream(server, **inputs)
    assert sum(int(r.value("num_output_tokens")) for r in responses) == TOKENS
    assert responses[-1].final, "the last response is the final one"


@pytest.mark.parametrize("wrong", ["batched", "unbatched"])
def test_a_door_of_the_other_dialect_refuses_the_shapes(server: TritonServer, wrong: str) -> None:
    door = VLLM if wrong == "batched" else "llm_unary"
    tensors = tensors_of(tritonclient.grpc, {"text_input": "a"}, batched=wrong == "batched")
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        metadata = client.get_model_config(door, as_json=True)["config"]
        assert bool(metadata.get("max_batch_size")) == (wrong == "unbatched")
        with pytest.raises(tritonclient.grpc.InferenceServerException, match=r"shape|decoupled"):
            client.infer(door, tensors)


def test_words_of_the_answer_survive_every_cut(server: TritonServer) -> None:
    """A stream's pieces are together the decoded answer: no half character, no lost space."""
    tokenizer, characters = byte_tokenizer(), set()
    for seed in range(12):
        knobs = {"text_input": "cut", "max_tokens": 80, "temperature": 1.2, "seed": seed}
        responses = stream(server, **knobs, return_token_ids=True)
        tokens = [token for r in responses for token in list_of(r, "token_ids")]
        # Bytes that make no character are a replacement there, too, and only they.
        assert joined(responses) == tokenizer.decode(tokens)
        characters |= set(joined(responses))
    assert any(len(character.encode()) > 1 for character in characters - {REPLACEMENT})


# Guided decoding

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def fits(text: str) -> bool:
    """Whether a text is JSON that the schema allows, by its words."""
    found = json.loads(text)
    return (
        found.keys() <= {"name", "age", "tags"}
        and len(found["name"]) <= 8
        and type(found["age"]) is int
        and 0 <= found["age"] <= 120
        and set(found.get("tags", [])) <= {"a", "b"}
        and len(found.get("tags", [])) <= 3
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_answers_fit_the_schema_at_any_temperature(
    server: TritonServer, temperature: float
) -> None:
    knobs = sampling(
        n=8, temperature=temperature, max_tokens=120, structured_outputs={"json": SCHEMA}
    )
    response = infer_grpc(
        server,
        text_input="as JSON: ",
        sampling_parameters=knobs,
        exclude_input_in_output=True,
        return_finish_reason=True,
    )
    assert list_of(response, "finish_reason") == ["stop"] * 8
    for text in list_of(response, "text_output"):
        assert fits(text), text


@pytest.mark.parametrize(
    ("guide", "pattern"),
    [
        ({"regex": "[A-F]{3}-[0-9]{2,4}"}, "[A-F]{3}-[0-9]{2,4}"),
        ({"choice": ["yes", "no", "né"]}, "yes|no|né"),
        ({"grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{1,5}/'}, "<[a-z]{1,5}>"),
        ({"json_object": True, "disable_any_whitespace": True}, r"\{.*"),
    ],
    ids=["regex", "choice", "grammar", "json_object"],
)
def test_answers_match_their_guide(
    server: TritonServer, guide: dict[str, Any], pattern: str
) -> None:
    for seed in range(4):
        knobs = sampling(temperature=1.0, seed=seed, max_tokens=40, structured_outputs=guide)
        text = joined(stream(server, text_input="guided", sampling_parameters=knobs))
        assert re.fullmatch(pattern, text), text


def test_tensorrt_llms_guides(server: TritonServer) -> None:
    inputs = {"text_input": "guided", "max_tokens": 30, "exclude_input_in_output": True}
    response = infer_http(
        server, **inputs, guided_decoding_guide_type="regex", guided_decoding_guide="(ab){2,3}"
    )
    assert re.fullmatch("(ab){2,3}", response.text)
    response = infer_grpc(
        server,
        **inputs,
        guided_decoding_guide_type="json_schema",
        guided_decoding_guide='{"enum": [7, 42]}',
    )
    assert json.loads(response.text) in (7, 42)


def test_guided_and_free_requests_share_batches(server: TritonServer, reference: Reference) -> None:
    expected = "free" + reference.text("free", TOKENS)

    def free() -> str:
        return infer_grpc(server, text_input="free", max_tokens=TOKENS, **GREEDY).text

    def tied(seed: int) -> str:
        knobs = sampling(temperature=1.0, seed=seed, structured_outputs={"regex": "x{20}"})
        return infer_grpc(server, text_input="tied ", sampling_parameters=knobs).text

    calls = [free, lambda: tied(1), lambda: tied(2)] * 6
    results = at_once(calls)
    assert results[0::3] == [expected] * 6
    assert set(results[1::3] + results[2::3]) == {"tied " + "x" * 20}


SLOW = {"regex": "(" * 5 + "a" + "{1000})" * 5}
"""worked on for half a second and then refused"""


def seconds_to_refuse(server: TritonServer, guide: dict[str, Any], match: str, **how: Any) -> float:
    begin = time.monotonic()
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        inputs = {"text_input": "guided", "sampling_parameters": sampling(structured_outputs=guide)}
        with pytest.raises(InferenceServerException, match=match):
            client.infer("llm_unary", tensors_of(tritonclient.grpc, inputs), **how)
    return time.monotonic() - begin


def test_nothing_waits_for_a_guide_that_takes_long_to_compile(server: TritonServer) -> None:
    def slow() -> float:
        return seconds_to_refuse(server, SLOW, "too complex")

    alone, took = slow(), []
    with ThreadPoolExecutor(4) as pool:  # more than there are front ends
        slow_ones = [pool.submit(lambda: [slow() for _ in range(2)]) for _ in range(4)]
        while not all(one.done() for one in slow_ones):
            begin = time.monotonic()
            infer_grpc(server, text_input="quick", max_tokens=2)
            took.append(time.monotonic() - begin)
    assert max(max(one.result()) for one in slow_ones) > 1.5 * alone, "they took turns"
    assert max(took) < alone, took


def test_a_request_behind_slow_guides_ends_by_its_own_timeout(server: TritonServer) -> None:
    refused = []
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
    with client, ThreadPoolExecutor(8) as pool:
        slow_ones = [pool.submit(seconds_to_refuse, server, SLOW, "too complex") for _ in range(8)]
        for count in itertools.count(5):  # each another guide, and so none that is known already
            if all(one.done() for one in slow_ones):
                break
            knobs = sampling(structured_outputs={"regex": f"a{{{count}}}"})
            inputs = {"text_input": "guided", "sampling_parameters": knobs}
            begin = time.monotonic()
            try:  # one may come to a front end that has no slow one
                client.infer("llm_unary", tensors_of(tritonclient.grpc, inputs), timeout=100_000)
            except InferenceServerException as error:
                refused.append((time.monotonic() - begin, error.message()))
    assert refused, "none came behind a slow one"
    assert all("not done within 0.1 s" in words for _, words in refused), refused
    assert max(refused)[0] < max(one.result() for one in slow_ones) / 2


def test_bans_give_way_where_a_guide_leaves_no_choice(server: TritonServer) -> None:
    knobs = sampling(structured_outputs={"regex": "aaa"}, bad_words=["a"], min_tokens=20)
    response = infer_grpc(
        server, text_input="b", sampling_parameters=knobs, exclude_input_in_output=True
    )
    assert response.text == "aaa"


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"structured_outputs": {"regex": "a(b"}}, ["structured_outputs: regex='a(b'", "unclosed"]),
        ({"structured_outputs": {"json": "{"}}, ["structured_outputs: json", "JSON schema"]),
        ({"structured_outputs": {"json": {"type": "nothing"}}}, ["nothing"]),
        ({"structured_outputs": {"choice": []}}, ["the list is empty"]),
        ({"guided_decoding": {"regex": "a", "choice": ["b"]}}, ["regex and choice"]),
        (
            {"guided_decoding": {"regex": "a"}, "structured_outputs": {"regex": "b"}},
            ["structured_outputs and guided_decoding are given"],
        ),
    ],
)
def test_guides_that_do_not_compile_are_refused(
    server: TritonServer, knobs: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer_grpc(server, text_input="a", sampling_parameters=sampling(**knobs))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    for word in words:
        assert word in caught.value.message()
