"""Gemma 3's text models (Gemma team, 2025): norms on queries and keys, windows turn otherwise."""

from transformers import PretrainedConfig

from fi_runtime.models.config import ModelConfig
from fi_runtime.models.family import Family
from fi_runtime.models.gemma import GemmaBuilder, read_gemma
from fi_runtime.models.rope import read_rope


class _Builder(GemmaBuilder):
    qk_norm = True


def _read(found: PretrainedConfig) -> ModelConfig:
    ropes = {kind: read_rope(found, kind) for kind in set(found.layer_types)}
    return read_gemma(found, ropes=[ropes[kind] for kind in found.layer_types])


GEMMA3 = Family(_read, _Builder)
