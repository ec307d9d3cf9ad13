"""What FlashInfer is told, on the CPU: its wrappers are stood in for by what its documentation says
that they compute. The real ones are for tests/test_gpu.py."""

import contextlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fi_runtime.attention import flashinfer as module
from fi_runtime.attention.base import Attention, AttentionKind, StepLayout, spare_layout
from fi_runtime.attention.flashinfer import (
    FlashInferAttention,
    GraphDecodeAttention,
    Limits,
    PieceAttention,
)
from fi_runtime.attention.reference import ReferenceAttention
from fi_runtime.cache.kv_cache import CacheShape, KVCache
from fi_runtime.kernels.heads import Heads
from fi_runtime.kernels.merge import merge_parts
from tests.layouts import make_layout, some_counts

HEAD_DIM = 64
COS_SIN = torch.randn(2000, HEAD_DIM)
CPU = torch.device("cpu")


class Wrapper:
    """Plans from the arrays that it is given, in its own buffers where it has any.

    A plan lies in the workspace: it is gone once another wrapper has planned in the same one.
    """

    def __init__(self, *_: Any, use_tensor_cores: bool = False, backend: str = "auto") -> None:
        self._backend = backend
        self._pin_memory_int_workspace_buffer: torch.Tensor | None = None
        self.staged: list[int] = []

    def reset_workspace_buffer(self, partial: torch.Tensor, plan: torch.Tensor) -> None:
        self.workspace, self.partial = plan, partial

    def workspace_size(self, *_: Any, **__: Any) -> tuple[int, int]:
        return 1, 1

    def plan(
        self,
        starts: Any,
        pages: Any,
        last: Any,
        *shape: int,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert self._pin_memory_int_workspace_buffer is not None
        self.staged.append(id(self._pin_memory_int_workspace_buffer))
        self.planned = (torch.arange(len(last) + 1), starts, pages, last)
        self.kind = window_left, logits_soft_cap, sm_scale
        self.dtypes = q_data_type, kv_data_type
        self.workspace[:8].view(torch.int64)[0] = self.stamp()

    def stamp(self) -> int:
        """Of what is planned, as it is in the buffers now."""
        return hash((self.kind, *(tuple(each.tolist()) for each in self.planned[1::2])))

    def run(
        self,
        q: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert self.workspace[:8].view(torch.int64)[0] == self.stamp(), "another has planned here"
        assert (q.dtype, cache[0].dtype) == self.dtypes
        window_left, soft_cap, scale = self.kind
        query_starts, starts, pages, last = (each.tolist() for each in self.planned)
        assert len(q) == query_starts[-1]
        out = torch.empty_like(q) if out is None else out
        sums = torch.empty(q.shape[:2])
        for s, length in enumerate(last):
            own = pages[starts[s] : starts[s + 1]]
            context = (len(own) - 1) * cache[0].shape[1] + length
            k, v = (side[own].flatten(0, 1)[:context].to(q.dtype) for side in cache)
            rows = slice(query_starts[s], query_starts[s + 1])
            count = rows.stop - rows.start
            back = context - count + torch.arange(count)[:, None] - torch.arange(context)
            seen = (back >= 0) & ((back <= window_left) | (window_left == -1))
            k, v = (side.repeat_interleave(q.shape[1] // side.shape[1], dim=1) for side in (k, v))
            scores = torch.einsum("qhd,chd->hqc", q[rows], k) * (scale or q.shape[-1] ** -0.5)
            if soft_cap:
                scores = soft_cap * (scores / soft_cap).tanh()
            scores = scores.masked_fill(~seen, -torch.inf)
            out[rows] = torch.einsum("hqc,chd->qhd", scores.softmax(-1), v)
            sums[rows] = scores.logsumexp(-1).T / np.log(2)
        return (out, sums) if return_lse else out


class Prefill(Wrapper):
    def plan(
        self,
        query_starts: Any,
        *arguments: Any,
        causal: bool = False,
        max_token_per_sequence: int = 0,
        **options: Any,
    ) -> None:
        assert causal
        assert max_token_per_sequence == int(query_starts.diff().max())
        super().plan(*arguments, **options)
        self.planned = (query_starts, *self.planned[1:])


class Graph(Wrapper):
    """From buffers that never move, for a fixed number of sequences."""

    def __init__(
        self, _: Any, starts: Any, pages: Any, last: Any, *layout: str, **options: Any
    ) -> None:
        super().__init__(**options)
        self.buffers = starts, pages, last

    def plan(self, starts: Any, pages: Any, last: Any, *shape: int, **options: Any) -> None:
        assert len(last) == len(self.buffers[2])
        for buffer, given in zip(self.buffers, (starts, pages, last), strict=True):
            buffer[: len(given)].copy_(given)
        super().plan(*self.buffers, *shape, **options)

    def plan_again(self, *given: Any, **options: Any) -> None:
        """For what the buffers will have: only another wrapper runs from it."""
        super().plan(*given, **options)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(
        __version__="0.6.18",
        BatchDecodeWithPagedKVCacheWrapper=Wrapper,
        BatchPrefillWithPagedKVCacheWrapper=Prefill,
        CUDAGraphBatchDecodeWithPagedKVCacheWrapper=Graph,
        fast_decode_plan=Graph.plan_again,
    )
    monkeypatch.setattr(module, "flashinfer", lambda: stand_in)
    event = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))


LOCAL, CAPPED = (AttentionKind(0.2, window=20), AttentionKind(0.7, window=1, soft_cap=1.5))


@pytest.fixture(
    params=[
        (8, 2, 1, None, torch.float32, False),
        (8, 2, 16, (LOCAL, CAPPED), torch.float32, False),
        (8, 2, 16, (LOCAL, CAPPED), torch.float32, True),
        (2, 2, 16, None, torch.float32, False),
        (2, 2, 16, None, torch.float32, True),
        (2, 2, 16, [LOCAL] * 2, torch.float32, False),
        (8, 2, 16, None, torch.float8_e4m3fn, False),
    ],
    ids=[
        "8:2, pages of 1",
        "8:2, two kinds",
        "8:2, two kinds, sinks",
        "2:2",
        "2:2, sinks",
        "2:2, a window",
        "8:2, fp8",
    ],
)
def pair(request: pytest.FixtureRequest) -> SimpleNamespace:
    """Attention through the stand-in and the reference, over caches of the same contents."""
    heads, kv_heads, page_size, kinds, dtype, sinks = request.param
    shape = CacheShape(2, 4000 // page_size, page_size, kv_heads, HEAD_DIM)
    caches = [KVCache(shape, dtype, CPU) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    caches[0].data.copy_(torch.randn(caches[0].data.shape, generator=generator))
    caches[1].data.copy_(caches[0].data)
    limits = Limits(4096, 64, 2000, 200)
    return SimpleNamespace(
        ours=FlashInferAttention(caches[0], heads, limits, kinds=kinds, dtype=torch.float32),
        reference=ReferenceAttention(caches[1], kinds),
        caches=caches,
        shape=shape,
        heads=Heads(
            heads,
            kv_heads,
            HEAD_DIM,
            COS_SIN,
            sinks=torch.linspace(-2.0, 4.0, heads) if sinks else None,
        ),
    )


def compare(pair: SimpleNamespace, attention: Attention, layout: StepLayout, padding: int) -> None:
    tokens = int(layout.query_starts[-1])
    heads = pair.heads
    qkv = torch.randn(tokens + padding, (heads.heads + 2 * heads.kv_heads) * HEAD_DIM)
    attention.plan(layout)
    pair.reference.plan(layout)
    for layer in range(pair.shape.layers):
        found = attention(layer, qkv, heads)[:tokens]
        expected = pair.reference(layer, qkv[:tokens], heads)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # All pages but the spare one, which padding writes to.
    assert torch.equal(*(cache.data[:, :, 1:].float() for cache in pair.caches))


@pytest.mark.parametrize("contexts", [[1], [300, 1, 17], [16, 15, 32, 33]], ids=str)
def test_prefill_decode_and_both(pair: SimpleNamespace, contexts: list[int]) -> None:
    rng = random.Random(len(contexts))
    for counts in some_counts(contexts, rng):
        layout = make_layout(counts, contexts, pair.shape.page_size, rng, pair.shape.pages)
        compare(pair, pair.ours, layout, 0)


def test_several_tokens_after_one_are_refused(pair: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="several tokens must come before"):
        pair.ours.plan(spare_layout([1, 2], pair.shape.page_size))


@pytest.mark.parametrize("size", [1, 4, 8])
def test_padding_touches_no_page_of_a_sequence(pair: SimpleNamespace, size: int) -> None:
    rng, graph = random.Random(size), pair.ours.for_graph(size)
    for _ in range(6):
        contexts = [rng.randint(1, 100) for _ in range(rng.randint(1, size))]
        ones = [1] * len(contexts)
        layout = make_layout(ones, contexts, pair.shape.page_size, rng, pair.shape.pages)
        compare(pair, graph, layout, size - len(contexts))


def test_tokens_apart_attend_as_their_prompts_do(pair: SimpleNamespace) -> None:
    rng, graph = random.Random(3), pair.ours.for_graph(200)
    for _ in range(6):
        contexts = [rng.randint(1, 100) for _ in range(rng.randint(1, 8))]
        counts = [rng.randint(1, min(context, 24)) for context in contexts]
        layout = make_layout(counts, contexts, pair.shape.page_size, rng, pair.shape.pages)
        compare(pair, Apart(graph, pair.shape.page_size), layout, 200 - sum(counts))


class Apart:
    """What a step with short prompts does."""

    def __init__(self, attention: GraphDecodeAttention, page_size: int) -> None:
        self._attention, self._page_size = attention, page_size

    def plan(self, layout: StepLayout) -> None:
        self._attention.plan(layout.apart(self._page_size))

    def __call__(self, layer: int, qkv: torch.Tensor, heads: Heads) -> torch.Tensor:
        return self._attention(layer, qkv, heads)


class Replayed:
    """What a step in pieces does, in the order that its graphs are replayed in."""

    def __init__(self, pieces: PieceAttention, size: int) -> None:
        self._pieces, self._size, self._count = pieces, size, 0

    def plan(self, layout: StepLayout) -> None:
        self._pieces.plan(layout)
        self._count = int(layout.query_starts[-1])

    def __call__(self, layer: int, qkv: torch.Tensor, heads: Heads) -> torch.Tensor:
        assert len(qkv) == self._size
        self._pieces.place(layer, qkv, heads)
        self._pieces.attend(layer, self._count)
        return self._pieces.out


def test_steps_in_pieces_write_only_their_own_pages(pair: SimpleNamespace) -> None:
    rng, pieces = random.Random(7), pair.ours.for_pieces(200)
    for _ in range(6):
        contexts = [rng.randint(1, 100) for _ in range(rng.randint(1, 8))]
        counts = [rng.randint(1, min(context, 24)) for context in contexts]
        layout = make_layout(counts, contexts, pair.shape.page_size, rng, pair.shape.pages)
        size = sum(counts) + rng.randint(0, 8)
        compare(pair, Replayed(pieces, size), layout, size - sum(counts))


def test_sequences_may_have_more_page_numbers_than_there_are_pages(pair: SimpleNamespace) -> None:
    """As those that begin with the same tokens have, each with a last page of its own."""
    page_size, context = pair.shape.page_size, 2000
    count = -(-context // page_size)
    pages = [[*range(1, count), count + number] for number in range(64)]

    def layout_of(counts: list[int]) -> StepLayout:
        layout = spare_layout(counts, page_size, [context] * len(counts))
        return replace(layout, pages=np.concatenate(pages[: len(counts)]).astype(np.int32))

    compare(pair, pair.ours.for_graph(64), layout_of([1] * 64), 0)
    # What is new of prompts is in their own pages.
    counts = [min(page_size, context % page_size + 3), *[1] * 63]
    compare(pair, Replayed(pair.ours.for_pieces(200), sum(counts)), layout_of(counts), 0)


def test_plans_that_follow_each_other_are_staged_apart(pair: SimpleNamespace) -> None:
    graph = pair.ours.for_graph(2)
    wrappers = [each._wrapper for each in graph._planning._of_kind.values()]
    for _ in range(4):
        graph.plan(make_layout([1], [5], pair.shape.page_size, random.Random(0), 50))
    for staged in (wrapper.staged for wrapper in wrappers):
        assert len(set(staged)) == 2
        assert all(a != b for a, b in itertools.pairwise(staged))
    assert len({buffer for wrapper in wrappers for buffer in wrapper.staged}) == 2 * len(wrappers)


def test_decode_runs_beside_prompts_until_both_are_done(
    pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Recorded:
        @contextlib.contextmanager
        def launching(self) -> Iterator[None]:
            yield
            done.append("launched beside")

        def join(self) -> None:
            done.append("joined")

    monkeypatch.setattr(pair.ours, "_beside", Recorded())
    run = Wrapper.run

    def recorded(self: Wrapper, *arguments: Any, **options: Any) -> Any:
        done.append(type(self).__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(Wrapper, "run", recorded)
    page_size = pair.shape.page_size
    layout = make_layout([5, 3, 1, 1], [9, 3, 30, 7], page_size, random.Random(0), 200)
    pair.ours.plan(layout)
    qkv = torch.randn(10, (pair.heads.heads + 2 * pair.heads.kv_heads) * HEAD_DIM)
    pair.ours(0, qkv, pair.heads)
    assert done == ["Wrapper", "launched beside", "Prefill", "joined"]
    done.clear()
    monkeypatch.setattr(Prefill, "run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pair.ours(0, qkv, pair.heads)
    assert done[-1] == "joined"
    # What they write while neither waits for the other.
    decode, prompts = (
        {each._wrapper.partial.data_ptr() for each in wrappers._of_kind.values()}
        for wrappers in (pair.ours._decode, pair.ours._prefill)
    )
    assert decode.isdisjoint(prompts)


def test_every_wrapper_is_told_fa2(pair: SimpleNamespace) -> None:
    pair.ours.for_graph(2)
    decode = "fa2" if pair.heads.heads // pair.shape.kv_heads >= 4 else "cuda-core"
    assert pair.ours.runs == {"prefill": "fa2", "decode": decode, "graph decode": decode}


def test_merged_parts_of_a_context_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, heads, keys = 3, 2, 40
    scores = torch.randn((tokens, heads, keys), generator=generator) * 4
    values = torch.randn((heads, keys, 8), generator=generator)
    cuts = [[0, 40], [0, 1, 40], [0, 13, 14, 39, 40]]
    parts, sums = [], []
    for token, bounds in enumerate(cuts):
        for part in itertools.starmap(slice, itertools.pairwise(bounds)):
            own = scores[token, :, part]
            parts.append(torch.einsum("hk,hkd->hd", own.softmax(-1), values[:, part]))
            sums.append(own.logsumexp(-1) / np.log(2))
    starts = torch.tensor([0, 1, 3, 7], dtype=torch.int32)
    out, out_sums = torch.empty(tokens, heads, 8), torch.empty(tokens, heads)
    merge_parts(torch.stack(parts), torch.stack(sums), starts, out, out_sums)
    torch.testing.assert_close(out, torch.einsum("thk,hkd->thd", scores.softmax(-1), values))
    torch.testing.assert_close(out_sums, scores.logsumexp(-1) / np.log(2))
