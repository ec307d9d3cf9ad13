"""Gemma 2 (Gemma team, 2024): soft caps on scores and logits, a window in every other layer."""

from transformers import PretrainedConfig

from fi_runtime.models.config import ModelConfig
from fi_runtime.models.family import Family
from fi_runtime.models.gemma import GemmaBuilder, read_gemma


def _read(found: PretrainedConfig) -> ModelConfig:
    return read_gemma(found, soft_cap=found.attn_logit_softcapping)


GEMMA2 = Family(_read, GemmaBuilder)
