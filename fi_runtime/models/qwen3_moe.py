"""Qwen3 with a mixture of experts in place of the MLP (Qwen team, 2025)."""

import dataclasses

import torch
from transformers import PretrainedConfig

from fi_runtime.layers.moe import MixtureOfExperts
from fi_runtime.layers.norm import RMSNorm
from fi_runtime.models.config import Experts, ModelConfig, read_common
from fi_runtime.models.decoder import MLP
from fi_runtime.models.family import Family
from fi_runtime.models.qwen3 import Qwen3Builder


class _Builder(Qwen3Builder):
    def mlp(self, layer: int, norm: RMSNorm, post_norm: RMSNorm | None = None) -> MLP:
        config, experts = self.config, self.config.experts
        if experts is None or layer not in experts.layers:
            return super().mlp(layer, norm, post_norm)
        prefix = f"model.layers.{layer}.mlp"
        names = [f"{prefix}.experts.{expert}" for expert in range(experts.count)]
        size = experts.intermediate_size
        return MixtureOfExperts(
            norm,
            router=self.linear({f"{prefix}.gate": experts.count}, config.hidden_size, bias=False),
            gate_up=torch.stack([self.gate_up(name, size).weight for name in names]),
            down=torch.stack([self.down(name, size).weight for name in names]),
            per_token=experts.per_token,
            normalised=experts.normalised,
            activation=self.activation,
        )


def _read(found: PretrainedConfig) -> ModelConfig:
    layers = range(found.num_hidden_layers)
    dense = set(found.mlp_only_layers) | {
        layer for layer in layers if (layer + 1) % found.decoder_sparse_step
    }
    experts = Experts(
        layers=frozenset(layers) - dense if found.num_experts else frozenset(),
        count=found.num_experts,
        per_token=found.num_experts_per_tok,
        intermediate_size=found.moe_intermediate_size,
        normalised=found.norm_topk_prob,
    )
    common = read_common(found, windows=[found.sliding_window] * found.num_hidden_layers)
    return dataclasses.replace(common, experts=experts)


QWEN3_MOE = Family(_read, _Builder)
