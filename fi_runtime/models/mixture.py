"""What families with mixtures of experts share: routed experts in place of some layers' MLP."""

import dataclasses

import torch
from transformers import PretrainedConfig

from fi_runtime.kernels.moe import ExpertMLPs
from fi_runtime.layers.linear import Linear
from fi_runtime.layers.moe import MixtureOfExperts, SharedExpert
from fi_runtime.layers.norm import RMSNorm
from fi_runtime.models.config import Experts, ModelConfig
from fi_runtime.models.decoder import MLP, DecoderBuilder


class MixtureBuilder(DecoderBuilder):
    def mlp(self, layer: int, norm: RMSNorm, post_norm: RMSNorm | None = None) -> MLP:
        experts = self.config.experts
        if experts is None or layer not in experts.layers:
            return super().mlp(layer, norm, post_norm)
        prefix = f"model.layers.{layer}.mlp"
        return MixtureOfExperts(
            norm,
            router=self.router(prefix, experts.count),
            mlps=self.expert_mlps(prefix, experts),
            per_token=experts.per_token,
            normalised=experts.normalised,
            shared=self.shared(prefix, experts.shared_size) if experts.shared_size else None,
        )

    def router(self, prefix: str, count: int) -> Linear:
        """(tokens, hidden) -> (tokens, experts)."""
        return self.linear({f"{prefix}.gate": count}, self.config.hidden_size, bias=False)

    def expert_mlps(self, prefix: str, experts: Experts) -> ExpertMLPs:
        names = [f"{prefix}.experts.{expert}" for expert in range(experts.count)]
        size, hidden = experts.intermediate_size, self.config.hidden_size
        return ExpertMLPs(
            gate_up=torch.stack(
                [
                    self.weight({f"{name}.{part}_proj": size for part in ("gate", "up")}, hidden)
                    for name in names
                ]
            ),
            down=torch.stack([self.weight({f"{name}.down_proj": hidden}, size) for name in names]),
            activation=self.activation,
        )

    def shared(self, prefix: str, size: int) -> SharedExpert:
        name = f"{prefix}.shared_expert"
        return SharedExpert(
            gate=self.linear({f"{name}_gate": 1}, self.config.hidden_size, bias=False),
            gate_up=self.gate_up(name, size),
            down=self.down(name, size),
            activation=self.activation,
        )


def with_experts(common: ModelConfig, found: PretrainedConfig, shared_size: int = 0) -> ModelConfig:
    """The same shape, with the experts that config.json has.

    Args:
        shared_size: elements of the intermediate layer of an expert that every token goes to; 0:
            there is none.
    """
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
        shared_size=shared_size,
    )
    return dataclasses.replace(common, experts=experts)
