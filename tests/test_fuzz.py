"""Whatever comes, there is an answer or an error with a message, and nobody else notices."""

import http.client
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from tests.serving import (
    HANG_S,
    STREAMED,
    TYPES,
    UNARY,
    Reference,
    engines,
    grpc_client,
    infer_grpc,
    stubs,
)
from tools.serve import TritonServer

EVERY = 100
"""cases after which a good request is asked"""

settings.register_profile(
    "server",
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
FUZZ = settings(settings.get_profile("server"), max_examples=1010)  # of which a few reach no server

# Small where it would only take long: an answer of thousands of tokens is no bad input.
numbers = st.one_of(
    st.integers(-2, 3),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 2**64, -(2**63), 129, 1.5, -0.0]),
    st.floats(),
)
counts = st.sampled_from([1, 2, 3, 0, -1, 2**40, 1.5, "2", "x", None, True, [1], {}])
words = st.one_of(st.text(max_size=20), st.sampled_from(["", "\x00", "🙂", "a" * 300, "\ud7ff"]))
scalars = st.one_of(numbers, words, st.booleans(), st.none())
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)
KNOBS = [
    "temperature", "top_k", "top_p", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
    "logprobs", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
    "bad_words", "include_stop_str_in_output", "skip_special_tokens", "end_id", "best_of",
    "structured_outputs", "guided_decoding", "prompt_logprobs", "unheard_of",
]  # fmt: skip
sampling = st.builds(
    lambda some, few: json.dumps({"max_tokens": 2, **some, **few}),
    st.dictionaries(st.sampled_from(KNOBS), values, max_size=5),
    st.fixed_dictionaries({}, optional={"max_tokens": counts, "n": counts, "min_tokens": counts}),
)
texts = st.one_of(words.map(str.encode), st.binary(max_size=40), sampling.map(str.encode))
shapes = st.one_of(
    st.just((1, 1)), st.just((1, 3)), st.lists(st.integers(0, 3), max_size=3).map(tuple)
)
SMALL_NUMBERS = {"max_tokens", "min_tokens", "min_length"}


@st.composite
def tensors(draw: st.DrawFn) -> list[Any]:
    """Inputs of the door, most of the right type, some of any type and shape."""
    names = draw(st.lists(st.sampled_from(sorted(TYPES)), max_size=5, unique=True))
    made = []
    if "text_input" not in names and draw(st.booleans()):
        names.append("text_input")
    for name in names:
        right = draw(st.integers(0, 9)) > 0
        datatype, dtype = TYPES[name] if right else TYPES[draw(st.sampled_from(sorted(TYPES)))]
        shape = (1, 1) if draw(st.integers(0, 4)) > 0 else draw(shapes)
        count = int(np.prod(shape, dtype=np.int64))
        if datatype == "BYTES":
            source = sampling.map(str.encode) if name == "sampling_parameters" else texts
            array = np.array([draw(source) for _ in range(count)], dtype=object).reshape(shape)
        elif name in SMALL_NUMBERS:
            array = np.full(shape, draw(st.integers(-2, 4)), dtype=dtype)
        else:
            raw = draw(st.binary(min_size=8 * count, max_size=8 * count))
            array = np.frombuffer(raw, dtype=np.int64).astype(dtype).reshape(shape)
        tensor = tritonclient.grpc.InferInput(name, list(shape), datatype)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


class Watch:
    """Asks good requests between bad ones, and in the end whether all processes are the same."""

    def __init__(self, server: TritonServer, reference: Reference) -> None:
        self.server = server
        self.cases = 0
        self._expected = "good" + reference.text("good", 9)
        self._before = self._served_by()

    def case(self) -> None:
        self.cases += 1
        if self.cases % EVERY == 0:
            self.check()

    def check(self) -> None:
        found = infer_grpc(self.server, text_input="good", max_tokens=9, temperature=0.0)
        assert found.text == self._expected
        assert self._served_by() == self._before

    def _served_by(self) -> set[int]:
        """Processes of server, front ends and engine. Others check guides, and may come and go."""
        all_processes = (*engines(self.server), *stubs(self.server))
        return {self.server.pid, *(process.pid for process in all_processes)}


@pytest.fixture
def watch(server: TritonServer, reference: Reference) -> Iterator[Watch]:
    watch = Watch(server, reference)
    yield watch
    watch.check()


def test_any_tensors_get_an_answer_or_an_error(watch: Watch) -> None:
    client = grpc_client(watch.server)
    answered = 0
    refusals: list[tuple[str, str]] = []

    @FUZZ
    @given(inputs=tensors())
    def fuzz(inputs: list[Any]) -> None:
        nonlocal answered
        watch.case()
        try:
            result = client.infer(UNARY, inputs, client_timeout=HANG_S)
        except InferenceServerException as error:
            refusals.append((error.status(), error.message()))
        else:
            result.as_numpy("text_output")[0, 0].decode()
            answered += 1

    fuzz()
    client.close()
    assert answered > 30
    assert len(refusals) > 300
    for status, message in refusals:
        assert status in ("StatusCode.INVALID_ARGUMENT", "StatusCode.UNIMPLEMENTED"), message
        assert len(message) > 10


def test_any_json_gets_an_answer_or_an_error(watch: Watch) -> None:
    bodies = st.one_of(
        st.builds(
            lambda some, knobs: json.dumps({**some, **knobs}).encode(),
            st.dictionaries(st.sampled_from(sorted(TYPES)) | words, values, max_size=4),
            st.fixed_dictionaries(
                {}, optional={"text_input": words, "sampling_parameters": sampling}
            ),
        ),
        values.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=60),
    )
    doors = st.sampled_from([f"{UNARY}/generate", f"{STREAMED}/generate"])

    @FUZZ
    @given(body=bodies, door=doors)
    def fuzz(body: bytes, door: str) -> None:
        if any(f'"{name}"'.encode() in body for name in SMALL_NUMBERS) and b"1e" in body:
            return
        watch.case()
        status, answer = post(watch.server, door, body)
        assert status in (200, 400, 500)  # 500: the server could not make a request of it
        found = json.loads(answer)
        assert "text_output" in found if status == 200 else len(found["error"]) > 5
        assert "the request failed" not in answer, "which is said of what nobody foresaw"

    fuzz()


@pytest.mark.parametrize("door", [UNARY, STREAMED])
def test_ten_megabytes_are_an_error_or_an_answer(watch: Watch, door: str) -> None:
    size = 10 << 20
    bodies = [
        {"text_input": "a" * size},
        {"text_input": "a", "sampling_parameters": "[" * size},
        {"text_input": "a", "sampling_parameters": json.dumps({"stop": ["x" * size]})},
        {"text_input": "a", "sampling_parameters": json.dumps({"stop": ["xy"] * (size // 8)})},
        {"text_input": "a", "sampling_parameters": json.dumps({"x" * size: 1})},
        {"text_input": "a", "junk": "b" * size},
    ]
    for body in bodies:
        body = {"max_tokens": 2, **body}
        status, answer = post(watch.server, f"{door}/generate", json.dumps(body).encode())
        assert status in (200, 400)
        assert len(answer) < 10_000, "an error does not repeat all that was sent"
        watch.check()


def post(server: TritonServer, door: str, body: bytes) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*server.address("http"), timeout=HANG_S)
    try:
        connection.request("POST", f"/v2/models/{door}", body)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()
