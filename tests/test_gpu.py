"""The GPU path against its plain-torch meaning and against transformers. Needs a GPU."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fi_runtime.attention.base import Attention, StepLayout, spare_layout
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
from fi_runtime.engine.sampler import choose
from fi_runtime.kernels.activation import silu_and_mul, silu_and_mul_reference
from fi_runtime.kernels.library import flashinfer
from fi_runtime.kernels.norm import add_rms_norm, rms_norm, rms_norm_reference
from fi_runtime.kernels.rotary import rotate, rotate_reference
from fi_runtime.messages import SamplingParams
from tests.draws import draws_for
from tests.layouts import make_layout
from tools.demo import tasks
from tools.serve import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

BF16 = torch.bfloat16
DEMO = ROOT / "model_repository" / "llm" / "demo_checkpoint"


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; NaN where either is not finite."""
    found, expected = found.float().cpu(), expected.float().cpu()
    return float((found - expected).norm() / expected.norm())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(BF16).cuda()


# Kernels


@pytest.mark.parametrize("shape", [(1, 1024), (7, 4096), (300, 256), (5, 8, 64), (33, 2, 128)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape), normal(shape[-1], seed=1)
    expected = rms_norm_reference(x.float(), weight.float(), 1e-6)
    assert error(rms_norm(x, weight, 1e-6), expected) < 5e-3


def test_rms_norm_of_a_slice() -> None:
    heads = normal(9, 12, 64)[:, 2:7]
    weight = normal(64)
    expected = rms_norm_reference(heads.float(), weight.float(), 1e-6)
    assert error(rms_norm(heads, weight, 1e-6), expected) < 5e-3


@pytest.mark.parametrize("tokens", [1, 8, 257])
def test_add_rms_norm(tokens: int) -> None:
    x, residual, weight = normal(tokens, 1024), normal(tokens, 1024, seed=5), normal(1024)
    total = x.float() + residual.float()
    expected = rms_norm_reference(total, weight.float(), 1e-5)
    normed, added = add_rms_norm(x, residual, weight, 1e-5)
    assert error(added, total) < 5e-3
    assert error(normed, expected) < 8e-3


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (32, 8, 128), (5, 1, 64)])
def test_rotate(heads: int, kv_heads: int, head_dim: int) -> None:
    tokens = 37
    qkv = normal(tokens, heads + 2 * kv_heads, head_dim)
    q, k, _ = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    angles = torch.outer(torch.arange(3000.0), torch.rand(head_dim // 2)).cuda()
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randint(0, 3000, (tokens,), dtype=torch.int32).cuda()
    expected = rotate_reference(positions, q.float(), k.float(), cos_sin)
    for found, wanted in zip(rotate(positions, q, k, cos_sin), expected, strict=True):
        assert error(found, wanted) < 5e-3


@pytest.mark.parametrize("tokens", [1, 300])
def test_silu_and_mul(tokens: int) -> None:
    x = normal(tokens, 2 * 768)
    assert error(silu_and_mul(x), silu_and_mul_reference(x.float())) < 8e-3


# Attention


def caches(shape: CacheShape) -> tuple[KVCache, KVCache]:
    """The same random contents for the GPU in bfloat16, and in float32 for the reference."""
    gpu = KVCache(shape, BF16, torch.device("cuda"))
    gpu.data.normal_()
    wide = KVCache(shape, torch.float32, torch.device("cuda"))
    wide.data.copy_(gpu.data)
    return gpu, wide


def compare(
    attention: Attention, reference: Attention, layout: StepLayout, heads: int, shape: CacheShape
) -> None:
    tokens, d = int(layout.query_starts[-1]), shape.head_dim
    q, k, v = (
        normal(tokens, count, d, seed=seed)
        for seed, count in enumerate((heads, shape.kv_heads, shape.kv_heads))
    )
    attention.plan(layout)
    reference.plan(layout)
    for layer in range(shape.layers):
        found = attention(layer, q, k, v)
        expected = reference(layer, q.float(), k.float(), v.float())
        assert error(found[:tokens], expected) < 1e-2


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
        ones = [1] * len(contexts)
        decode = make_layout(ones, contexts, page_size, rng, pages)
        compare(attention, reference, decode, heads, gpu.shape)
        counts = [rng.randint(1, context) for context in contexts]
        mixed = make_layout(counts, contexts, page_size, rng, pages)
        compare(attention, reference, mixed, heads, gpu.shape)


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
        q, k = normal(size, heads, head_dim), normal(size, kv_heads, head_dim)
        v = normal(size, kv_heads, head_dim, seed=3)
        graph_attention, graph, out = capture(attention, q, k, v)
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
            expected = reference(0, q[:count].float(), k[:count].float(), v[:count].float())
            assert error(out[:count], expected) < 1e-2


def capture(
    attention: FlashInferAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[GraphDecodeAttention, torch.cuda.CUDAGraph, torch.Tensor]:
    """Decode of these queries in a graph, and where it puts its output."""
    graph_attention = attention.for_graph(len(q))
    graph_attention(0, q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = graph_attention(0, q, k, v)
    return graph_attention, graph, out


def test_plans_may_run_ahead_of_the_gpu() -> None:
    """Steps that are planned while the GPU is far behind read each its own plan."""
    rng, heads, size = random.Random(1), 16, 16
    gpu, wide = caches(CacheShape(1, 8000, 16, 4, 128))
    attention, reference = FlashInferAttention(gpu, heads, LIMITS), ReferenceAttention(wide)
    q, k, v = (normal(size, count, 128, seed=seed) for seed, count in enumerate((heads, 4, 4)))
    graph_attention, graph, out = capture(attention, q, k, v)
    # Each step has pages of its own, so that none overwrites what another reads.
    contexts = [[rng.choice([1, 100, 700, 900]) for _ in range(size)] for _ in range(6)]
    whole = make_layout([1] * 6 * size, [*itertools.chain(*contexts)], 16, rng, gpu.shape.pages)
    layouts = [part_of(whole, step * size, (step + 1) * size) for step in range(6)]
    busy, found = torch.randn(8192, 8192, device="cuda"), []
    for layout in layouts:
        busy = busy @ busy * 1e-4  # some milliseconds, which every plan after it runs ahead of
        graph_attention.plan(layout)
        graph.replay()
        found.append(out.clone())
    assert not torch.cuda.current_stream().query(), "the host is ahead"
    for layout, each in zip(layouts, found, strict=True):
        reference.plan(layout)
        assert error(each, reference(0, q.float(), k.float(), v.float())) < 1e-2


def part_of(layout: StepLayout, first: int, end: int) -> StepLayout:
    """Some sequences of a step of one token each."""
    starts = layout.page_starts[first : end + 1]
    return StepLayout(
        query_starts=layout.query_starts[: end - first + 1],
        context_lens=layout.context_lens[first:end],
        page_starts=starts - starts[0],
        pages=layout.pages[starts[0] : starts[-1]],
    )


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
    q, k, v = (normal(4, count, 128, seed=seed) for seed, count in enumerate((16, 2, 2)))
    graph_attention, graph, _ = capture(attention, q, k, v)

    def run(layout: StepLayout, graphed: bool) -> set[str]:
        (graph_attention if graphed else attention).plan(layout)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            graph.replay() if graphed else attention(0, q, k, v)
            torch.cuda.synchronize()
        return {event.key for event in profile.key_averages() if "KVCacheKernel" in event.key}

    decode = spare_layout([1] * 4, 16, [2000] * 4)
    for layout, graphed in ((decode, True), (decode, False), (spare_layout([4], 16), False)):
        names = [name for name in run(layout, graphed) if "AppendPaged" not in name]
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


@pytest.mark.parametrize("vocab", [500, 32_000, 151_936])
def test_the_same_tokens_are_drawn_as_on_the_cpu(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(160, vocab, generator=generator) * 2.5
    params = [params_of(i, **KINDS[i % len(KINDS)]) for i in range(len(logits))]
    draws = draws_for(params, range(len(logits)))
    ours, reference = choose(logits.cuda(), draws).tolist(), choose(logits, draws).tolist()
    # The running sums are of float32 here: where one just passes the target, it may be the next.
    same = sum(a == b for a, b in zip(ours, reference, strict=True))
    assert same >= len(logits) - 3


@pytest.mark.parametrize("kind", KINDS[1:])
def test_frequencies_are_the_references(kind: dict[str, float]) -> None:
    vocab, rows, grid = 3000, 16_384, 1 << 14
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 3
    draws = draws_for([params_of(0, **kind)] * rows, range(rows))
    found = choose(logits.cuda().repeat(rows, 1), draws).bincount(minlength=vocab).cpu()
    # The reference over uniforms on a fine grid: its distribution.
    draws[4] = (torch.arange(grid) + 0.5) / grid
    parts = [choose(logits.repeat(1024, 1), part) for part in draws.split(1024, dim=1)]
    expected = torch.cat(parts).bincount(minlength=vocab)
    # Tokens that are expected seldom are counted together.
    common = expected >= 5
    seen = torch.cat((found[common], found[~common].sum()[None])).double()
    wanted = torch.cat((expected[common], expected[~common].sum()[None])).double()
    assert seen[-1] <= 2 * wanted[-1] + 20
    # The grid rounds each expectation by up to 1; both sides have as many draws.
    chi_squared = float(
        ((seen - wanted).abs() - 1).clamp(min=0)[:-1].square().div(wanted[:-1]).sum()
    )
    degrees = len(seen) - 1
    assert chi_squared <= degrees + 5 * (2 * degrees) ** 0.5


def test_no_token_that_is_ruled_out_is_ever_drawn() -> None:
    """Over uniforms up to the last below 1, where running sums round."""
    logits = torch.randn(64, 151_936, generator=torch.Generator().manual_seed(5)).cuda()
    allowed = [set(row.topk(50).indices.tolist()) for row in logits]
    draws = draws_for([params_of(0, top_k=50)] * 64, range(64))
    for uniform in (0.0, 1e-9, 0.5, 1 - 2**-24, 1 - 2**-53):
        draws[4] = uniform
        for token, tokens in zip(choose(logits, draws).tolist(), allowed, strict=True):
            assert token in tokens


# The engine

GREEDY = SamplingParams(max_tokens=32, temperature=0.0, seed=0, logprobs=0)


def gpu_engine(folder: Path, **knobs: object) -> Engine:
    values: dict[str, object] = {"cache_tokens": 32_768, "device": "cuda", **knobs}
    return Engine(EngineConfig(checkpoint=str(folder), **values))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def gpu_twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random tiny checkpoints of head sizes that the GPU's kernels have."""
    torch.manual_seed(3)
    shape = {
        "vocab_size": 500,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if request.param == "llama":
        config = LlamaConfig(**shape, num_attention_heads=4, head_dim=128)
        model: PreTrainedModel = LlamaForCausalLM(config)
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape, num_attention_heads=16, head_dim=64))
    folder = tmp_path_factory.mktemp(request.param)
    # bfloat16 on disk: all that are compared then have the same weights.
    model.bfloat16().save_pretrained(folder)
    return folder


def transformers_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Read from disk, since a model that is cast has its rotary frequencies cast too."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda().eval()


def forced_logprobs(model: PreTrainedModel, tokens: list[int], start: int) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([tokens], device="cuda")).logits[0].float()
    rows = logits.log_softmax(-1)[start - 1 : -1]
    return rows.gather(1, torch.tensor(tokens[start:], device="cuda")[:, None])[:, 0].cpu()


def test_logprobs_are_as_near_as_transformers_own_in_bfloat16(gpu_twin: Path) -> None:
    rng = random.Random(0)
    prompts = [rng.choices(range(500), k=n) for n in (1, 2, 7, 16, 33, 64, 100, 127, 200, 300)]
    results = gpu_engine(gpu_twin, step_tokens=256).generate(prompts, GREEDY)
    wide, narrow = (transformers_model(gpu_twin, dtype) for dtype in (torch.float32, BF16))
    ours, theirs = [], []
    for prompt, result in zip(prompts, results, strict=True):
        tokens = prompt + result.tokens
        right = forced_logprobs(wide, tokens, len(prompt))
        ours.append((torch.tensor(result.logprobs) - right).abs())
        theirs.append((forced_logprobs(narrow, tokens, len(prompt)) - right).abs())
    own_error, their_error = torch.cat(ours).mean(), torch.cat(theirs).mean()
    print(f"mean logprob error: {own_error:.5f}, transformers in bfloat16: {their_error:.5f}")
    assert own_error <= 1.1 * their_error


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
    without = gpu_engine(DEMO, decode_graphs=0, piece_graphs=0).generate(prompts, params)
    # Padded batches may use other matrix products, which round otherwise.
    apart = zip(with_graphs, without, strict=True)
    assert sum(a.tokens != b.tokens for a, b in apart) <= 1
    same = sum(a.tokens == b.tokens for a, b in zip(cpu, with_graphs, strict=True))
    assert same >= len(prompts) - 1


def test_seeded_answers_are_the_same_alone_in_a_batch_and_without_graphs() -> None:
    prompts = demo_prompts()[:40]
    params = [SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=i) for i in range(40)]
    engine = gpu_engine(DEMO)
    together = tokens_of(engine.generate(prompts, params))
    alone = [
        engine.generate([prompt], own)[0].tokens
        for prompt, own in zip(prompts, params, strict=True)
    ]
    eager = gpu_engine(DEMO, decode_graphs=0, piece_graphs=0)
    without_graphs = tokens_of(eager.generate(prompts, params))
    # A batch of another size rounds otherwise, which moves a draw that is on the edge.
    for others in (alone, without_graphs):
        assert sum(a == b for a, b in zip(together, others, strict=True)) >= 36


def test_steps_in_pieces_answer_as_whole_ones() -> None:
    """Prompts in chunks beside sequences that decode, in steps of many sizes."""
    prompts = demo_prompts()
    params = [SamplingParams(max_tokens=8 + i % 40, temperature=0.0, seed=0) for i in range(104)]
    knobs = {"step_tokens": 300, "max_sequences": 24}
    in_pieces = gpu_engine(DEMO, **knobs).generate(prompts, params)
    whole = gpu_engine(DEMO, **knobs, piece_graphs=0).generate(prompts, params)
    apart = zip(in_pieces, whole, strict=True)
    assert sum(a.tokens != b.tokens for a, b in apart) <= 2


# Memory, and what cannot be served


def test_the_cache_takes_what_is_left() -> None:
    total = torch.cuda.mem_get_info()[1]
    engine = gpu_engine(DEMO, cache_tokens=0, gpu_memory_fraction=0.5)
    free = torch.cuda.mem_get_info()[0]
    assert 0.44 < 1 - free / total < 0.53
    assert engine.pool.free > 1_000_000 / 16
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
