"""Phi-3 and Phi-4-mini (Abdin et al., 2024): Llama whose projections are stored joined."""

from transformers import PretrainedConfig

from fi_runtime.layers.linear import Linear
from fi_runtime.models.config import ModelConfig, read_common
from fi_runtime.models.decoder import DecoderBuilder
from fi_runtime.models.family import Family
from fi_runtime.models.rope import read_rope


class _Builder(DecoderBuilder):
    def qkv(self, prefix: str) -> Linear:
        heads = self.config.heads + 2 * self.config.kv_heads
        outputs = {f"{prefix}.qkv_proj": heads * self.config.head_dim}
        return self.linear(outputs, self.config.hidden_size, bias=False)

    def gate_up(self, prefix: str, size: int) -> Linear:
        outputs = {f"{prefix}.gate_up_proj": 2 * size}
        return self.linear(outputs, self.config.hidden_size, bias=False)


def _read(found: PretrainedConfig) -> ModelConfig:
    layers = found.num_hidden_layers
    return read_common(
        found,
        windows=[found.sliding_window] * layers,
        ropes=[read_rope(found, partial=True)] * layers,
    )


PHI3 = Family(_read, _Builder)
