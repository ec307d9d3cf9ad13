"""Checkpoints in fp8, as published ones store them, and transformers' model of each."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

FP8 = torch.float8_e4m3fn

PLAIN = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn"],
}


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    """As the library compressed-tensors says it."""
    kind = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": kind}},
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"],
        "kv_cache_scheme": None,
    }


FORMATS: dict[str, dict[str, Any]] = {
    "a tensor's": PLAIN,
    "a row's": compressed("channel"),
    "a block's": BLOCKS,
    "a block's, compressed": compressed("block", block_structure=[128, 128]),
}
"""quantization_config of each, by whose the scales are"""


def quantise(model: PreTrainedModel, folder: Path, kind: str) -> PreTrainedModel:
    """Store a checkpoint that is there in fp8; the model gets the weights that are then meant."""
    said = FORMATS[kind]
    name = "weight_scale_inv" if kind == "a block's" else "weight_scale"
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for key, weight in list(tensors.items()):
        if "_proj.weight" not in key or (said is BLOCKS and ".0.self_attn" in key):
            continue
        out, inner = weight.shape
        rows, columns = {"a tensor's": (out, inner), "a row's": (1, inner)}.get(kind, (128, 128))
        tall, wide = math.ceil(out / rows), math.ceil(inner / columns)
        scale = torch.empty(tall, wide)
        codes, dequantised = (torch.empty(out, inner, dtype=kept) for kept in (FP8, torch.float32))
        for i in range(tall):
            for j in range(wide):
                part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                block = weight[part].float()
                # Published scales of blocks are in bfloat16, too.
                scale[i, j] = (block.abs().max() / 448).bfloat16().float()
                codes[part] = (block / scale[i, j]).clamp(-448, 448).to(FP8)
                dequantised[part] = codes[part].float() * scale[i, j]
        tensors[key], meant[key] = codes, dequantised
        module = key.removesuffix("weight")
        if kind == "a tensor's":
            scale = scale.reshape(())
            tensors[f"{module}input_scale"] = torch.tensor(0.01)
        tensors[module + name] = scale.bfloat16() if kind == "a block's" else scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    assert meant, "something is in fp8"
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in meant:
                parameter.copy_(meant.pop(key))
        # transformers joins experts.
        for key, parameter in model.named_parameters():
            if "experts" in key and parameter.dim() == 3:
                _join(key, parameter, meant)
    assert not meant, f"not in the model: {list(meant)[:3]}"
    return model


def round_inputs(model: torch.nn.Module, kind: str) -> None:
    """Have the projections of layers that are in fp8 round their rows."""

    def rounded(_: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = inputs
        groups = x.unflatten(-1, (-1, 128 if "block" in kind else x.shape[-1]))
        scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
        return ((groups / scales).to(FP8).float() * scales).flatten(-2)

    for name, module in model.named_modules():
        skipped = kind == "a block's" and ".layers.0.self_attn" in name
        if isinstance(module, torch.nn.Linear) and name.endswith("_proj") and not skipped:
            module.register_forward_pre_hook(rounded)


def _join(key: str, parameter: torch.Tensor, meant: dict[str, torch.Tensor]) -> None:
    prefix, kind = key.rsplit(".", 1)
    parts = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}[kind]
    for expert, own in enumerate(parameter):
        own.copy_(torch.cat([meant.pop(f"{prefix}.{expert}.{part}.weight") for part in parts]))
