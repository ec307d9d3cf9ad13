"""gpt-oss (OpenAI, 2025): attention with sinks, and experts with biases and clamped activations."""

import dataclasses
from functools import partial

import torch
from transformers import PretrainedConfig

from fi_runtime.kernels.activation import clamped_silu_and_mul
from fi_runtime.kernels.moe import ExpertMLPs
from fi_runtime.layers.linear import Linear
from fi_runtime.models.config import Experts, ModelConfig, read_common, windows_by_type
from fi_runtime.models.family import Family
from fi_runtime.models.mixture import MixtureBuilder


class _Builder(MixtureBuilder):
    def router(self, prefix: str, count: int) -> Linear:
        return self.linear({f"{prefix}.router": count}, self.config.hidden_size, bias=True)

    def expert_mlps(self, prefix: str, experts: Experts) -> ExpertMLPs:
        count, size, hidden = experts.count, experts.intermediate_size, self.config.hidden_size
        inner, outer = f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj"
        assert experts.limit is not None
        return ExpertMLPs(
            gate_up=_gates_first(self.weights.take(inner, (count, hidden, 2 * size)).mT),
            down=self.weights.take(outer, (count, size, hidden)).mT.contiguous(),
            activation=partial(clamped_silu_and_mul, slope=experts.slope, limit=experts.limit),
            gate_up_bias=_gates_first(self.weights.take(f"{inner}_bias", (count, 2 * size))),
            down_bias=self.weights.take(f"{outer}_bias", (count, hidden)),
        )


def _gates_first(gate_up: torch.Tensor) -> torch.Tensor:
    """Of (experts, 2 * size, ...), in which gates and ups take turns."""
    return torch.cat((gate_up[:, ::2], gate_up[:, 1::2]), dim=1)


def _read(found: PretrainedConfig) -> ModelConfig:
    common = read_common(found, windows=windows_by_type(found))
    experts = Experts(
        layers=frozenset(range(common.layers)),
        count=found.num_local_experts,
        per_token=found.num_experts_per_tok,
        intermediate_size=found.intermediate_size,
        normalised=True,
        # Not of all versions of transformers, whose model then computes with these.
        slope=getattr(found, "swiglu_alpha", 1.702),
        limit=getattr(found, "swiglu_limit", 7.0),
    )
    return dataclasses.replace(common, sinks=True, experts=experts)


GPT_OSS = Family(_read, _Builder, mxfp4=True)
