"""What a family of models is made of."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from fi_runtime.models.adapters import Adapters
from fi_runtime.models.config import ModelConfig, read_common
from fi_runtime.models.decoder import Decoder, DecoderBuilder
from fi_runtime.models.weights import Weights


@dataclass(frozen=True)
class Family:
    """Models that read their config.json and name their tensors alike. The defaults are Llama's."""

    read: Callable[[PretrainedConfig], ModelConfig] = read_common
    """raises ConfigError for what cannot be served"""
    builder: type[DecoderBuilder] = DecoderBuilder
    mxfp4: bool = False
    """whether experts may be stored in MXFP4"""

    def build(
        self,
        config: ModelConfig,
        weights: Weights,
        max_position: int,
        adapters: Adapters | None = None,
    ) -> Decoder:
        """Take a decoder's tensors, as ``DecoderBuilder`` says."""
        return self.builder(config, weights, max_position, adapters).build()
