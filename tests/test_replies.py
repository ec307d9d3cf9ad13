"""How an answer's tokens become responses, whatever groups they come and go in."""

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fi_runtime.config import RequestLimits
from fi_runtime.frontend.replies import Answer, Grouping, Tensors
from fi_runtime.frontend.requests import Served, parse_request
from fi_runtime.messages import EngineInfo, Output
from tests.test_text import BYTES

INFO = EngineInfo(pid=1, vocab_size=256, max_context=1000, tokenizer="")
SERVED = Served.of(Path("nowhere"), BYTES, INFO, RequestLimits())
FLAGS = (
    "stream",
    "return_finish_reason",
    "return_num_output_tokens",
    "return_token_ids",
    "return_cumulative_logprob",
)


def answer(grouping: Grouping, n: int = 1, **knobs: object) -> Answer:
    sampling = json.dumps({"n": n, **knobs}).encode()
    tensors = {
        "text_input": np.array([b"a"], dtype=object),
        "sampling_parameters": np.array([sampling], dtype=object),
        **{flag: np.array([True]) for flag in FLAGS},
    }
    request = parse_request(tensors, {}, SERVED)
    return Answer(request, BYTES, grouping)


def send(growing: Answer) -> list[Tensors]:
    """All responses that there are, as a front end sends them."""
    sent = []
    while growing.has_response:
        sent.append(growing.response())
    return sent


def text_of(responses: list[Tensors], sample: int = 0) -> str:
    return "".join(response["text_output"][sample].decode() for response in responses)


@given(
    text=st.text(min_size=1, max_size=40),
    steps=st.lists(st.integers(1, 9), min_size=1),
    least=st.integers(1, 6),
    most=st.integers(1, 6),
)
def test_groups_are_as_large_as_they_may_be_and_say_everything(
    text: str, steps: list[int], least: int, most: int
) -> None:
    tokens = BYTES.encode(text).ids
    most = max(least, most)
    growing = answer(Grouping(least, most))
    sent, at, number = [], 0, 0
    while at < len(tokens):
        part = tokens[at : at + steps[number % len(steps)]]
        at, number = at + len(part), number + 1
        finish = "length" if at == len(tokens) else None
        growing.take(0, Output(0, part, None, finish))
        sent += send(growing)
    assert text_of(sent) == text
    assert growing.is_over
    assert [t for response in sent for t in response["token_ids"].tolist()] == tokens
    sizes = [int(response["num_output_tokens"][0]) for response in sent]
    assert all(least <= size <= most for size in sizes[:-1])
    assert 1 <= sizes[-1] <= most
    finishes = [response["finish_reason"][0] for response in sent]
    assert finishes == [b"None"] * (len(sent) - 1) + [b"length"]


def test_no_token_waits_where_no_interval_asks_for_it() -> None:
    growing = answer(Grouping())
    for token in BYTES.encode("waits not").ids:
        growing.take(0, Output(0, [token]))
        [response] = send(growing)
        assert response["num_output_tokens"].tolist() == [1]


def test_samples_keep_their_own_ends_when_groups_are_bounded() -> None:
    growing = answer(Grouping(most=2), n=2, stop=["c"])
    growing.take(0, Output(0, BYTES.encode("abcde").ids))
    growing.take(1, Output(1, BYTES.encode("x").ids, None, "length"))
    sent = send(growing)
    assert [text_of(sent, sample) for sample in range(2)] == ["ab", "x"]
    assert [r["num_output_tokens"].tolist() for r in sent] == [[2, 1], [1, 0]]
    assert sent[-1]["finish_reason"].tolist() == [b"stop", b"length"]
    assert sent[0]["finish_reason"].tolist() == [b"None", b"length"]
