"""Gemma 3's text models (Gemma team, 2025): norms on queries and keys, windows turn otherwise."""

import dataclasses
from collections.abc import Mapping

import torch
from transformers import PretrainedConfig

from fi_runtime.models.adapters import Adapters
from fi_runtime.models.config import ModelConfig
from fi_runtime.models.family import Family
from fi_runtime.models.gemma import GemmaBuilder, read_gemma
from fi_runtime.models.rope import read_rope
from fi_runtime.models.weights import Weights


class _Builder(GemmaBuilder):
    qk_norm = True


def _read(found: PretrainedConfig) -> ModelConfig:
    ropes = {kind: read_rope(found, kind) for kind in set(found.layer_types)}
    return read_gemma(found, ropes=[ropes[kind] for kind in found.layer_types])


class _TextWeights:
    """The tensors of the text model of one that reads images, too."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._weights.take(f"language_model.{name}", shape)

    def has(self, name: str) -> bool:
        return self._weights.has(f"language_model.{name}")

    def keeps_fp8(self, outputs: Mapping[str, int], inputs: int) -> bool:
        named = {f"language_model.{name}": count for name, count in outputs.items()}
        return self._weights.keeps_fp8(named, inputs)

    def take_fp8(self, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._weights.take_fp8(f"language_model.{name}", shape)

    def close(self) -> None:
        self._weights.close()


class _TextBuilder(_Builder):
    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        max_position: int,
        adapters: Adapters | None = None,
    ) -> None:
        super().__init__(config, _TextWeights(weights), max_position, adapters)


def _read_text(found: PretrainedConfig) -> ModelConfig:
    # Whose head is its own, too.
    return dataclasses.replace(
        _read(found.text_config), tied_embeddings=bool(found.tie_word_embeddings)
    )


GEMMA3 = Family(_read, _Builder)
GEMMA3_WITH_IMAGES = Family(_read_text, _TextBuilder)
"""of which the text model is served"""
