"""Architectures, what their checkpoints say, and how their weights are read."""

from fi_runtime.models.config import ModelConfig
from fi_runtime.models.decoder import Decoder
from fi_runtime.models.registry import ARCHITECTURES, load_model_config
from fi_runtime.models.weights import CheckpointWeights

__all__ = ["ARCHITECTURES", "CheckpointWeights", "Decoder", "ModelConfig", "load_model_config"]
