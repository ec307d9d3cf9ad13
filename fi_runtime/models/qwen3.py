from fi_runtime.models.config import ModelConfig
from fi_runtime.models.decoder import Decoder, DecoderBuilder
from fi_runtime.models.weights import Weights


def build_qwen3(config: ModelConfig, weights: Weights, max_position: int) -> Decoder:
    """Qwen3 dense (Qwen team, 2025): Llama with a norm on each head's queries and keys."""
    return DecoderBuilder(config, weights, max_position).build(qk_norm=True)
