"""What the Gemmas share: norms before and after each half of a layer, and scaled embeddings."""

import dataclasses
from collections.abc import Sequence

from transformers import PretrainedConfig

from fi_runtime.layers.norm import OffsetRMSNorm
from fi_runtime.models.config import ModelConfig, read_common, windows_by_type
from fi_runtime.models.decoder import Block, DecoderBuilder
from fi_runtime.models.rope import Rope


class GemmaBuilder(DecoderBuilder):
    norm_type = OffsetRMSNorm

    def block(self, layer: int) -> Block:
        attention, attention_post, mlp, mlp_post = (
            self.norm(f"model.layers.{layer}.{name}_layernorm")
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        )
        return Block(
            attention=self.attention(layer, attention, attention_post),
            mlp=self.mlp(layer, mlp, mlp_post),
        )


def read_gemma(
    found: PretrainedConfig,
    soft_cap: float | None = None,
    ropes: Sequence[Rope] | None = None,
) -> ModelConfig:
    """As ``read_common``."""
    common = read_common(
        found,
        windows=windows_by_type(found),
        soft_cap=soft_cap,
        scale=found.query_pre_attn_scalar**-0.5,
        ropes=ropes,
    )
    return dataclasses.replace(
        common,
        embedding_scale=common.hidden_size**0.5,
        final_soft_cap=found.final_logit_softcapping,
    )
