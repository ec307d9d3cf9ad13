"""LoRA adapters for tests, written as PEFT writes them, and what they make of transformers' models.

PEFT itself is not needed: its format is two files, and what it computes one line.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

CONFIG: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "somewhere",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
"""as PEFT 0.18 writes it of a plain adapter; what it lists as target_modules is for training"""


def projections(model: PreTrainedModel, which: str) -> Iterator[tuple[str, nn.Linear]]:
    """Those of the text model's layers whose names a pattern finds."""
    for name, module in model.named_modules():
        layer = re.search(r"(?<!encoder\.)layers\.\d+\.(self_attn|mlp)\.\w+_proj$", name)
        if isinstance(module, nn.Linear) and layer and re.search(which, name):
            yield name, module


def write_adapter(
    model: PreTrainedModel,
    folder: Path,
    which: str = "",
    *,
    seed: int = 0,
    std: float = 0.25,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Save a random adapter of the projections that a pattern finds in their names."""
    generator = torch.Generator().manual_seed(seed)
    config = CONFIG | config
    tensors = {}
    for name, module in projections(model, which):
        outputs, inputs = module.weight.shape
        for letter, shape in (("A", (config["r"], inputs)), ("B", (outputs, config["r"]))):
            tensor = torch.empty(shape).normal_(std=std, generator=generator)
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = tensor.to(dtype)
    assert tensors
    return write_files(folder, config, tensors)


def write_files(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def pairs(folder: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
    """Of each projection that an adapter is for: its name, A, B, and what B A is multiplied by."""
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            yield name, a, tensors[key.replace(".lora_A.", ".lora_B.")], scale


def merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add an adapter to the weights of a model."""
    with torch.no_grad():
        for name, a, b, scale in pairs(folder):
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            weight += (scale * b.float() @ a.float()).to(weight)
    return model


def hook(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Have a model add what an adapter gives to each projection's result, as PEFT does."""
    for name, a, b, scale in pairs(folder):
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        a, b = a.to(module.weight), b.to(module.weight)

        def add(
            _: nn.Module,
            inputs: tuple[torch.Tensor],
            result: torch.Tensor,
            a: torch.Tensor = a,
            b: torch.Tensor = b,
            scale: float = scale,
        ) -> torch.Tensor:
            return result + inputs[0] @ a.T @ b.T * scale

        module.register_forward_hook(add)
    return model
