"""Experts in MXFP4, as gpt-oss is published, against what transformers makes of the same codes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bench.families import write
from fi_runtime.config import ConfigError
from tests.twins import Twin

SIZES = {"hidden_size": 64, "intermediate_size": 96}
"""multiples of a block's 32 elements"""
NAMES = [
    f"model.layers.{layer}.mlp.experts.{part}_proj"
    for layer in (0, 2)
    for part in ("gate_up", "down")
]
"""of the experts that are stored so; those of the layer between stay as they are"""


def quantise(model: PreTrainedModel, folder: Path) -> None:
    """Store some experts as random codes; the model gets the weights that are then meant."""
    path, parameters = folder / "model.safetensors", dict(model.named_parameters())
    tensors = load_file(path)
    rng = torch.Generator().manual_seed(1)
    for name in NAMES:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=rng, dtype=torch.uint8)
        scales = torch.randint(121, 126, shape, generator=rng, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        parameters[name].data = meant.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def twin(tmp_path: Path) -> Twin:
    model = write("gpt-oss", tmp_path, **SIZES)
    quantise(model, tmp_path)
    return Twin(tmp_path, model)


def test_answers_are_transformers_own(twin: Twin) -> None:
    twin.check(twin.engine(step_tokens=64), [1, 2, 33, 100, 300])


def test_inputs_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    model = write("gpt-oss", tmp_path)
    path, name = tmp_path / "model.safetensors", NAMES[0]
    tensors = load_file(path)
    del tensors[name]
    tensors[f"{name}_blocks"] = torch.zeros((6, 80, 1, 16), dtype=torch.uint8)
    tensors[f"{name}_scales"] = torch.zeros((6, 80, 1), dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"{name} is in MXFP4, and has 48 inputs .* of 32"):
        Twin(tmp_path, model).engine()


def test_matrices_in_mxfp4_are_not_known(twin: Twin) -> None:
    path, name = twin.folder / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(path)
    tensors[f"{name}_blocks"] = tensors.pop(name).to(torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"tensor {name} is in none of its 1 safetensors files"):
        twin.engine()


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("blocks", lambda t: t[:, :-2], r"has shape \[6, 190, 2, 16\]; expected \[6, 192, 2, 16\]"),
        ("scales", lambda t: t[..., :1], r"has shape \[6, 192, 1\]; expected \[6, 192, 2\]"),
        ("scales", lambda t: t.float(), "has dtype torch.float32; supported are uint8"),
        ("scales", lambda t: None, "is in none of its 1 safetensors files"),
    ],
)
def test_what_is_stored_otherwise_is_named(
    part: str, change: Callable[[torch.Tensor], torch.Tensor | None], words: str, twin: Twin
) -> None:
    path, name = twin.folder / "model.safetensors", f"{NAMES[0]}_{part}"
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"tensor {name} {words}"):
        twin.engine()
