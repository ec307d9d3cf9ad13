"""Qwen3 with a mixture of experts in place of the MLP (Qwen team, 2025)."""

from transformers import PretrainedConfig

from fi_runtime.models.config import ModelConfig, read_common
from fi_runtime.models.family import Family
from fi_runtime.models.mixture import MixtureBuilder, with_experts


class _Builder(MixtureBuilder):
    qk_norm = True


def _read(found: PretrainedConfig) -> ModelConfig:
    windows = [found.sliding_window] * found.num_hidden_layers
    return with_experts(read_common(found, windows=windows), found)


QWEN3_MOE = Family(_read, _Builder)
