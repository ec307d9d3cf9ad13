"""Which architectures are served, by the names that config.json calls them by."""

import dataclasses
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from fi_runtime.config import ConfigError
from fi_runtime.models import mxfp4
from fi_runtime.models.config import ModelConfig, read_json
from fi_runtime.models.fp8 import read_fp8
from fi_runtime.models.gemma2 import GEMMA2
from fi_runtime.models.gemma3 import GEMMA3, GEMMA3_WITH_IMAGES
from fi_runtime.models.gpt_oss import GPT_OSS
from fi_runtime.models.llama import LLAMA
from fi_runtime.models.mistral import MISTRAL
from fi_runtime.models.phi3 import PHI3
from fi_runtime.models.qwen2 import QWEN2
from fi_runtime.models.qwen2_moe import QWEN2_MOE
from fi_runtime.models.qwen3 import QWEN3
from fi_runtime.models.qwen3_moe import QWEN3_MOE

ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_WITH_IMAGES,
    "GptOssForCausalLM": GPT_OSS,
    "Phi3ForCausalLM": PHI3,
}


def load_model_config(folder: Path) -> ModelConfig:
    """Read config.json, and generation_config.json where there is one.

    Raises:
        ConfigError: a file missing or malformed, or something in it that cannot be served; says
            which file, what was found and what was expected.
    """
    path = folder / "config.json"
    name = str((read_json(path).get("architectures") or ["none"])[0])
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"{path}: architecture {name} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a malformed file makes transformers raise
        raise ConfigError(f"{path}: {error}") from error
    quantisation = getattr(found, "quantization_config", None)
    try:
        family = ARCHITECTURES[name]
        config = family.read(found)
        fp8 = None
        if quantisation and not (family.mxfp4 and quantisation.get("quant_method") == mxfp4.METHOD):
            fp8 = read_fp8(quantisation)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    eos_ids = _eos_ids(folder, found)
    return dataclasses.replace(config, architecture=name, eos_ids=eos_ids, fp8=fp8)


def _eos_ids(folder: Path, found: PretrainedConfig) -> tuple[int, ...]:
    """Those of generation_config.json, else of config.json, else of the text model in it."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    ids = getattr(found, "eos_token_id", None)
    if ids is None:
        ids = found.get_text_config().eos_token_id
    ids = generation.get("eos_token_id", ids)
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
