"""Products in fp8 against what they mean, and answers of checkpoints in fp8. Needs Hopper."""

import copy
import math
from pathlib import Path

import pytest
import torch

from bench.fidelity import config_of, logprob_errors, reference, write_family
from fi_runtime.engine.core import Engine
from fi_runtime.kernels.fp8 import (
    FP8,
    dequantised,
    has_products,
    laid_out,
    product,
    rounded,
    rounded_reference,
)
from fi_runtime.messages import SamplingParams
from tests.fp8 import FORMATS, quantise, round_inputs
from tests.test_gpu import BF16, error, normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and has_products(torch.device("cuda"), BF16)),
        reason="needs an NVIDIA GPU of compute capability 9.0",
    ),
]


def weight_of(outputs: int, inputs: int, blocks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """In fp8, and its scales, which differ by much."""
    shape = (outputs // 128, inputs // 128) if blocks else (outputs, 1)
    generator = torch.Generator().manual_seed(outputs)
    scale = torch.empty(shape).uniform_(1e-4, 1e-2, generator=generator).cuda()
    return (normal(outputs, inputs).float() * 100).clamp(-448, 448).to(FP8), scale


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("inputs", [128, 256, 1024, 14_336])
@pytest.mark.parametrize("rows", [1, 7, 16, 300])
def test_rows_are_rounded_as_the_reference_rounds_them(
    rows: int, inputs: int, blocks: bool
) -> None:
    x = normal(rows, inputs + 64) * torch.logspace(-3, 3, rows, device="cuda")[:, None]
    x = x.to(BF16)[:, :inputs]  # rows that do not touch
    x[0, :128] = 0.0
    x[-1, 5] = 30_000.0
    codes, scales = rounded(x, blocks)
    expected, expected_scales = rounded_reference(x, blocks)
    assert codes.shape == expected.shape
    assert scales.stride(0) == 1
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0.0)
    assert not codes[rows:].float().any()
    assert codes.float().isfinite().all()
    assert error(codes, expected) < 2e-3  # a tie may become either


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(128, 128), (1536, 512), (4096, 1280), (28_672, 4096), (4096, 14_336)]
)
def test_products_are_those_of_rounded_rows(outputs: int, inputs: int, blocks: bool) -> None:
    weight, scale = weight_of(outputs, inputs, blocks)
    meant, scales = dequantised(weight, scale), laid_out(scale, blocks)
    for rows in (1, 2, 3, 15, 16, 17, 130, 1000):
        x = normal(rows, inputs) * torch.logspace(-2, 2, rows, device="cuda")[:, None].to(BF16)
        codes, own = rounded(x, blocks)
        wide = (codes.float() * own.repeat_interleave(inputs // own.shape[1], 1))[:rows]
        found = product(x, weight, scales, blocks)
        assert found.shape == (rows, outputs)
        expected = wide.double() @ meant.T.double()
        for row in range(min(rows, 20)):  # each apart: they are of very different sizes
            assert error(found[row], expected[row]) < 5e-3


@pytest.mark.parametrize("blocks", [True, False])
def test_products_are_replayed_from_a_graph(blocks: bool) -> None:
    weight, scale = weight_of(1024, 512, blocks)
    scales, x = laid_out(scale, blocks), normal(5, 512)
    product(x, weight, scales, blocks)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(x, weight, scales, blocks)
    for seed in range(3):
        x.copy_(normal(5, 512, seed=seed))
        graph.replay()
        assert torch.equal(out, product(x, weight, scales, blocks))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("family", "graphs"),
    [("llama, biased", True), ("llama, biased", False), ("qwen3-moe", True), ("phi-3", True)],
)
def test_logprobs_are_as_near_as_rounded_rows_and_bfloat16(
    family: str, graphs: bool, kind: str, tmp_path: Path
) -> None:
    """To transformers in float32 with the weights that are meant.

    Two errors are known: that of transformers in float32 with the rows of these projections rounded
    likewise, and that of transformers in bfloat16. They are independent, so that both together have
    the root of the sum of their squares; a quarter more is for what each adds to the other.
    """
    config = config_of(write_family(family, tmp_path, "cuda"), "cuda")
    if not graphs:
        config = config_of(tmp_path, "cuda", decode_graphs=0, piece_graphs=0)
    wide, narrow = (reference(config, dtype) for dtype in (torch.float32, BF16))
    quantise(wide, tmp_path, kind)
    with torch.no_grad():
        for own, meant in zip(narrow.parameters(), wide.parameters(), strict=True):
            own.copy_(meant)
    round_inputs(rounding := copy.deepcopy(wide), kind)
    engine = Engine(config)
    found, of_bfloat16 = logprob_errors(engine, wide, narrow, 4)
    _, of_rows = logprob_errors(engine, wide, rounding, 4)
    print(f"{found:.4f}, of rounded rows {of_rows:.4f}, of bfloat16 {of_bfloat16:.4f}")
    assert found <= 1.25 * math.hypot(of_rows, of_bfloat16)


def test_random_weights_stay_in_fp8(tmp_path: Path) -> None:
    """As a measurement has them, of which less memory is taken."""
    config = config_of(write_family("qwen3", tmp_path, "cuda"), "cuda", load_format="dummy")
    quantise(reference(config, torch.float32), tmp_path, "a block's")
    (tmp_path / "model.safetensors").unlink()
    params = SamplingParams(max_tokens=8, temperature=0.0, seed=0, ignore_eos=True)
    result = Engine(config).generate([[1, 2, 3]], params)[0]
    assert len(result.tokens) == 8
