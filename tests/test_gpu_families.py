"""What only some families need of a GPU, and their logprobs there. Needs a GPU."""

import random
from pathlib import Path

import pytest
import torch

from bench.families import FAMILIES
from bench.fidelity import config_of, logprob_errors, reference, write_family
from fi_runtime.attention.base import AttentionKind
from fi_runtime.attention.flashinfer import FlashInferAttention
from fi_runtime.attention.reference import ReferenceAttention
from fi_runtime.cache.kv_cache import CacheShape
from fi_runtime.config import EngineConfig
from fi_runtime.engine.core import Engine
from fi_runtime.kernels.activation import (
    gelu_tanh_and_mul,
    silu_and_mul,
    silu_and_mul_reference,
)
from fi_runtime.kernels.moe import ExpertMLPs, experts, experts_reference, route
from fi_runtime.kernels.norm import (
    add_offset_rms_norm,
    offset_rms_norm,
    offset_rms_norm_reference,
)
from tests.layouts import make_layout, some_counts
from tests.test_gpu import LIMITS, caches, compare, error, normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("shape", [(1, 1024), (300, 256), (5, 8, 64)])
def test_offset_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape), 0.1 * normal(shape[-1], seed=1)
    expected = offset_rms_norm_reference(x.float(), weight.float(), 1e-6)
    assert error(offset_rms_norm(x, weight, 1e-6), expected) < 5e-3


@pytest.mark.parametrize("tokens", [1, 257])
def test_add_offset_rms_norm(tokens: int) -> None:
    x, residual, weight = normal(tokens, 1024), normal(tokens, 1024, seed=5), 0.1 * normal(1024)
    total = x.float() + residual.float()
    expected = offset_rms_norm_reference(total, weight.float(), 1e-5)
    normed, added = add_offset_rms_norm(x, residual, weight, 1e-5)
    assert error(added, total) < 5e-3
    assert error(normed, expected) < 8e-3


@pytest.mark.parametrize("tokens", [1, 300])
def test_gelu_tanh_and_mul(tokens: int) -> None:
    x = normal(tokens, 2 * 768)
    assert error(gelu_tanh_and_mul(x), gelu_tanh_and_mul(x.float().cpu())) < 8e-3


@pytest.mark.parametrize(("number", "per_token"), [(128, 8), (6, 2)])
@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
def test_experts_in_a_graph_follow_their_tokens(tokens: int, number: int, per_token: int) -> None:
    """One captured call, replayed for tokens that go to other experts each time."""
    hidden, size = 256, 96
    gate_up = normal(number, 2 * size, hidden) / hidden**0.5
    down = normal(number, hidden, size, seed=1) / size**0.5
    gate_up_bias, down_bias = normal(number, 2 * size), normal(number, hidden)
    x, logits = normal(tokens, hidden), normal(tokens, number)

    def compute() -> torch.Tensor:
        weights, chosen = route(logits, per_token, True)
        mlps = ExpertMLPs(gate_up, down, silu_and_mul, gate_up_bias, down_bias)
        return experts(x, weights, chosen, mlps)

    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute()
    for seed in range(4):
        x.copy_(normal(tokens, hidden, seed=seed))
        logits.copy_(normal(tokens, number, seed=seed) * 3)
        if seed == 3:
            logits[:, per_token:] -= 100.0  # all to the same few
        graph.replay()
        weights, chosen = route(logits, per_token, True)
        mlps = ExpertMLPs(
            gate_up.float(),
            down.float(),
            silu_and_mul_reference,
            gate_up_bias.float(),
            down_bias.float(),
        )
        expected = experts_reference(x.float(), weights.float(), chosen, mlps)
        assert error(out, expected) < 1e-2


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (16, 2)])
def test_windows_and_caps_are_the_references(heads: int, kv_heads: int) -> None:
    kinds = [
        AttentionKind(0.1, window=100),
        AttentionKind(0.2, soft_cap=3.0),
        AttentionKind(0.1, window=1),
        AttentionKind(0.125),
    ]
    rng = random.Random(heads)
    gpu, wide = caches(CacheShape(len(kinds), 2000, 16, kv_heads, 64))
    attention = FlashInferAttention(gpu, heads, LIMITS, kinds=kinds)
    reference = ReferenceAttention(wide, kinds)
    for contexts in ([1], [9000, 1, 17], [99, 100, 101, 16, 4097]):
        for counts in some_counts(contexts, rng):
            layout = make_layout(counts, contexts, 16, rng, gpu.shape.pages)
            compare(attention, reference, layout, heads, gpu.shape)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (16, 2)])
def test_attention_with_sinks_is_the_references(heads: int, kv_heads: int) -> None:
    """Of prompts, of decode and both, and as a graph's, with a window and without one."""
    kinds = [AttentionKind(0.125, window=100), AttentionKind(0.125)]
    rng = random.Random(heads)
    gpu, wide = caches(CacheShape(len(kinds), 2000, 16, kv_heads, 64))
    attention = FlashInferAttention(gpu, heads, LIMITS, kinds=kinds)
    reference = ReferenceAttention(wide, kinds)
    sinks = torch.linspace(-2.0, 6.0, heads, device="cuda")
    for contexts in ([1], [9000, 1, 17], [99, 100, 101, 16, 4097]):
        for counts in some_counts(contexts, rng):
            layout = make_layout(counts, contexts, 16, rng, gpu.shape.pages)
            compare(attention, reference, layout, heads, gpu.shape, sinks=sinks)
        ones = make_layout([1] * len(contexts), contexts, 16, rng, gpu.shape.pages)
        graph, padding = attention.for_graph(8), 8 - len(contexts)
        compare(graph, reference, ones, heads, gpu.shape, padding, sinks)


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_are_as_near_as_transformers_own(name: str, tmp_path: Path) -> None:
    assert_is_near(config_of(write_family(name, tmp_path, "cuda"), "cuda"))


@pytest.mark.parametrize("name", ["llama 3.1", "qwen2-moe", "qwen3-moe", "gemma 2"])
def test_logprobs_without_graphs(name: str, tmp_path: Path) -> None:
    folder = write_family(name, tmp_path, "cuda")
    assert_is_near(config_of(folder, "cuda", decode_graphs=0, piece_graphs=0))


def assert_is_near(config: EngineConfig) -> None:
    """To transformers in float32, as its own answers in bfloat16 are."""
    wide, narrow = (reference(config, dtype) for dtype in (torch.float32, torch.bfloat16))
    error, reference_error = logprob_errors(Engine(config), wide, narrow, copies=3)
    print(f"mean logprob error: {error:.5f}, transformers in bfloat16: {reference_error:.5f}")
    assert error <= 1.1 * reference_error
