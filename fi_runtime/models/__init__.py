"""Architectures, what their checkpoints say, and how their weights are read."""

from fi_runtime.models.config import ModelConfig, load_model_config
from fi_runtime.models.decoder import Decoder
from fi_runtime.models.llama import build_llama
from fi_runtime.models.qwen3 import build_qwen3
from fi_runtime.models.weights import CheckpointWeights

ARCHITECTURES = {
    "LlamaForCausalLM": build_llama,
    "Qwen3ForCausalLM": build_qwen3,
}

__all__ = ["ARCHITECTURES", "CheckpointWeights", "Decoder", "ModelConfig", "load_model_config"]
