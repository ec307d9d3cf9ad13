"""Qwen3 dense (Qwen team, 2025): Llama with a norm on each head's queries and keys."""

from transformers import PretrainedConfig

from fi_runtime.models.config import ModelConfig, read_common, windows_by_type
from fi_runtime.models.decoder import DecoderBuilder
from fi_runtime.models.family import Family


class Qwen3Builder(DecoderBuilder):
    qk_norm = True


def _read(found: PretrainedConfig) -> ModelConfig:
    return read_common(found, windows=windows_by_type(found))


QWEN3 = Family(_read, Qwen3Builder)
