from fi_runtime.models.config import ModelConfig
from fi_runtime.models.decoder import Decoder, DecoderBuilder
from fi_runtime.models.weights import Weights


def build_llama(config: ModelConfig, weights: Weights, max_position: int) -> Decoder:
    """Llama 2 and 3 (Touvron et al., 2023)."""
    return DecoderBuilder(config, weights, max_position).build(qk_norm=False)
