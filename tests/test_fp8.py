"""Checkpoints in fp8 against transformers' own models of the weights that they mean."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.families import prompt_of, write
from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.engine import build
from fi_runtime.engine.build import weight_bytes
from fi_runtime.engine.core import Engine
from fi_runtime.kernels import fp8
from fi_runtime.layers import fp8 as layers
from fi_runtime.messages import SamplingParams
from fi_runtime.models import load_model_config, weights
from tests.adapters import write_adapter
from tests.fp8 import BLOCKS, FORMATS, PLAIN, compressed, quantise, round_inputs

FP8 = torch.float8_e4m3fn
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, seed=0, logprobs=0)
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "head_dim": 64,
    "initializer_range": 0.12,
}
"""of which projections there are products in fp8, also of blocks"""


def logprobs_of(model: Any, tokens: list[int], after: int) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0, after - 1 : -1]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3-moe", "phi-3"])
def test_the_cpu_answers_as_transformers_does_with_the_weights_that_are_meant(
    family: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantise(write(family, tmp_path), tmp_path, kind)
    engine = Engine(EngineConfig(checkpoint=str(tmp_path), cache_tokens=1600))
    assert "tensors not used" not in caplog.text
    prompts = [prompt_of(length) for length in (1, 17, 130)]
    for prompt, result in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        rows = logprobs_of(model, prompt + result.tokens, len(prompt))
        expected = rows.max(-1)
        assert result.tokens == expected.indices.tolist()
        assert result.logprobs == pytest.approx(expected.values.tolist(), abs=1e-4)


@pytest.fixture
def with_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """As on Hopper, whose products are stood in for by what they mean: the sizes of each."""
    made: list[tuple[int, int]] = []

    def product(x: torch.Tensor, weight: torch.Tensor, *how: Any) -> torch.Tensor:
        assert weight.dtype == FP8
        made.append((weight.shape[0], weight.shape[1]))
        return fp8.product_reference(x, weight, *how)

    monkeypatch.setattr(weights, "has_products", lambda *_: True)
    monkeypatch.setattr(layers, "product", product)
    return made


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", ["llama, biased", "qwen3-moe"])
def test_products_in_fp8_are_as_near_as_rounded_rows(
    family: str, kind: str, tmp_path: Path, with_products: list[tuple[int, int]]
) -> None:
    model = quantise(write(family, tmp_path, **WIDE), tmp_path, kind)
    engine = Engine(EngineConfig(checkpoint=str(tmp_path), cache_tokens=1600))
    prompts = [prompt_of(length) for length in (1, 2, 3, 5, 9, 17)]
    results = engine.generate(prompts, GREEDY)
    qkv, attended = (512, 128), (128, 256)
    gate_up, down = (768, 128), (128, 384)
    # Experts are of products of their own.
    assert set(with_products) == {qkv, attended, *(() if "moe" in family else (gate_up, down))}

    def error() -> float:
        """The median, since an element between two numbers may become either of them."""
        errors = []
        for prompt, result in zip(prompts, results, strict=True):
            rows = logprobs_of(model, prompt + result.tokens, len(prompt))
            expected = rows.gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
            errors.append((torch.tensor(result.logprobs) - expected).abs())
        return float(torch.cat(errors).median())

    unrounded = error()
    assert unrounded > 1e-4, "rounding is seen at all"
    round_inputs(model, kind)
    assert error() < unrounded / 20


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (PLAIN | {"fmt": "e5m2"}, "fmt 'e5m2'"),
        (BLOCKS | {"weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        (BLOCKS | {"scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'"),
        (compressed("tensor", type="int"), "weights {.*'int'"),
        (compressed("group"), "strategy 'group'"),
        (compressed("block", block_structure=[1, 128]), r"block_structure \[1, 128\]"),
        (compressed("tensor") | {"config_groups": {}}, r"config_groups \[\]"),
        (
            compressed("tensor") | {"transform_config": {"config_groups": {"R4": {}}}},
            "transform_config {.*'R4'",
        ),
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
    ],
    ids=str,
)
def test_another_quantisation_is_refused(said: dict[str, Any], words: str, tmp_path: Path) -> None:
    write("llama 2", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    expected = f"{path}: quantization_config has {words}.*; supported are quant_method fp8 and"
    with pytest.raises(ConfigError, match=expected):
        load_model_config(tmp_path)


def test_a_scale_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    quantise(write("llama 2", tmp_path), tmp_path, "a block's")
    path = tmp_path / "model.safetensors"
    whole, name = load_file(path), "model.layers.1.self_attn.q_proj.weight_scale_inv"
    for scale, words in (
        (None, rf"tensor {name} is in none of .*; expected one of shape \[1, 1\]"),
        (torch.ones(2, 1), rf"tensor {name} has shape \[2, 1\]; expected \[1, 1\]"),
    ):
        given = {} if scale is None else {name: scale}
        save_file({key: each for key, each in whole.items() if key != name} | given, path)
        with pytest.raises(ConfigError, match=words):
            Engine(EngineConfig(checkpoint=str(tmp_path)))


def test_experts_that_are_stored_in_one_tensor_are_refused(tmp_path: Path) -> None:
    write("gpt-oss", tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.experts.gate_up_proj"
    tensors = load_file(path)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path, metadata={"format": "pt"})
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": PLAIN}))
    with pytest.raises(ConfigError, match=f"tensor {name} is in fp8 and has shape .* matrices"):
        Engine(EngineConfig(checkpoint=str(tmp_path)))


def test_adapters_of_weights_in_fp8_are_refused(tmp_path: Path) -> None:
    model = write("llama 2", tmp_path / "model")
    write_adapter(model, tmp_path / "adapter")
    quantise(model, tmp_path / "model", "a row's")
    adapters = {"one": str(tmp_path / "adapter")}
    with pytest.raises(ConfigError, match="adapters of weights in fp8 are not served; leave"):
        Engine(EngineConfig(checkpoint=str(tmp_path / "model"), adapters=adapters))


def test_what_stays_in_fp8_takes_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantise(write("llama 2", tmp_path, **WIDE), tmp_path, "a row's")
    model = load_model_config(tmp_path)
    whole = weight_bytes(model, torch.bfloat16)
    monkeypatch.setattr(build, "has_products", lambda *_: True)
    projections = 3 * 128 * (512 + 256 + 3 * 384)
    assert whole - weight_bytes(model, torch.bfloat16) == projections
