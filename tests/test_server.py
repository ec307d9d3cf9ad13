"""A real tritonserver asked by real clients: what they get, and that it is right."""

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc

from tests.serving import (
    BATCH,
    CONTEXT,
    STREAMED,
    UNARY,
    Reference,
    Response,
    Stream,
    at_once,
    byte_tokenizer,
    command_of,
    engines,
    error_of,
    generate,
    generate_stream,
    grpc_client,
    infer_grpc,
    infer_http,
    joined,
    post,
    processes,
    stream,
    stubs,
)
from tools.serve import TritonServer

pytestmark = pytest.mark.timeout(120)

GREEDY: dict[str, Any] = {"temperature": 0.0}
TOKENS = 40
PROMPTS = [
    "x",
    "hello world",
    "Grüße, 世界 🎉!",
    "The quick brown fox jumps over the lazy dog. " * 15,  # more than one step computes
]
Ask = Callable[..., str]


def ask_stream(server: TritonServer, **inputs: Any) -> str:
    return joined(stream(server, **inputs))


def ask_stream_for_one_response(server: TritonServer, **inputs: Any) -> str:
    [response] = stream(server, **inputs, stream=False, exclude_input_in_output=True)
    return response.text


def ask_grpc(server: TritonServer, **inputs: Any) -> str:
    return infer_grpc(server, **inputs, exclude_input_in_output=True).text


def ask_http(server: TritonServer, **inputs: Any) -> str:
    return infer_http(server, **inputs, exclude_input_in_output=True).text


def ask_generate(server: TritonServer, **inputs: Any) -> str:
    status, body = generate(server, STREAMED, **inputs, exclude_input_in_output=True)
    assert status == 200, body
    return body["text_output"]


def ask_generate_unary(server: TritonServer, **inputs: Any) -> str:
    status, body = generate(server, UNARY, **inputs, exclude_input_in_output=True)
    assert status == 200, body
    return body["text_output"]


def ask_generate_stream(server: TritonServer, **inputs: Any) -> str:
    return "".join(e["text_output"] for e in generate_stream(server, **inputs, stream=True))


CLIENTS: list[Ask] = [
    ask_stream,
    ask_stream_for_one_response,
    ask_grpc,
    ask_http,
    ask_generate,
    ask_generate_unary,
    ask_generate_stream,
]
each_client = pytest.mark.parametrize("ask", CLIENTS, ids=lambda ask: ask.__name__[4:])


# Answers


@each_client
@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "ascii", "unicode", "long"])
def test_an_answer_is_that_of_transformers(
    server: TritonServer, reference: Reference, ask: Ask, prompt: str
) -> None:
    answer = ask(server, text_input=prompt, max_tokens=TOKENS, **GREEDY)
    assert answer == reference.text(prompt, TOKENS)


@each_client
def test_a_seed_gives_the_same_answer_to_every_client(server: TritonServer, ask: Ask) -> None:
    inputs = {"text_input": "seeded", "max_tokens": TOKENS, "temperature": 0.9, "seed": 7}
    answer = ask(server, **inputs)
    assert answer == ask_grpc(server, **inputs)
    assert answer != ask(server, **{**inputs, "seed": 8})


def test_a_prompt_as_tokens_is_the_prompt_as_text(
    server: TritonServer, reference: Reference
) -> None:
    ids = list(PROMPTS[2].encode())
    expected = PROMPTS[2] + reference.text(PROMPTS[2], TOKENS)
    for infer in (infer_grpc, infer_http):
        assert infer(server, input_ids=ids, max_tokens=TOKENS, **GREEDY).text == expected
    [response] = stream(server, input_ids=ids, max_tokens=TOKENS, stream=False, **GREEDY)
    assert response.text == expected


@pytest.mark.parametrize("exclude", [None, False, True])
def test_the_prompt_is_repeated_unless_excluded(
    server: TritonServer, reference: Reference, exclude: bool | None
) -> None:
    inputs = {"text_input": "echo", "max_tokens": 5, **GREEDY}
    if exclude is not None:
        inputs["exclude_input_in_output"] = exclude
    expected = ("" if exclude else "echo") + reference.text("echo", 5)
    assert infer_grpc(server, **inputs).text == expected
    assert [r.text for r in stream(server, **inputs, stream=False)] == [expected]
    assert generate(server, STREAMED, **inputs)[1]["text_output"] == expected


def test_an_answer_is_cut_at_the_end_of_the_context(server: TritonServer) -> None:
    prompt = "a" * (CONTEXT - 5)
    response = infer_grpc(
        server,
        text_input=prompt,
        max_tokens=100,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
        return_finish_reason=True,
    )
    assert response.value("num_input_tokens") == CONTEXT - 5
    assert response.value("num_output_tokens") == 5
    assert response.finish == "length"


# Streaming


def test_a_stream_comes_in_pieces_and_its_last_piece_is_marked(
    server: TritonServer, reference: Reference
) -> None:
    with Stream(
        server,
        text_input="pieces",
        max_tokens=TOKENS,
        stream=True,
        return_finish_reason=True,
        return_num_output_tokens=True,
        return_num_input_tokens=True,
        **GREEDY,
    ) as opened:
        responses = list(opened)
        assert opened.is_silent(), "an empty response after the last one"
    *others, last = responses
    assert len(others) > 3
    assert [r.final for r in others] == [False] * len(others)
    assert {r.finish for r in others} == {"None"}
    assert {r.value("num_input_tokens") for r in responses} == {len("pieces")}
    counts = [int(r.value("num_output_tokens")) for r in responses]
    assert min(counts) >= 1
    assert sum(counts) == TOKENS
    assert last.final
    assert last.finish == "length"
    assert joined(responses) == reference.text("pieces", TOKENS)


def test_a_stream_of_one_token_is_one_response(server: TritonServer, reference: Reference) -> None:
    [response] = stream(server, text_input="one", max_tokens=1, **GREEDY)
    assert response.final
    assert response.text == reference.text("one", 1)


def test_without_stream_there_is_exactly_one_response(server: TritonServer) -> None:
    with Stream(server, text_input="one", max_tokens=TOKENS, stream=False, **GREEDY) as opened:
        assert opened.next().final
        assert opened.is_silent()


def test_events_carry_one_response_each(server: TritonServer, reference: Reference) -> None:
    events = generate_stream(
        server,
        text_input="events",
        max_tokens=TOKENS,
        stream=True,
        return_finish_reason=True,
        return_num_output_tokens=True,
        **GREEDY,
    )
    assert len(events) > 3
    assert sum(event["num_output_tokens"] for event in events) == TOKENS
    assert [e["finish_reason"] for e in events] == ["None"] * (len(events) - 1) + ["length"]
    assert "".join(e["text_output"] for e in events) == reference.text("events", TOKENS)


def test_characters_of_several_bytes_come_whole(server: TritonServer, reference: Reference) -> None:
    seen: set[int] = set()
    for prompt in PROMPTS:
        responses = stream(server, text_input=prompt, max_tokens=100, **GREEDY)
        *others, last = [response.text for response in responses]
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(others)
        assert "".join([*others, last]) == reference.text(prompt, 100)
        seen |= {len(c.encode()) for text in others for c in text}
    assert seen == {1, 2, 3, 4}, "the answers hold characters of every length"


def test_half_a_character_is_said_only_where_the_answer_ends(
    server: TritonServer, reference: Reference
) -> None:
    tokens = reference.tokens(PROMPTS[1], 100)
    cut = next(i for i, token in enumerate(tokens) if token == 0xF0) + 2
    responses = stream(server, text_input=PROMPTS[1], max_tokens=cut, **GREEDY)
    text = joined(responses)
    assert text == byte_tokenizer().decode(tokens[:cut])
    assert text.index("\N{REPLACEMENT CHARACTER}") == len(text) - 1
    assert infer_grpc(server, text_input=PROMPTS[1], max_tokens=cut, **GREEDY).text.endswith(text)


# Many at a time


def test_64_streams_at_once_each_get_the_answer_they_get_alone(
    server: TritonServer, reference: Reference
) -> None:
    requests: list[dict[str, Any]] = [
        {"text_input": f"{i} {'stream ' * (i % 7)}", "max_tokens": 48 + i % 5, **GREEDY}
        for i in range(BATCH)
    ]
    for i in range(0, BATCH, 2):  # and half of them sampled
        requests[i] |= {"temperature": 0.8, "top_p": 0.9 if i % 4 else 1.0, "seed": i}
    alone = [ask_stream(server, **request) for request in requests]
    spans: list[tuple[float, float]] = []

    def timed(request: dict[str, Any]) -> str:
        with Stream(server, stream=True, **request) as opened:
            responses = [opened.next()]
            first = time.monotonic()
            responses += opened
            spans.append((first, time.monotonic()))
        return joined(responses)

    together = at_once([lambda request=request: timed(request) for request in requests])
    assert together == alone
    assert [together[i] for i in range(1, BATCH, 2)] == [
        reference.text(requests[i]["text_input"], requests[i]["max_tokens"])
        for i in range(1, BATCH, 2)
    ]
    most = max(sum(a <= moment <= b for a, b in spans) for moment, _ in spans)
    assert most >= BATCH // 2, "they did not run at the same time"


def test_bad_requests_among_good_ones_of_every_client(
    server: TritonServer, reference: Reference
) -> None:
    def bad(i: int) -> tuple[str, str]:
        call = (stream, infer_grpc, infer_http)[i % 3]
        if i % 2:
            return error_of(call, server, text_input="bad", temperature=-1.0 - i)
        ids = [1, 2, 1000 + i]
        return error_of(call, server, input_ids=ids, max_tokens=TOKENS)

    def good(i: int) -> str:
        ask = CLIENTS[i % len(CLIENTS)]
        return ask(server, text_input=f"good {i}", max_tokens=TOKENS, **GREEDY)

    calls: list[Callable[[], Any]] = []
    for i in range(28):
        calls += [lambda i=i: good(i), lambda i=i: bad(i)]
    results = at_once(calls)
    assert results[0::2] == [reference.text(f"good {i}", TOKENS) for i in range(28)]
    for i, (status, message) in enumerate(results[1::2]):
        assert status == ("None", "StatusCode.INVALID_ARGUMENT", "400")[i % 3]
        assert (f"temperature={-1.0 - i}" if i % 2 else f"token id {1000 + i}") in message


# Sampling parameters


SPELLINGS: dict[str, dict[str, Any]] = {
    "tensors": {"max_tokens": 30, "temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 5},
    "json": {
        "sampling_parameters": json.dumps(
            {"max_tokens": 30, "temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 5}
        )
    },
    "json strings": {
        "sampling_parameters": json.dumps(
            {"max_tokens": "30", "temperature": "0.8", "top_k": "9", "top_p": "0.9", "seed": "5"}
        )
    },
    "parameters": {
        "parameters": {
            "max_tokens": 30,
            "temperature": "0.8",
            "top_k": 9,
            "top_p": "0.9",
            "seed": 5,
        }
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_knob_means_the_same_however_it_is_given(server: TritonServer, spelling: str) -> None:
    expected = infer_grpc(server, text_input="knobs", **SPELLINGS["tensors"]).text
    assert len(expected.encode()) > 25, "the answer is as long as was asked for"
    given = SPELLINGS[spelling]
    assert infer_grpc(server, text_input="knobs", **given).text == expected
    assert infer_http(server, text_input="knobs", **given).text == expected
    with Stream(server, text_input="knobs", stream=True, **given) as opened:
        assert "knobs" + joined(list(opened)) == expected


def test_generate_takes_knobs_that_are_no_input_as_parameters(
    server: TritonServer, reference: Reference
) -> None:
    tokens = reference.tokens("stop at a token", TOKENS)
    body = {"text_input": "stop at a token", "max_tokens": TOKENS, **GREEDY, "anything": "else"}
    status, answer = generate(server, UNARY, **body)
    assert (status, answer["text_output"]) == (
        200,
        "stop at a token" + byte_tokenizer().decode(tokens),
    )
    status, answer = generate(server, UNARY, **body, best_of=2)
    assert status == 400
    assert "best_of=2 is not supported" in answer["error"]


def count(server: TritonServer, **given: Any) -> int:
    response = infer_grpc(server, text_input="n", return_num_output_tokens=True, **given)
    return int(response.value("num_output_tokens"))


def test_sampling_parameters_come_before_tensors_before_parameters(server: TritonServer) -> None:
    json_7, tensor_5, parameter_3 = '{"max_tokens": 7}', 5, {"max_tokens": 3}
    assert count(server) == 16
    assert count(server, parameters=parameter_3) == 3
    assert count(server, parameters=parameter_3, max_tokens=tensor_5) == 5
    assert count(server, max_tokens=tensor_5, sampling_parameters=json_7) == 7
    assert (
        count(server, parameters=parameter_3, max_tokens=tensor_5, sampling_parameters=json_7) == 7
    )
    # Where sampling_parameters is given, request parameters are not merged in but ignored.
    assert count(server, parameters=parameter_3, sampling_parameters="{}") == 16


def test_what_leaves_one_token_to_choose_is_greedy(
    server: TritonServer, reference: Reference
) -> None:
    expected = reference.text("narrow", TOKENS)
    for knobs in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ask_grpc(server, text_input="narrow", max_tokens=TOKENS, **knobs) == expected, knobs
    assert ask_grpc(server, text_input="narrow", max_tokens=TOKENS) != expected


def test_without_a_seed_answers_differ(server: TritonServer) -> None:
    answers = {ask_grpc(server, text_input="dice", max_tokens=TOKENS) for _ in range(3)}
    assert len(answers) == 3


def test_a_seeded_answer_is_the_same_in_a_busy_batch(server: TritonServer) -> None:
    inputs = {"text_input": "same", "max_tokens": TOKENS, "temperature": 1.0, "seed": 2**64 - 1}
    alone = ask_stream(server, **inputs)
    noise = {"text_input": "noise", "max_tokens": 100, "temperature": 1.5}
    calls = [lambda: ask_stream(server, **inputs)] * 8 + [lambda: ask_grpc(server, **noise)] * 24
    assert set(at_once(calls)[:8]) == {alone}


# Stops


def stop_inputs(stops: list[str]) -> list[dict[str, Any]]:
    """Every way to give stop strings."""
    return [
        {"stop_words": stops, "max_tokens": 100, **GREEDY},
        {
            "sampling_parameters": json.dumps(
                {"stop": stops if len(stops) > 1 else stops[0], "max_tokens": 100, "temperature": 0}
            )
        },
        {
            "stop_words": stops[:1],
            "sampling_parameters": json.dumps(
                {"stop": stops[1:], "max_tokens": 100, "temperature": 0}
            ),
        },
    ]


@pytest.mark.parametrize("form", range(3), ids=["tensor", "json", "both"])
@pytest.mark.parametrize(("at", "length"), [(0, 2), (8, 1), (20, 3), (41, 9)])
def test_a_stop_string_ends_the_answer_before_it(
    server: TritonServer, reference: Reference, form: int, at: int, length: int
) -> None:
    # Each character is one token or several: any string of two and more crosses their borders.
    whole = reference.text("stops", 100)
    stop = whole[at : at + length]
    given = stop_inputs([stop, "never said"])[form]
    flags = {"return_finish_reason": True, "return_num_output_tokens": True}
    responses = stream(server, text_input="stops", **given, **flags)
    expected = whole[: whole.index(stop)]
    assert joined(responses) == expected
    assert responses[-1].finish == "stop"
    counted = sum(int(r.value("num_output_tokens")) for r in responses)
    assert counted == len((expected + stop).encode()), "nothing is computed after the stop"
    response = infer_http(server, text_input="stops", **given, **flags)
    assert response.text == "stops" + expected
    assert response.finish == "stop"


def test_what_only_begins_like_a_stop_string_is_said(
    server: TritonServer, reference: Reference
) -> None:
    whole = reference.text("stops", 60)
    stops = [whole[10:14] + "#", whole[-3:] + "#"]
    responses = stream(
        server,
        text_input="stops",
        max_tokens=60,
        stop_words=stops,
        return_finish_reason=True,
        **GREEDY,
    )
    assert joined(responses) == whole
    assert responses[-1].finish == "length"


def test_a_stop_token_ends_the_answer_and_is_not_said(
    server: TritonServer, reference: Reference
) -> None:
    tokens = reference.tokens("stops", 60)
    stop = tokens[30]
    at = tokens.index(stop)
    knobs = json.dumps({"stop_token_ids": [stop], "max_tokens": 60, "temperature": 0})
    flags = {"return_finish_reason": True, "return_num_output_tokens": True}
    responses = stream(server, text_input="stops", sampling_parameters=knobs, **flags)
    assert joined(responses) == byte_tokenizer().decode(tokens[:at])
    assert responses[-1].finish == "stop"
    assert sum(int(r.value("num_output_tokens")) for r in responses) == at + 1


# What is returned beside the text


FLAGS = {
    "return_finish_reason": "finish_reason",
    "return_cumulative_logprob": "cumulative_logprob",
    "return_logprobs": "logprobs",
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": "num_output_tokens",
}


def last_of_stream(server: TritonServer, **inputs: Any) -> Response:
    return stream(server, **inputs)[-1]


@pytest.mark.parametrize("call", [last_of_stream, infer_grpc, infer_http])
@pytest.mark.parametrize("flag", FLAGS)
def test_an_output_is_sent_if_its_flag_is_set(
    server: TritonServer, call: Callable[..., Response], flag: str
) -> None:
    inputs = {"text_input": "flags", "max_tokens": 3}
    assert set(call(server, **inputs).outputs) == {"text_output"}
    others = dict.fromkeys(FLAGS.keys() - {flag}, False)
    assert set(call(server, **inputs, **others, **{flag: True}).outputs) == {
        "text_output",
        FLAGS[flag],
    }


def test_logprobs_are_those_of_transformers(server: TritonServer, reference: Reference) -> None:
    knobs = json.dumps({"logprobs": 2, "max_tokens": TOKENS, "temperature": 0})
    inputs = {
        "text_input": "logprobs",
        "sampling_parameters": knobs,
        "return_logprobs": True,
        "return_cumulative_logprob": True,
    }
    tokens = reference.tokens("logprobs", TOKENS)
    expected = reference.logprobs("logprobs", TOKENS)
    responses = stream(server, **inputs)
    unary = infer_grpc(server, **inputs)
    streamed = [row for r in responses for row in json.loads(r.value("logprobs"))]
    assert streamed == json.loads(unary.value("logprobs"))
    chosen = [row[str(token)] for row, token in zip(streamed, tokens, strict=True)]
    assert [one["logprob"] for one in chosen] == pytest.approx(expected, abs=1e-4)
    assert {one["rank"] for one in chosen} == {1}
    assert {len(row) for row in streamed} == {2}, "the chosen one is among the two likeliest"
    for response in (responses[-1], unary):
        assert response.value("cumulative_logprob") == pytest.approx(sum(expected), abs=1e-3)


# Errors


BAD: list[tuple[str, dict[str, Any], list[str]]] = [
    ("nothing", {}, ["text_input, input_ids, messages", "none of them"]),
    ("two prompts", {"text_input": "a", "input_ids": [1]}, ["text_input and input_ids"]),
    ("empty prompt", {"text_input": ""}, ["empty"]),
    ("long prompt", {"text_input": "a" * CONTEXT}, [str(CONTEXT), str(CONTEXT - 1)]),
    ("token id", {"input_ids": [1, 256]}, ["input_ids", "256", "0 to 255"]),
    ("negative token id", {"input_ids": [-1]}, ["input_ids", "-1", "0 to 255"]),
    ("not UTF-8", {"text_input": b"caf\xe9"}, ["text_input", "UTF-8"]),
    ("temperature", {"text_input": "a", "temperature": -1.0}, ["temperature=-1.0", ">= 0"]),
    ("nan", {"text_input": "a", "temperature": float("nan")}, ["temperature=nan", ">= 0"]),
    ("infinite", {"text_input": "a", "temperature": float("inf")}, ["temperature=inf", "finite"]),
    ("top_p", {"text_input": "a", "top_p": 1.5}, ["top_p=1.5", "<= 1"]),
    ("top_p 0", {"text_input": "a", "top_p": 0.0}, ["top_p=0.0", "> 0"]),
    ("top_k", {"text_input": "a", "top_k": -2}, ["top_k=-2", ">= -1"]),
    ("max_tokens", {"text_input": "a", "max_tokens": 0}, ["max_tokens=0", ">= 1"]),
    (
        "seed",
        {"text_input": "a", "sampling_parameters": '{"seed": -2}'},
        ["sampling_parameters", "seed=-2", "0 to 2^64 - 1"],
    ),
    (
        "unknown key",
        {"text_input": "a", "sampling_parameters": '{"temprature": 1}'},
        ["sampling_parameters", "'temprature'", "temperature"],
    ),
    (
        "no number",
        {"text_input": "a", "sampling_parameters": '{"temperature": "hot"}'},
        ["sampling_parameters", "temperature='hot'", "float"],
    ),
    ("no JSON", {"text_input": "a", "sampling_parameters": "{"}, ["sampling_parameters='{'"]),
    (
        "no object",
        {"text_input": "a", "sampling_parameters": "[1]"},
        ["sampling_parameters='[1]'", "object"],
    ),
    (
        "stream and prompt",
        {"text_input": "a", "stream": True, "exclude_input_in_output": False},
        ["exclude_input_in_output=false", "stream=true"],
    ),
]
UNSUPPORTED = {"text_input": "a", "sampling_parameters": '{"best_of": 2}'}


def opened_stream(server: TritonServer, **inputs: Any) -> Response:
    """The first response of a stream that was not asked to stream: its only one, or its error."""
    with Stream(server, **inputs) as one:
        return one.next()


@pytest.mark.parametrize(("name", "inputs", "parts"), BAD, ids=[bad[0] for bad in BAD])
def test_a_bad_request_is_told_what_is_wrong(
    server: TritonServer, name: str, inputs: dict[str, Any], parts: list[str]
) -> None:
    inputs = inputs or {"max_tokens": 3}  # Triton itself refuses a request without any input
    for call, expected in (
        (opened_stream, "None"),
        (infer_grpc, "StatusCode.INVALID_ARGUMENT"),
        (infer_http, "400"),
    ):
        status, message = error_of(call, server, **inputs)
        assert status == expected
        for part in parts:
            assert part in message
    if name not in ("not UTF-8", "nan", "infinite"):  # which JSON cannot say
        status, body = generate(server, STREAMED, **inputs)
        assert status == 400
        for part in parts:
            assert part in body["error"]


def test_what_is_not_supported_has_a_status_of_its_own(server: TritonServer) -> None:
    for call, expected in (
        (opened_stream, "None"),
        (infer_grpc, "StatusCode.UNIMPLEMENTED"),
        (infer_http, "501"),
    ):
        status, message = error_of(call, server, **UNSUPPORTED)
        assert (status, "best_of=2 is not supported" in message) == (expected, True)
    # tritonserver 2.51 answers 400 to every error of /generate, whatever its code.
    assert generate(server, STREAMED, **UNSUPPORTED)[0] == 400


def test_the_door_for_one_response_refuses_to_stream(server: TritonServer) -> None:
    status, message = error_of(infer_grpc, server, text_input="a", stream=True)
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "stream=true" in message


def test_two_prompts_in_one_request_are_refused(server: TritonServer) -> None:
    tensor = tritonclient.grpc.InferInput("text_input", [2, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([["a"], ["b"]], dtype=object))
    with contextlib.closing(grpc_client(server)) as client:
        status, message = error_of(client.infer, UNARY, [tensor])
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "text_input has shape [2, 1]" in message


def test_generate_stream_tells_an_error_too(server: TritonServer) -> None:
    body = {"text_input": "a", "stream": True, "top_p": 2}
    with post(server, f"/v2/models/{STREAMED}/generate_stream", body) as response:
        assert response.status == 400
        event = response.read().decode()
    assert "top_p=2" in json.loads(event.removeprefix("data: "))["error"]


# Processes


def maps_torch(process: psutil.Process) -> bool:
    return any("libtorch" in mapped.path for mapped in process.memory_maps())


def test_all_front_ends_share_the_one_process_that_holds_the_weights(server: TritonServer) -> None:
    [engine] = engines(server)
    front_ends = stubs(server)
    assert len(front_ends) == 8, "two instances of each door"
    # Guides of clients are checked in small processes that are neither.
    others = {p.pid for p in processes(server) if "fi_runtime.guide_checker" not in command_of(p)}
    assert others == {server.pid, engine.pid, *(p.pid for p in front_ends)}
    assert maps_torch(engine)
    for process in (psutil.Process(server.pid), *front_ends):
        assert not maps_torch(process), process
    rss = {p.pid: p.memory_info().rss for p in (engine, *front_ends)}
    assert max(rss[p.pid] for p in front_ends) < rss[engine.pid] / 2, rss
