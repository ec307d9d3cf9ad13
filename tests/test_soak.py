"""The soak in a short form, and that it can fail."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from bench import soak as module
from bench.soak import (
    Answer,
    Case,
    Client,
    Fault,
    Sent,
    Soak,
    answers_alone,
    cases,
    defects,
    memory_mb,
    pages_held,
    row_of,
    soak_server,
)
from tests.serving import STREAMED, UNARY, Stream
from tools.serve import TritonServer

Known = list[tuple[Case, Answer]]


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with soak_server(tmp_path_factory.mktemp("soak")) as server:
        yield server


@pytest.fixture(scope="module")
def known(soaked: TritonServer) -> Known:
    """Of some short requests: greedy, seeded, several answers, guided, with log-probabilities."""
    every = cases()
    some = [one for one in every if one.prompt.endswith("=")][:1]
    for knob in ("seed", "n", "structured_outputs", "logprobs", "stop"):
        some.append(next(one for one in every if knob in one.sampling))
    return answers_alone(soaked, some)


def quiet(text: str) -> None:
    """Instead of printing it."""


def test_an_engine_that_is_killed_under_load_costs_no_answer(
    soaked: TritonServer, known: Known
) -> None:
    before = memory_mb(soaked)
    assert {"engine", "tritonserver", "front ends of llm"} <= before.keys()
    soak = Soak(soaked, known, clients=4, show=quiet)
    soak.traffic(3, fault_every_s=1)
    row = row_of(soak, 3, before, pages_held(soaked))
    assert row["faults"]["engine killed"] == 1
    assert row["sent"] == row["answered"] + row["left"] + row["failed"]
    assert row["answered"] > 10
    assert set(row["failed_by_code"]) <= {"UNAVAILABLE"}
    assert (row["wrong"], row["lost"], row["pages_leaked"]) == (0, 0, 0), soak.lost()


def test_a_wrong_answer_is_found_on_every_way(soaked: TritonServer, known: Known) -> None:
    """One that lacks a character, of each of the clients' ways to ask."""
    wrong = [
        (case, replace(answer, texts=[*answer.texts[:-1], answer.texts[-1][:-1]]))
        for case, answer in known
    ]
    soak = Soak(soaked, wrong, clients=4, show=quiet)
    soak.traffic(2)
    ended = [one for one in soak.sent if one.code == "answered"]
    assert {one.door for one in ended} > {STREAMED, UNARY}
    assert all(one.wrong for one in ended)
    assert defects(row_of(soak, 2, memory_mb(soaked), 0)) == [f"{len(ended)} wrong"]


def test_a_client_that_hangs_is_lost_and_says_where(
    soaked: TritonServer, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, shown = threading.Event(), list[str]()

    def hang(*_: Any, **__: Any) -> Answer:
        released.wait(30)
        return Answer()

    for way in ("stream_grpc", "infer_grpc", "infer_http", "generate", "generate_stream"):
        monkeypatch.setattr(Client, way, hang)
    monkeypatch.setattr(module, "HUNG_S", 0.1)
    soak = Soak(soaked, known, clients=2, show=shown.append)
    soak.traffic(0.1)
    released.set()
    assert [one.code for one in soak.lost()] == ["HUNG", "HUNG"]
    assert all("in hang" in text for text in shown)


def test_pages_that_are_held_are_found(soaked: TritonServer) -> None:
    story = {"text_input": "Once upon a time", "max_tokens": 1900, "end_id": -1}
    with Stream(soaked, stream=True, **story) as opened:
        opened.next()
        assert pages_held(soaked, within_s=0) > 0
    assert pages_held(soaked) == 0


@pytest.mark.parametrize(
    ("texts", "finishes", "logprobs"),
    [(["a"], ["stop"], [-1.0]), (["ab"], ["length"], [-1.0]), (["ab"], ["stop"], [-1.5])],
)
def test_an_answer_is_text_finish_and_logprobs(
    texts: list[str], finishes: list[str], logprobs: list[float]
) -> None:
    answer = Answer()
    answer.add({"text_output": "a", "finish_reason": "None", "logprobs": "null"})
    last = '[{"7": {"logprob": -1.01}, "8": {"logprob": -3.0}}]'
    answer.add({"text_output": ["b"], "finish_reason": ["stop"], "logprobs": [last]})
    assert answer.is_like(Answer(["ab"], ["stop"], [-1.0]))
    assert not answer.is_like(Answer(texts, finishes, logprobs))
    assert not answer.is_like(Answer(["ab"], ["stop"], []))


def test_what_no_fault_explains_is_lost(soaked: TritonServer) -> None:
    soak = Soak(soaked, [], clients=0, show=quiet)
    soak.faults = [
        Fault("engine killed", 10.0, 14.0, frozenset({"UNAVAILABLE"})),
        Fault("front end killed", 50.0, 60.0, None, frozenset({"llm_mortal"})),
    ]
    explained = [
        Sent(STREAMED, 9.0, 11.0, "UNAVAILABLE"),
        Sent("llm_mortal", 49.0, 69.0, "TIMEOUT"),
        Sent(STREAMED, 1.0, 2.0, "answered"),
        Sent(STREAMED, 1.0, 2.0, "left"),
    ]
    lost = [
        Sent(STREAMED, 9.0, 71.0, "TIMEOUT"),
        Sent(STREAMED, 20.0, 21.0, "UNAVAILABLE"),
        Sent(UNARY, 51.0, 52.0, "INTERNAL"),
        Sent(UNARY, 11.0, 12.0, "MALFORMED"),
    ]
    soak.sent = [*explained, *lost]
    assert soak.lost() == lost


GOOD: dict[str, Any] = {
    "answered": 9,
    "wrong": 0,
    "lost": 0,
    "pages_leaked": 0,
    "rss_start_mb": 100.0,
    "rss_end_mb": 101.9,
}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"wrong": 1}, "wrong"),
        ({"lost": 2}, "lost"),
        ({"pages_leaked": 3}, "pages_leaked"),
        ({"rss_end_mb": 102.1}, "memory"),
        ({"answered": 0}, "nothing"),
    ],
)
def test_each_defect_is_named(change: dict[str, Any], word: str) -> None:
    assert defects(GOOD) == []
    [found] = defects({**GOOD, **change})
    assert word in found
