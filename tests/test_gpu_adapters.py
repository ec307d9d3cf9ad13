"""Adapters on a GPU: projections against their meaning on the CPU, and logprobs. Needs a GPU."""

import itertools
import random
from pathlib import Path

import pytest
import torch

from bench.families import GPU_SHAPE, GPU_SHAPES, write
from bench.fidelity import config_of, forced_logprobs, reference
from fi_runtime.engine.core import Engine
from fi_runtime.kernels.activation import silu_and_mul
from fi_runtime.layers.adapted import AdaptedLinear
from fi_runtime.layers.norm import OffsetRMSNorm, RMSNorm
from fi_runtime.layers.residual import ResidualStream
from fi_runtime.messages import SamplingParams
from tests.adapters import hook, merge, write_adapter
from tests.test_gpu import BF16, NO_GRAPHS, error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

HIDDEN, INNER, RANKS = 512, 768, 48


class Half:
    """What of a layer has projections, without attention, of random weights.

    Args:
        device: where it computes, in bfloat16 on a GPU and else in float32, from equal weights.
    """

    def __init__(self, device: str, norm_type: type[RMSNorm], bias: bool) -> None:
        self._device = device
        self._generator = torch.Generator().manual_seed(11)
        # About 1 either way, or else what is added is too little to tell.
        mean = 0.0 if norm_type is OffsetRMSNorm else 1.0
        self._norms = [norm_type(self.tensor(HIDDEN, mean=mean), 1e-5) for _ in range(3)]
        self._qkv = self._linear([HIDDEN, 128, 128], HIDDEN, bias)
        self._gate_up = self._linear([INNER, INNER], HIDDEN, bias)
        self._down = self._linear([HIDDEN], INNER, bias)
        of_rank = torch.tensor([1] * 8 + [2] * 16 + [3] * 16 + [-1] * 8)
        self._of_rank = of_rank.to(device)

    def tensor(self, *shape: int, mean: float = 0.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator) * shape[-1] ** -0.5 + mean
        rounded = values.to(BF16).to(self._device)
        return rounded if rounded.is_cuda else rounded.float()

    def _linear(self, sizes: list[int], inputs: int, bias: bool) -> AdaptedLinear:
        runs = [(size, len([*same])) for size, same in itertools.groupby(sizes)]
        return AdaptedLinear(
            self.tensor(sum(sizes), inputs),
            self.tensor(sum(sizes)) if bias else None,
            self.tensor(len(sizes) * RANKS, inputs),
            [self.tensor(count, size, RANKS).transpose(1, 2).contiguous() for size, count in runs],
        )

    def __call__(
        self, x: torch.Tensor, adapters: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values; what is added; the norm of the sum."""
        others = None if adapters is None else adapters.unsqueeze(1) != self._of_rank
        residual = ResidualStream(x.clone(), others)
        qkv = residual.project(self._norms[0], self._qkv)
        inner = residual.project_gated(self._norms[1], self._gate_up, silu_and_mul)
        residual.add(inner, self._down)
        normed = residual.normed(self._norms[2])
        return qkv, normed, residual.total


@pytest.mark.parametrize("rows", [1, 8, 16, 17, 64, 300])
@pytest.mark.parametrize("norm_type", [RMSNorm, OffsetRMSNorm])
@pytest.mark.parametrize("bias", [False, True])
def test_projections_are_those_of_the_cpu(rows: int, norm_type: type[RMSNorm], bias: bool) -> None:
    """Also replayed from a graph, for other rows with other adapters."""
    gpu, cpu = Half("cuda", norm_type, bias), Half("cpu", norm_type, bias)
    generator = torch.Generator().manual_seed(rows)

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn((rows, HIDDEN), generator=generator).to(BF16)
        return x, torch.randint(0, 4, (rows,), generator=generator)

    def compare(
        found: tuple[torch.Tensor, ...], x: torch.Tensor, adapters: torch.Tensor | None
    ) -> None:
        for ours, right in zip(found, cpu(x.float(), adapters), strict=True):
            assert error(ours, right) < 2e-2

    with torch.inference_mode():
        x, adapters = inputs()
        compare(gpu(x.cuda(), adapters.cuda()), x, adapters)
        compare(gpu(x.cuda(), None), x, None)
        there, theirs = x.cuda(), adapters.cuda()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = gpu(there, theirs)
        for _ in range(3):
            x, adapters = inputs()
            there.copy_(x)
            theirs.copy_(adapters)
            graph.replay()
            compare(results, x, adapters)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["llama 2", "qwen3", "gemma 2", "phi-3"])
def test_logprobs_are_as_near_as_transformers_own(name: str, graphs: bool, tmp_path: Path) -> None:
    """As near to those of merged weights in float32 as adding in bfloat16, as PEFT does, is.

    Several adapters and none in a batch that shrinks from 24 sequences, through the sizes that
    kernels for few rows are for, to one; prompts in chunks.
    """
    base = tmp_path / "base"
    # bfloat16 on disk: all that are compared then have the same weights.
    model = write(name, base, BF16, **GPU_SHAPE | GPU_SHAPES.get(name, {}))
    kinds = {"all": ("", 16), "some": ("(q|v|qkv|up)_proj", 5), "layers": (r"[02]\..*_proj", 8)}
    folders = {
        kind: write_adapter(
            model, tmp_path / kind, which, r=rank, lora_alpha=rank, std=0.1, dtype=BF16
        )
        for kind, (which, rank) in kinds.items()
    }
    knobs = {} if graphs else NO_GRAPHS
    adapters = {kind: str(folder) for kind, folder in folders.items()}
    config = config_of(base, "cuda", max_sequences=24, adapters=adapters, **knobs)
    rng = random.Random(0)
    names = ["", *kinds] * 6
    prompts = [rng.choices(range(199), k=rng.choice((1, 7, 33, 100, 200))) for _ in names]
    params = [
        SamplingParams(max_tokens=8 + 2 * number, seed=number, logprobs=0, lora_name=kind)
        for number, kind in enumerate(names)
    ]
    results = Engine(config).generate(prompts, params)
    ours, theirs = [], []
    for kind in ("", *kinds):
        wide, narrow = (reference(config, dtype) for dtype in (torch.float32, BF16))
        if kind:
            wide, narrow = merge(wide, folders[kind]), hook(narrow, folders[kind])
        for other, prompt, result in zip(names, prompts, results, strict=True):
            if other == kind:
                tokens = prompt + result.tokens
                right = forced_logprobs(wide, tokens, len(prompt))
                ours.append((torch.tensor(result.logprobs) - right).abs())
                theirs.append((forced_logprobs(narrow, tokens, len(prompt)) - right).abs())
    own_error, their_error = torch.cat(ours).mean(), torch.cat(theirs).mean()
    print(f"mean logprob error: {own_error:.5f}, transformers in bfloat16: {their_error:.5f}")
    assert own_error <= 1.1 * their_error
