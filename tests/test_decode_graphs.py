"""The numbers of sequences and tokens that graphs are captured for."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fi_runtime.attention.ahead import Ahead
from fi_runtime.config import EngineConfig
from fi_runtime.engine import capture
from fi_runtime.engine.decode_graphs import padded_sizes
from fi_runtime.engine.step_graphs import GraphSizes, padded_piece_counts, padded_token_counts
from fi_runtime.engine.step_inputs import StepInputs


@given(st.integers(1, 4096))
def test_padded_sizes_cover_every_batch_without_much_padding(most: int) -> None:
    sizes = padded_sizes(most)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)
    for smaller, larger in itertools.pairwise(sizes):
        assert larger - smaller <= max(smaller, 16)


@given(st.integers(1, 20_000))
def test_padded_token_counts_cover_every_step_without_much_padding(most: int) -> None:
    sizes = padded_token_counts(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for smaller, larger in itertools.pairwise(sizes):
        assert larger - smaller <= max(smaller, 8)


@given(st.integers(0, 20_000))
def test_padded_piece_counts_end_with_the_maximum(most: int) -> None:
    sizes = padded_piece_counts(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1:] == ([most] if most else [])
    for smaller, larger in itertools.pairwise([0, *sizes]):
        assert larger - smaller <= 128


def test_without_decode_graphs_there_are_none_for_short_prompts() -> None:
    sizes = GraphSizes.of(EngineConfig(checkpoint="", decode_graphs=0, piece_graphs=0))
    assert len(sizes) == 0
    assert max(GraphSizes.of(EngineConfig(checkpoint="", decode_graphs=8)).tokens) == 16


def test_a_step_without_adapters_leaves_none_of_the_one_before() -> None:
    inputs = StepInputs(8, adapters=True, device=torch.device("cpu"))
    tokens, adapters = inputs.first(4)
    assert adapters is not None
    inputs.fill(np.array([5, 6, 7]), np.array([1, 0, 2]))
    assert (tokens.tolist(), adapters.tolist()) == ([5, 6, 7, 0], [1, 0, 2, 0])
    inputs.fill(np.array([8, 9]), None)
    assert (tokens.tolist()[:2], adapters.tolist()[:2]) == ([8, 9], [0, 0])
    assert StepInputs(8, adapters=False, device=torch.device("cpu")).first(4)[1] is None


def test_the_largest_is_captured_first_and_each_is_said_to_take_what_it_took(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = 1000
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1000))
    monkeypatch.setattr(capture, "PROGRESS_S", 0.0)
    caplog.set_level("INFO")
    order = []

    def take(size: int) -> str:
        nonlocal free
        free -= size
        order.append(size)
        return f"graph {size}"

    graphs, nbytes = capture.capture_each([1, 4, 16], "graphs", take)
    assert order == [16, 4, 1]
    assert graphs == {size: f"graph {size}" for size in order}
    assert nbytes == {size: size for size in order}
    assert "capturing graphs: 1 of 3" in caplog.text
    assert "captured graphs of 1, 4, 16 in" in caplog.text


def test_what_is_put_ahead_is_read_once_all_of_it_is_there() -> None:
    ahead = Ahead(torch.device("cpu"), plans=[100, 7], inputs=3, layout=50)
    for step in (1, 2, 3):
        with ahead.filling() as staging:
            staging.inputs.fill_(step)
            staging.layout[:20] = step
            staging.layout_words = 20
            for plan in ahead.plans:
                plan.put.fill_(step)
            for part in (ahead.inputs, ahead.layout, *ahead.plans):
                assert not (part.read == step).any()
        for read in (ahead.inputs.read, ahead.layout.read[:20], *(p.read for p in ahead.plans)):
            assert read.unique().tolist() == [step]
        assert not ahead.layout.read[20:].any()
    assert ahead.inputs.read.dtype == torch.int64
    assert len(ahead.layout.read) == 50
