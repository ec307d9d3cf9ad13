"""The GPU path against its plain-torch meaning and against transformers. Needs a GPU."""

import gc
import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import (
    Qwen3Config,
)

from bench.fidelity import config_of, reference, write_family
from fi_runtime.attention import splits
from fi_runtime.attention.ahead import Ahead
from fi_runtime.attention.base import Attention, AttentionKind, StepLayout, spare_layout
from fi_runtime.attention.beside import Beside
from fi_runtime.attention.flashinfer import (
    FlashInferAttention,
    GraphDecodeAttention,
    Limits,
)
from fi_runtime.attention.reference import ReferenceAttention
from fi_runtime.cache.kv_cache import CacheShape, KVCache
from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.engine.core import Engine, Generation
from fi_runtime.engine.decode_graphs import padded_sizes
from fi_runtime.engine.download import token_downloads
from fi_runtime.engine.sampler import filters
from fi_runtime.kernels.activation import silu_and_mul, silu_and_mul_reference
from fi_runtime.kernels.embedding import embed, embed_reference
from fi_runtime.kernels.heads import Heads, Places, place, place_reference
from fi_runtime.kernels.library import flashinfer
from fi_runtime.kernels.merge import merge_parts, merge_parts_reference
from fi_runtime.kernels.norm import add_rms_norm, rms_norm, rms_norm_reference
from fi_runtime.kernels.projection import (
    add_linear,
    add_linear_reference,
    is_few,
    norm_linear,
    norm_linear_reference,
    norm_linear_silu_and_mul,
    norm_linear_silu_and_mul_reference,
)
from fi_runtime.kernels.sampling import Draws, TokenSlots, choose, scratch_for
from fi_runtime.messages import SamplingParams
from tests.draws import (
    PENALTIES,
    assert_follows,
    assert_pairs_follow,
    counts_of_one,
    distribution,
    distribution_of_one,
    drawn,
    draws_for,
)
from tests.layouts import make_layout, some_counts
from tools.demo import tasks
from tools.serve import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
DEMO = ROOT / "model_repository" / "llm" / "demo_checkpoint"


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; NaN where either is not finite."""
    found, expected = found.float().cpu(), expected.float().cpu()
    return float((found - expected).norm() / expected.norm())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(BF16).cuda()


# Kernels


@pytest.mark.parametrize("shape", [(1, 1024), (7, 4096), (300, 256)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape), normal(shape[-1], seed=1)
    expected = rms_norm_reference(x.float(), weight.float(), 1e-6)
    assert error(rms_norm(x, weight, 1e-6), expected) < 5e-3


@pytest.mark.parametrize("tokens", [1, 8, 257])
def test_add_rms_norm(tokens: int) -> None:
    x, residual, weight = normal(tokens, 1024), normal(tokens, 1024, seed=5), normal(1024)
    total = x.float() + residual.float()
    expected = rms_norm_reference(total, weight.float(), 1e-5)
    normed, added = add_rms_norm(x, residual, weight, 1e-5)
    assert error(added, total) < 5e-3
    assert error(normed, expected) < 8e-3


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(BF16, BF16), (torch.float16, torch.float16), (BF16, FP8), (torch.float16, FP8)],
)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (32, 8, 128), (5, 1, 256)])
def test_place(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    kept: torch.dtype,
    normed: bool,
) -> None:
    tokens, page_size = 37, 4
    qkv = normal(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = torch.outer(torch.arange(10.0), torch.rand(head_dim // 2)).cuda()
    gains = [normal(head_dim, seed=seed).to(dtype) for seed in (1, 2)] if normed else [None] * 2
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    own = Heads(heads, kv_heads, head_dim, cos_sin, *gains, eps=1e-6)
    wide = Heads(
        heads,
        kv_heads,
        head_dim,
        cos_sin,
        *(None if gain is None else gain.float() for gain in gains),
        eps=1e-6,
    )
    # Four sequences of ten tokens at most, each on three pages; then each token a sequence.
    number = torch.arange(tokens, dtype=torch.int32, device="cuda")
    pages = torch.randperm(200, device="cuda").int()
    starts = torch.arange(tokens + 1, dtype=torch.int32, device="cuda")
    for places in (
        Places(number // 10, number % 10, starts * 3, pages),
        Places(None, number % 4, starts, pages),
    ):
        shape = (200, page_size, kv_heads, head_dim)
        found = [torch.zeros(shape, dtype=kept, device="cuda") for _ in range(2)]
        wider = torch.float32 if kept == dtype else kept
        expected = [torch.zeros(shape, dtype=wider, device="cuda") for _ in range(2)]
        queries = torch.empty((tokens, heads, head_dim), device="cuda")
        place_reference(qkv.float(), wide, places, (expected[0], expected[1]), queries)
        assert error(place(qkv, own, places, (found[0], found[1])), queries) < 5e-3
        for side, wanted in zip(found, expected, strict=True):
            # What lies between two numbers of fp8 in float32 may be one of them in dtype before.
            assert error(side, wanted) < (5e-3 if kept == dtype else 2e-2)
            # No other place is written.
            written = (each.float().abs().sum((2, 3)) > 0 for each in (side, wanted))
            assert torch.equal(*written)


def test_what_is_too_large_for_the_cache_becomes_its_largest_number() -> None:
    heads, values = Heads(2, 1, 64), [1.0, 447.0, 448.0, 500.0, 6e4, -6e4, torch.inf, -torch.inf]
    qkv = torch.tensor(values, dtype=BF16, device="cuda").repeat(1, 32)
    starts = torch.arange(2, dtype=torch.int32, device="cuda")
    places = Places(None, torch.zeros(1, dtype=torch.int32, device="cuda"), starts, starts)
    cache = [torch.zeros(1, 1, 1, 64, dtype=FP8, device="cuda") for _ in range(2)]
    place(qkv, heads, places, (cache[0], cache[1]))
    for side in cache:
        found = side.float().flatten()[:8].tolist()
        assert found == [1.0, 448.0, 448.0, 448.0, 448.0, -448.0, 448.0, -448.0]


def test_places_of_heads_that_do_not_turn() -> None:
    qkv, heads = normal(3, 4 * 64), Heads(2, 1, 64)
    starts = torch.arange(4, dtype=torch.int32, device="cuda")
    cache = (torch.zeros(4, 1, 1, 64, dtype=BF16, device="cuda"),) * 2
    places = Places(None, torch.zeros(3, dtype=torch.int32, device="cuda"), starts, starts)
    assert torch.equal(place(qkv, heads, places, cache).flatten(1), qkv[:, :128])


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize(
    ("outputs", "inner"),
    [
        (4096, 1024),
        (1024, 2048),
        (4096, 4096),
        (4096, 14_336),
        (28_672, 4096),
        (32, 64),
    ],
)
def test_projections_of_few_rows(outputs: int, inner: int, rows: int) -> None:
    x, weight = normal(rows, inner), normal(outputs, inner, seed=1) / inner**0.5
    gain, bias = normal(inner, seed=2), normal(outputs, seed=3)
    total = normal(rows, outputs, seed=4)
    assert is_few(x, weight)
    wide = [each.float() for each in (x, weight, gain, bias, total)]
    for some, wide_bias in ((None, None), (bias, wide[3])):
        normed = (wide[0], wide[2], 1e-6, wide[1], wide_bias)
        found = norm_linear(x, gain, 1e-6, weight, some)
        assert error(found, norm_linear_reference(*normed)) < 5e-3
        gated = norm_linear_silu_and_mul(x, gain, 1e-6, weight, some)
        assert error(gated, norm_linear_silu_and_mul_reference(*normed)) < 8e-3
        found, expected = total.clone(), wide[4].clone()
        add_linear(found, x, weight, some)
        add_linear_reference(expected, wide[0], wide[1], wide_bias)
        assert error(found, expected) < 5e-3


def test_embedding_of_tokens_that_the_host_does_not_know() -> None:
    table, last_tokens = normal(500, 256), torch.tensor([7, 8, 9], device="cuda")
    tokens = torch.tensor([0, -1, 499, -3, 5], device="cuda")
    expected = embed_reference(tokens, last_tokens, table)
    assert torch.equal(embed(tokens, last_tokens, table), expected)
    assert torch.equal(expected, table[[0, 7, 499, 9, 5]])


@pytest.mark.parametrize("tokens", [1, 300])
def test_silu_and_mul(tokens: int) -> None:
    x = normal(tokens, 2 * 768)
    assert error(silu_and_mul(x), silu_and_mul_reference(x.float())) < 8e-3
    wider = torch.cat((x, x[:, :64]), dim=1)
    assert error(silu_and_mul(wider[:, :-64]), silu_and_mul_reference(x.float())) < 8e-3


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (32, 128), (5, 256)])
def test_parts_are_merged(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Of tokens with none to many; some have seen no key, whatever is in their results."""
    counts = torch.tensor([0, 1, 2, 3, 4, 5, 9, 17, 0, *[3] * 200], dtype=torch.int32)
    starts = torch.cat((torch.zeros(1), counts.cumsum(0))).to(torch.int32).cuda()
    parts = normal(int(starts[-1]), heads, head_dim).to(dtype)
    sums = normal(len(parts), heads).float() * 8
    sums[4], sums[6:10] = -5e4, -torch.inf
    out, expected = (torch.full((len(counts), heads, head_dim), 7, dtype=dtype) for _ in range(2))
    out_sums, expected_sums = (torch.zeros(len(counts), heads) for _ in range(2))
    out, out_sums = out.cuda(), out_sums.cuda()
    merge_parts_reference(parts.cpu(), sums.cpu(), starts.cpu(), expected, expected_sums)
    merge_parts(parts, sums, starts, out)
    rows = torch.arange(len(counts)) != 4  # where no part has seen a key, softmax is not defined
    assert error(out.cpu()[rows], expected[rows]) < 5e-3
    assert out[4].isfinite().all()
    merge_parts(parts, sums, starts, out, out_sums)
    torch.testing.assert_close(out_sums.cpu(), expected_sums, rtol=1e-5, atol=1e-4)


# Attention


def caches(shape: CacheShape, dtype: torch.dtype = BF16) -> tuple[KVCache, KVCache]:
    """The same random contents for the GPU, and for the reference: in float32, or fp8 likewise."""
    gpu = KVCache(shape, dtype, torch.device("cuda"))
    for side in gpu.data.flatten(0, 1):
        side.copy_(torch.randn(side.shape, dtype=BF16, device="cuda"))
    wide = KVCache(shape, torch.float32 if dtype == BF16 else dtype, torch.device("cuda"))
    wide.data.copy_(gpu.data)
    return gpu, wide


def compare(
    attention: Attention,
    reference: Attention,
    layout: StepLayout,
    heads: int,
    shape: CacheShape,
    padding: int = 0,
    sinks: torch.Tensor | None = None,
) -> None:
    tokens, d = int(layout.query_starts[-1]), shape.head_dim
    qkv = normal(tokens + padding, (heads + 2 * shape.kv_heads) * d)
    own = Heads(heads, shape.kv_heads, d, sinks=sinks)
    attention.plan(layout)
    reference.plan(layout)
    for layer in range(shape.layers):
        found = attention(layer, qkv, own)
        expected = reference(layer, qkv[:tokens].float(), own)
        assert error(found[:tokens], expected) < 1e-2


def test_what_runs_beside_waits_for_what_came_before_and_is_waited_for() -> None:
    beside, cycles = Beside(torch.device("cuda")), 50_000_000
    before, copied, within = torch.zeros(3, device="cuda").unbind()
    torch.cuda._sleep(cycles)
    before.fill_(1.0)
    with beside.launching():
        copied.copy_(before)
        torch.cuda._sleep(cycles)
        within.fill_(1.0)
    beside.join()
    assert (copied.item(), (within + 0.0).item()) == (1.0, 1.0)


NO_GRAPHS = {"decode_graphs": 0, "piece_graphs": 0}
LIMITS = Limits(tokens=16_384, sequences=256, context=10_000)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 2), (10, 2), (16, 2)])
def test_attention_is_the_references(
    heads: int, kv_heads: int, head_dim: int, page_size: int
) -> None:
    rng = random.Random(heads * head_dim + page_size)
    gpu, wide = caches(CacheShape(2, 32_000 // page_size, page_size, kv_heads, head_dim))
    attention, reference = FlashInferAttention(gpu, heads, LIMITS), ReferenceAttention(wide)
    pages = gpu.shape.pages
    for contexts in ([1], [9000, 1, 17], [16, 15, 32, 33, 4097], [1, 2, 3, 700, 128, 64, 65]):
        for counts in some_counts(contexts, rng):
            layout = make_layout(counts, contexts, page_size, rng, pages)
            compare(attention, reference, layout, heads, gpu.shape)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_split_contexts_are_merged_as_flashinfer_merges_them(
    with_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, heads = random.Random(0), 32
    gpu, _ = caches(CacheShape(1, 700, 16, 8, 128))
    attention = FlashInferAttention(gpu, heads, LIMITS)
    layout = make_layout([352, 1, 1], [9000, 100, 1], 16, rng, 700)
    own = Heads(heads, 8, 128, sinks=torch.randn(heads, device="cuda") if with_sinks else None)
    qkv = normal(354, (heads + 2 * 8) * 128)
    calls: list[int] = []

    def counted(*tensors: torch.Tensor) -> None:
        calls.append(1)
        merge_parts(*tensors)

    monkeypatch.setattr(splits, "merge_parts", counted)
    attention.plan(layout)
    found = attention(0, qkv, own)
    monkeypatch.setattr(splits.Splits, "taken_from", lambda *_: None)
    attention.plan(layout)
    assert error(found, attention(0, qkv, own)) < 2e-3
    assert calls == [1]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 2), (10, 2), (16, 2)])
def test_attention_of_a_cache_in_fp8_is_the_references(
    heads: int, kv_heads: int, head_dim: int
) -> None:
    """Of prompts, of decode and both, and as a graph's; of one head size also capped windows."""
    rng, page_size = random.Random(heads * head_dim), 16
    kinds = [AttentionKind(head_dim**-0.5)] * 2
    if head_dim == 64:
        kinds[1] = AttentionKind(0.2, window=100, soft_cap=20.0)
    gpu, wide = caches(CacheShape(2, 700, page_size, kv_heads, head_dim), FP8)
    attention = FlashInferAttention(gpu, heads, LIMITS, kinds=kinds, dtype=BF16)
    reference, graph = ReferenceAttention(wide, kinds), attention.for_graph(8)
    for contexts in ([1], [9000, 1, 17], [16, 15, 32, 33, 4097], [1, 2, 3, 700, 128, 64, 65]):
        for counts in some_counts(contexts, rng):
            layout = make_layout(counts, contexts, page_size, rng, gpu.shape.pages)
            compare(attention, reference, layout, heads, gpu.shape)
        layout = make_layout([1] * len(contexts), contexts, page_size, rng, gpu.shape.pages)
        compare(graph, reference, layout, heads, gpu.shape, padding=8 - len(contexts))
    assert set(attention.runs.values()) <= {"fa2", "cuda-core"}


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (16, 2)])
def test_replays_follow_sequences_that_grow_join_and_leave(
    heads: int, kv_heads: int, page_size: int
) -> None:
    """200 replays of one captured call, and some for every padded size, against the reference."""
    head_dim, rng = 64, random.Random(page_size)
    gpu, wide = caches(CacheShape(2, 96_000 // page_size, page_size, kv_heads, head_dim))
    attention, reference = FlashInferAttention(gpu, heads, LIMITS), ReferenceAttention(wide)
    for size in padded_sizes(LIMITS.sequences):
        qkv, own = normal(size, (heads + 2 * kv_heads) * head_dim), Heads(heads, kv_heads, head_dim)
        graph_attention, graph, out = capture(attention, qkv, own)
        contexts = [rng.randint(1, 60_000 // size) for _ in range(size)]
        for _ in range(200 if size == 16 else 10):
            contexts = [c + 1 for c in contexts if rng.random() > 0.05] or [1]
            while len(contexts) < size and rng.random() < 0.4:
                contexts.append(rng.choice([1, 15, 16, 17, min(1500, 60_000 // size)]))
            count = len(contexts)
            layout = make_layout([1] * count, contexts, page_size, rng, gpu.shape.pages)
            # Fresh contents under the page tables of this step, spare page poisoned.
            gpu.data[:, :, 0] = float("nan") if count == size else 0.0
            graph_attention.plan(layout)
            graph.replay()
            reference.plan(layout)
            expected = reference(0, qkv[:count].float(), own)
            assert error(out[:count], expected) < 1e-2


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (16, 2)])
def test_a_prompts_tokens_are_replayed_as_sequences(heads: int, kv_heads: int) -> None:
    rng, size = random.Random(heads), 512
    gpu, wide = caches(CacheShape(2, 4000, 16, kv_heads, 64))
    attention = FlashInferAttention(gpu, heads, replace(LIMITS, rows=size))
    reference = ReferenceAttention(wide)
    qkv, own = normal(size, (heads + 2 * kv_heads) * 64), Heads(heads, kv_heads, 64)
    graph_attention, graph, out = capture(attention, qkv, own)
    for counts, contexts in (
        ([300], [300]),
        ([180, 33, 40, *[1] * 20], [200, 90, 700, *[1500] * 20]),
        ([*[16] * 31, 1], [*[17] * 31, 1]),
    ):
        layout = make_layout(counts, contexts, 16, rng, gpu.shape.pages)
        graph_attention.plan(layout.apart(16))
        graph.replay()
        reference.plan(layout)
        count = sum(counts)
        assert error(out[:count], reference(0, qkv[:count].float(), own)) < 1e-2


def capture(
    attention: FlashInferAttention, qkv: torch.Tensor, heads: Heads
) -> tuple[GraphDecodeAttention, torch.cuda.CUDAGraph, torch.Tensor]:
    """Decode of these queries in a graph, and where it puts its output."""
    graph_attention = attention.for_graph(len(qkv))
    graph_attention(0, qkv, heads)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = graph_attention(0, qkv, heads)
    return graph_attention, graph, out


def test_plans_may_run_ahead_of_the_gpu() -> None:
    """Steps that are planned while the GPU is far behind read each its own plan."""
    rng, heads, size = random.Random(1), 16, 16
    gpu, wide = caches(CacheShape(1, 8000, 16, 4, 128))
    attention, reference = FlashInferAttention(gpu, heads, LIMITS), ReferenceAttention(wide)
    qkv, own = normal(size, (heads + 8) * 128), Heads(heads, 4, 128)
    graph_attention, graph, out = capture(attention, qkv, own)
    # Each step has pages of its own, so that none overwrites what another reads.
    contexts = [[rng.choice([1, 100, 700, 900]) for _ in range(size)] for _ in range(6)]
    whole = make_layout([1] * 6 * size, [*itertools.chain(*contexts)], 16, rng, gpu.shape.pages)
    layouts = [whole.part(step * size, (step + 1) * size) for step in range(6)]
    busy, found = torch.randn(8192, 8192, device="cuda"), []
    for layout in layouts:
        busy = busy @ busy * 1e-4  # some milliseconds, which every plan after it runs ahead of
        graph_attention.plan(layout)
        graph.replay()
        found.append(out.clone())
    assert not torch.cuda.current_stream().query(), "the host is ahead"
    for layout, each in zip(layouts, found, strict=True):
        reference.plan(layout)
        assert error(each, reference(0, qkv.float(), own)) < 1e-2


def test_what_is_put_ahead_and_fetched_behind_is_each_steps_own() -> None:
    """While the GPU is far behind; ``read`` is overwritten as soon as a copy of it is queued."""
    ahead = Ahead(torch.device("cuda"), plans=[1000], inputs=20_000, layout=30_000)
    places = token_downloads(20_000, torch.device("cuda"))
    busy, found = torch.randn(8192, 8192, device="cuda"), []
    for step in range(1, 13):
        busy = busy @ busy * 1e-4
        with ahead.filling() as staging:
            staging.inputs.fill_(step)
            staging.layout.fill_(step)
            staging.layout_words = 30_000
        place = places[step % len(places)].start(ahead.inputs.read[:20_000])
        found.append((step, ahead.layout.read.clone(), place))
        if len(found) == 2:
            assert not torch.cuda.current_stream().query(), "the host is ahead"
            first, layout, place = found.pop(0)
            assert place.wait().unique().tolist() == [first]
            assert layout.unique().tolist() == [first]


def test_every_wrapper_runs_fa2_and_another_choice_is_loud(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu, _ = caches(CacheShape(1, 64, 16, 2, 128))
    caplog.set_level("INFO")
    attention = FlashInferAttention(gpu, 16, LIMITS)
    attention.for_graph(4)
    attention.log_what_runs()
    assert attention.runs == {"decode": "fa2", "prefill": "fa2", "graph decode": "fa2"}
    assert caplog.records[-1].levelname == "INFO"
    assert "graph decode runs fa2" in caplog.records[-1].message
    loud = FlashInferAttention(gpu, 16, LIMITS, "auto")
    loud.log_what_runs()
    assert caplog.records[-1].levelname == "WARNING"


def test_the_kernels_that_run_are_fa2s() -> None:
    """As a profile names them: FA3's would be PrefillWithKVCacheKernel."""
    gpu, _ = caches(CacheShape(1, 640, 16, 2, 128))
    attention = FlashInferAttention(gpu, 16, LIMITS)
    qkv, heads = normal(4, 20 * 128), Heads(16, 2, 128)
    graph_attention, graph, _ = capture(attention, qkv, heads)

    def run(layout: StepLayout, graphed: bool) -> set[str]:
        (graph_attention if graphed else attention).plan(layout)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            graph.replay() if graphed else attention(0, qkv, heads)
            torch.cuda.synchronize()
        return {event.key for event in profile.key_averages() if "KVCacheKernel" in event.key}

    decode = spare_layout([1] * 4, 16, [2000] * 4)
    for layout, graphed in ((decode, True), (decode, False), (spare_layout([4], 16), False)):
        names = run(layout, graphed)
        assert names
        assert all("BatchPrefillWithPagedKVCacheKernel" in name for name in names)


def test_a_wrapper_that_would_not_run_fa2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = flashinfer().BatchPrefillWithPagedKVCacheWrapper
    plan = wrapper.plan

    def stubborn(self: Any, *args: Any, **kwargs: Any) -> None:
        plan(self, *args, **kwargs)
        self._backend = "fa3"

    monkeypatch.setattr(wrapper, "plan", stubborn)
    gpu, _ = caches(CacheShape(1, 64, 16, 2, 128))
    with pytest.raises(ConfigError, match=r"the prefill wrapper .* would run fa3 although"):
        FlashInferAttention(gpu, 16, LIMITS)


# Sampling


KINDS: list[dict[str, float]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"temperature": 1.5, "min_p": 0.01, "top_k": 200, "top_p": 0.8},
]


def params_of(index: int, **values: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, seed=index * 7919, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("vocab", [500, 32_001, 151_936])
def test_the_same_tokens_are_drawn_as_on_the_cpu(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(160, vocab, generator=generator) * 2.5).to(dtype)
    params = [params_of(i, **KINDS[i % len(KINDS)]) for i in range(len(logits))]
    for count in (len(KINDS), 2):  # with filters, and without any
        draws = draws_for([params[i % count] for i in range(160)], range(160))
        ours, reference = drawn(logits.cuda(), draws).tolist(), drawn(logits, draws).tolist()
        # In float32 here: of two that come first at nearly the same time, it may be the other, and
        # a token on the edge of what is kept may be kept or not.
        assert sum(a == b for a, b in zip(ours, reference, strict=True)) >= 157


@pytest.mark.parametrize("kind", KINDS[1:])
def test_frequencies_are_the_references(kind: dict[str, float]) -> None:
    vocab, rows = 3000, 16_384
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 3
    draws = draws_for([params_of(0, **kind)] * rows, range(rows))
    found = drawn(logits.cuda().repeat(rows, 1), draws).bincount(minlength=vocab)
    assert_follows(found.cpu().numpy(), distribution(logits, **kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("knobs", PENALTIES)
def test_frequencies_after_penalties_follow_the_exact_distribution(
    knobs: dict[str, float],
) -> None:
    logits = 1.5 * torch.randn(40, generator=torch.Generator().manual_seed(6)).cuda()
    arguments = [2, 5, 5, 9], [5, 0, 7, 7, 7], params_of(3, **knobs)
    counts = counts_of_one(logits, *arguments, 8000)
    assert_follows(counts, distribution_of_one(logits, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_row_does_not_depend_on_the_rows_beside_it_or_on_graphs(dtype: torch.dtype) -> None:
    rows, vocab = 48, 32_001
    logits = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    logits = logits.cuda()
    for kinds in (KINDS, KINDS[:2]):  # with filters, and without any
        table = draws_for([params_of(i, **kinds[i % len(kinds)]) for i in range(rows)], range(rows))
        together = drawn(logits, table)
        alone = [drawn(logits[i : i + 1], table[:, i : i + 1]) for i in range(rows)]
        assert torch.equal(torch.cat(alone), together)
        draws, filtered = Draws.of(table.cuda()), filters(table)
        slots = TokenSlots(
            torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.arange(rows, device="cuda")
        )
        scratch = scratch_for(rows, logits.device)
        choose(logits, draws, slots, filtered, scratch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = choose(logits, draws, slots, filtered, scratch)
        for _ in range(2):
            graph.replay()
            assert torch.equal(found, together)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("vocab", [77, 32_001, 151_936])
def test_the_likeliest_token_is_the_first_of_the_greatest(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(70, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    found = drawn(logits.cuda(), draws_for([params_of(0, temperature=0.0)] * 70, range(70)))
    first = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert found.tolist() == first


def test_no_token_that_is_ruled_out_is_ever_drawn() -> None:
    logits = torch.randn(64, 151_936, generator=torch.Generator().manual_seed(5)).cuda()
    allowed = [set(row.topk(50).indices.tolist()) for row in logits]
    for seed in range(20):
        draws = draws_for([params_of(seed, top_k=50)] * 64, range(64))
        for token, tokens in zip(drawn(logits, draws).tolist(), allowed, strict=True):
            assert token in tokens
    banned = logits.clone()
    banned[:, 1:] = float("-inf")
    for knobs in ({}, {"temperature": 1e300}, {"temperature": 1e300, "top_p": 0.9}):
        assert not drawn(banned, draws_for([params_of(3, **knobs)] * 64, range(64))).any()


# The engine


def gpu_engine(folder: Path, **knobs: object) -> Engine:
    values: dict[str, object] = {"cache_tokens": 32_768, "device": "cuda", **knobs}
    return Engine(EngineConfig(checkpoint=str(folder), **values))  # type: ignore[arg-type]


def demo_prompts() -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    named: tuple[tasks.Task, ...] = ("add", "recall", "copy", "reverse")
    examples = [e for task in named for e in tasks.evaluation_set(task, 24)]
    examples += tasks.evaluation_set("recall", 8, tokens=1900)
    return [tokenizer.encode(example.prompt).ids for example in examples]


def tokens_of(results: list[Generation]) -> list[list[int]]:
    return [result.tokens for result in results]


def test_the_demo_checkpoint_answers_as_on_the_cpu() -> None:
    prompts = demo_prompts()
    params = SamplingParams(max_tokens=48, temperature=0.0, seed=0)
    cpu = Engine(EngineConfig(checkpoint=str(DEMO), cpu_threads=8)).generate(prompts, params)
    with_graphs = gpu_engine(DEMO).generate(prompts, params)
    without = gpu_engine(DEMO, **NO_GRAPHS).generate(prompts, params)
    # Padded batches may use other matrix products, which round otherwise.
    apart = zip(with_graphs, without, strict=True)
    assert sum(a.tokens != b.tokens for a, b in apart) <= 1
    same = sum(a.tokens == b.tokens for a, b in zip(cpu, with_graphs, strict=True))
    assert same >= len(prompts) - 1


def test_the_demo_checkpoint_answers_with_a_cache_in_fp8_as_on_the_cpu() -> None:
    prompts = demo_prompts()
    params = SamplingParams(max_tokens=48, temperature=0.0, seed=0)
    config = EngineConfig(checkpoint=str(DEMO), cpu_threads=8, cache_dtype="fp8")
    cpu = Engine(config).generate(prompts, params)
    with_graphs = gpu_engine(DEMO, cache_dtype="fp8").generate(prompts, params)
    without = gpu_engine(DEMO, cache_dtype="fp8", **NO_GRAPHS).generate(prompts, params)
    # bfloat16 rounds keys before fp8 does, which makes some that are nearly between two numbers
    # the other one: a few answers that were close to another become that.
    for found in (with_graphs, without):
        assert sum(a.tokens == b.tokens for a, b in zip(cpu, found, strict=True)) >= 98


def test_seeded_answers_are_the_same_alone_in_a_batch_and_without_graphs() -> None:
    prompts = demo_prompts()[:40]
    params = [SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=i) for i in range(40)]
    engine = gpu_engine(DEMO)
    together = tokens_of(engine.generate(prompts, params))
    alone = [
        engine.generate([prompt], own)[0].tokens
        for prompt, own in zip(prompts, params, strict=True)
    ]
    eager = gpu_engine(DEMO, **NO_GRAPHS)
    without_graphs = tokens_of(eager.generate(prompts, params))
    tight = gpu_engine(DEMO, cache_tokens=800, max_context=320)
    preempted = tokens_of(tight.generate(prompts, params))
    assert tight.scheduler.num_preemptions > 0
    # A batch of another size rounds otherwise, which moves a draw that is on the edge.
    for others in (alone, without_graphs, preempted):
        assert sum(a == b for a, b in zip(together, others, strict=True)) >= 36


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 0.5},
        {"temperature": 0.5, "repetition_penalty": 1.5},
        {"temperature": 0.5, "presence_penalty": -2.0},
        {"temperature": 0.5, "frequency_penalty": -2.0},
    ],
)
def test_tokens_in_a_row_follow_the_exact_distribution(
    knobs: dict[str, float], graphs: bool, tmp_path: Path
) -> None:
    config = config_of(write_family("llama 3.1", tmp_path, "cuda"), "cuda")
    model = reference(config, torch.float32)
    if not graphs:
        config = msgspec.structs.replace(config, decode_graphs=0, piece_graphs=0)
    assert_pairs_follow(Engine(config), model, knobs)


@pytest.mark.parametrize("graphs", [{"piece_graphs": 300}, {"decode_graphs": 24}], ids=str)
def test_replayed_steps_answer_as_launched_ones(graphs: dict[str, int]) -> None:
    """Prompts in chunks beside sequences that decode, in steps of many sizes."""
    prompts = demo_prompts()
    params = [SamplingParams(max_tokens=8 + i % 40, temperature=0.0, seed=0) for i in range(104)]
    knobs = {"step_tokens": 300, "max_sequences": 24}
    whole = gpu_engine(DEMO, **knobs, **NO_GRAPHS).generate(prompts, params)
    some = gpu_engine(DEMO, **knobs, **(NO_GRAPHS | graphs)).generate(prompts, params)
    both = zip(some, whole, strict=True)
    assert sum(a.tokens != b.tokens for a, b in both) <= 2


def test_sequences_that_begin_alike_have_more_page_numbers_than_the_cache_has_pages() -> None:
    prompt = demo_prompts()[-1]
    params = [SamplingParams(max_tokens=16, temperature=0.0, seed=0, ignore_eos=True)] * 60
    for graphs in ({}, {"decode_graphs": 0}):
        engine = gpu_engine(DEMO, cache_tokens=6400, max_sequences=60, **graphs)
        alone = engine.generate([prompt], params[:1])[0].tokens
        together = tokens_of(engine.generate([prompt] * 60, params))
        assert engine.scheduler.num_preemptions == 0
        assert sum(tokens == alone for tokens in together) >= 54


# Memory, and what cannot be served


@pytest.mark.alone
def test_the_cache_takes_what_is_left() -> None:
    total = torch.cuda.mem_get_info()[1]
    engine = gpu_engine(DEMO, cache_tokens=0, gpu_memory_fraction=0.5)
    free = torch.cuda.mem_get_info()[0]
    assert 0.44 < 1 - free / total < 0.53
    assert engine.tree.free > 1_000_000 / 16
    pages = engine.tree.usable
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    kept = gpu_engine(DEMO, cache_tokens=0, gpu_memory_fraction=0.5, cache_dtype="fp8")
    assert kept.tree.usable > 1.9 * pages
    del kept
    gc.collect()
    torch.cuda.empty_cache()
    with pytest.raises(ConfigError, match=r"cache_tokens=\d+ needs .*; there is memory for \d+"):
        gpu_engine(DEMO, cache_tokens=1 << 29)


def test_more_context_than_fits_is_told_how_much_does() -> None:
    with pytest.raises(ConfigError, match=r"max_context=2000 is more than .* it holds 1600 tokens"):
        gpu_engine(DEMO, cache_tokens=1600, max_context=2000)


def write_shape(folder: Path, **shape: Any) -> Path:
    """A checkpoint's config.json, for random weights."""
    Qwen3Config(architectures=["Qwen3ForCausalLM"], **shape).save_pretrained(folder)
    return folder


def test_a_head_size_without_kernels_is_refused(tmp_path: Path) -> None:
    folder = write_shape(
        tmp_path, hidden_size=96, num_attention_heads=1, num_key_value_heads=1, head_dim=96
    )
    with pytest.raises(ConfigError, match="head_dim=96: FlashInfer's FA2 kernels are for 64, 128"):
        gpu_engine(folder)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write_shape(tmp_path, hidden_size=32_768, num_attention_heads=256, head_dim=128)
    with pytest.raises(ConfigError, match=r"weights take \d+\.\d GB in bfloat16; .* are free"):
        gpu_engine(folder, load_format="dummy")


def test_float32_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dtype=float32: .* float16 and bfloat16"):
        gpu_engine(DEMO, dtype="float32")


def test_dummy_weights_are_made_on_the_device_and_run(tmp_path: Path) -> None:
    folder = write_shape(
        tmp_path,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=2,
        max_position_embeddings=2048,
    )
    engine = gpu_engine(folder, load_format="dummy")
    params = SamplingParams(max_tokens=8, temperature=0.0, seed=0, ignore_eos=True)
    results = engine.generate([[1, 2, 3]] * 3, params)
    assert [len(result.tokens) for result in results] == [8] * 3
    assert len({tuple(result.tokens) for result in results}) == 1
