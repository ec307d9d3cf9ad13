"""Qwen2 with a mixture of experts, one of which every token goes to (Qwen team, 2024)."""

import dataclasses

from transformers import PretrainedConfig

from fi_runtime.models.config import ModelConfig, read_common, windows_by_type
from fi_runtime.models.family import Family
from fi_runtime.models.mixture import MixtureBuilder, with_experts


def _read(found: PretrainedConfig) -> ModelConfig:
    common = read_common(found, windows=windows_by_type(found))
    common = dataclasses.replace(common, qkv_bias=found.qkv_bias, out_bias=False)
    return with_experts(common, found, found.shared_expert_intermediate_size)


QWEN2_MOE = Family(_read, MixtureBuilder)
