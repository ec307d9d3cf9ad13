"""Mistral (Jiang et al., 2023): Llama, in its first version with a window in every layer."""

from transformers import PretrainedConfig

from fi_runtime.models.config import ModelConfig, read_common
from fi_runtime.models.family import Family


def _read(found: PretrainedConfig) -> ModelConfig:
    return read_common(found, windows=[found.sliding_window] * found.num_hidden_layers)


MISTRAL = Family(_read)
