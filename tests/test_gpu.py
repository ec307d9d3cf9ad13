"""The GPU path against its plain-torch meaning and against transformers. Needs a GPU."""

import random
from pathlib import Path

import numpy as np
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

from fi_runtime.attention.base import Attention, StepLayout
from fi_runtime.attention.flashinfer import FlashInferAttention
from fi_runtime.attention.reference import ReferenceAttention
from fi_runtime.cache.kv_cache import CacheShape, KVCache
from fi_runtime.config import EngineConfig
from fi_runtime.engine.core import Engine, Generation
from fi_runtime.engine.decode_graphs import padded_sizes
from fi_runtime.kernels.activation import silu_and_mul, silu_and_mul_reference
from fi_runtime.kernels.norm import add_rms_norm, rms_norm, rms_norm_reference
from fi_runtime.kernels.rotary import rotate, rotate_reference
from fi_runtime.messages import SamplingParams
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
    positions = torch.randint(0, 3000, (tokens,)).cuda()
    expected = rotate_reference(positions, q.float(), k.float(), cos_sin)
    for found, wanted in zip(rotate(positions, q, k, cos_sin), expected, strict=True):
        assert error(found, wanted) < 5e-3


@pytest.mark.parametrize("tokens", [1, 300])
def test_silu_and_mul(tokens: int) -> None:
    x = normal(tokens, 2 * 768)
    assert error(silu_and_mul(x), silu_and_mul_reference(x.float())) < 8e-3


# Attention


def make_layout(
    counts: list[int], contexts: list[int], page_size: int, rng: random.Random, pages: int
) -> StepLayout:
    """A step of sequences with so many new tokens and contexts, on pages in random order."""
    needed = [-(-context // page_size) for context in contexts]
    drawn = rng.sample(range(1, pages), sum(needed))
    starts = np.concatenate(([0], np.cumsum(needed))).astype(np.int32)
    slots = []
    for i, (count, context) in enumerate(zip(counts, contexts, strict=True)):
        at = np.arange(context - count, context)
        own = np.array(drawn[starts[i] : starts[i + 1]])
        slots.append(own[at // page_size] * page_size + at % page_size)
    return StepLayout(
        query_starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        context_lens=np.array(contexts, dtype=np.int32),
        page_starts=starts,
        pages=np.array(drawn, dtype=np.int32),
        slots=np.concatenate(slots).astype(np.int64),
    )


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


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 2), (10, 2), (16, 2)])
def test_attention_is_the_references(
    heads: int, kv_heads: int, head_dim: int, page_size: int
) -> None:
    rng = random.Random(heads * head_dim + page_size)
    gpu, wide = caches(CacheShape(2, 32_000 // page_size, page_size, kv_heads, head_dim))
    attention, reference = FlashInferAttention(gpu, heads), ReferenceAttention(wide)
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
    """200 replays of one captured call for each padded size, each against the reference."""
    head_dim, rng = 64, random.Random(page_size)
    gpu, wide = caches(CacheShape(2, 64_000 // page_size, page_size, kv_heads, head_dim))
    attention, reference = FlashInferAttention(gpu, heads), ReferenceAttention(wide)
    for size in (1, 4, 16, 40):
        graph_attention = attention.for_graph(size)
        q, k = normal(size, heads, head_dim), normal(size, kv_heads, head_dim)
        v = normal(size, kv_heads, head_dim, seed=3)
        graph_attention(0, q, k, v)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = graph_attention(0, q, k, v)
        contexts = [rng.randint(1, 900) for _ in range(size)]
        for _ in range(200 // 4):
            contexts = [c + 1 for c in contexts if rng.random() > 0.05][:size] or [1]
            while len(contexts) < size and rng.random() < 0.4:
                contexts.append(rng.choice([1, 15, 16, 17, 1000, 1500]))
            count = len(contexts)
            layout = make_layout([1] * count, contexts, page_size, rng, gpu.shape.pages)
            # Fresh contents under the page tables of this step, spare page poisoned.
            gpu.data[:, :, 0] = float("nan") if count == size else 0.0
            graph_attention.plan(layout)
            graph.replay()
            reference.plan(layout)
            expected = reference(0, q[:count].float(), k[:count].float(), v[:count].float())
            assert error(out[:count], expected) < 1e-2


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
    without = gpu_engine(DEMO, decode_graphs=0).generate(prompts, params)
    assert tokens_of(with_graphs) == tokens_of(without)
    same = sum(a.tokens == b.tokens for a, b in zip(cpu, with_graphs, strict=True))
    assert same >= len(prompts) - 1


def test_padded_sizes_cover_every_batch() -> None:
    for most in (1, 3, 8, 64, 100, 256):
        sizes = padded_sizes(most)
        assert sizes == sorted(set(sizes))
        assert sizes[0] == 1
        assert sizes[-1] == most
