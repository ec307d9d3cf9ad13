"""Qwen2 and Qwen2.5 (Qwen team, 2024): Llama with biases on queries, keys and values."""

import dataclasses

from transformers import PretrainedConfig

from fi_runtime.models.config import ModelConfig, read_common, windows_by_type
from fi_runtime.models.family import Family


def _read(found: PretrainedConfig) -> ModelConfig:
    common = read_common(found, windows=windows_by_type(found))
    return dataclasses.replace(common, qkv_bias=True, out_bias=False)


QWEN2 = Family(_read)
