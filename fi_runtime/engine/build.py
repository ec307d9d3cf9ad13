"""Builds what an engine computes with: the model, its cache and attention, sized to the machine."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fi_runtime.attention.flashinfer import FlashInferAttention, Limits, check_head_dim
from fi_runtime.attention.reference import ReferenceAttention
from fi_runtime.cache.kv_cache import CacheShape, KVCache
from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.dtypes import DTYPES, dtype_name
from fi_runtime.engine.gpu_memory import room_for_cache
from fi_runtime.engine.phases import Phases
from fi_runtime.engine.runner import Runner
from fi_runtime.engine.step_graphs import GraphSizes, StepGraphs
from fi_runtime.kernels import moe
from fi_runtime.kernels.fp8 import has_products
from fi_runtime.kernels.library import check_gpu, prebuilt_manifest, use_prebuilt
from fi_runtime.kernels.prebuild import Compiled
from fi_runtime.models import ARCHITECTURES, Decoder, ModelConfig, load_model_config
from fi_runtime.models.adapters import Adapters
from fi_runtime.models.weights import CheckpointWeights, CountedWeights, DummyWeights, Weights

CPU = torch.device("cpu")
KERNELS_MULTIPLE = 8
"""of elements in a row: the embedding and activations are read 16 bytes at a time"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """A model that is ready to run."""

    model_config: ModelConfig
    runner: Runner
    pages: int
    """of the cache, the spare page among them"""
    max_context: int
    """tokens of one sequence"""
    adapters: tuple[str, ...]
    """their names, by number from 1"""


def build(config: EngineConfig, phases: Phases) -> Built:
    """Load the model, make its cache, and on a GPU capture its decode graphs.

    Raises:
        ConfigError: something cannot be served; says what was found and what is possible.
    """
    device = _device(config)
    torch.set_num_threads(config.cpu_threads or max(1, len(os.sched_getaffinity(0)) // 2))
    model_config = load_model_config(Path(config.checkpoint))
    dtype = compute_dtype(config)
    _check_max_context(config, model_config)
    if device.type == "cuda":
        check_gpu_has_kernels(model_config, dtype)
        _find_kernels(Path(config.kernels))
    phases.end("checks")
    model = _load(config, model_config, dtype, device)
    phases.end("weights")
    if device.type == "cuda":
        built = _build_on_gpu(config, model, phases)
    else:
        built = _build_on_cpu(config, model)
    log.info(
        "%s from %s in %s on %s, %d sequences of up to %d tokens, cache of %d tokens",
        model_config.architecture,
        config.checkpoint,
        dtype_name(dtype),
        torch.cuda.get_device_name() if device.type == "cuda" else "the CPU",
        config.max_sequences,
        built.max_context,
        (built.pages - 1) * config.page_size,
    )
    return built


def compute_dtype(config: EngineConfig) -> torch.dtype:
    """The dtype of weights and of what is computed with them."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    return torch.float32 if config.device == "cpu" else torch.bfloat16


def cache_dtype(config: EngineConfig) -> torch.dtype:
    """The dtype of keys and values in the cache."""
    return torch.float8_e4m3fn if config.cache_dtype == "fp8" else compute_dtype(config)


def check_has_kernels(model: ModelConfig, dtype: torch.dtype) -> None:
    """Refuse a model that there are no GPU kernels for, whatever the GPU.

    Raises:
        ConfigError: says what was found and what is possible.
    """
    check_head_dim(model.head_dim)
    if model.experts and model.experts.layers:
        moe.check_sizes(dtype, model.hidden_size, model.experts.intermediate_size)
    sizes = (model.hidden_size, model.intermediate_size)
    if any(size % KERNELS_MULTIPLE for size in sizes):
        raise ConfigError(
            f"hidden_size={sizes[0]}, intermediate_size={sizes[1]}: kernels on a GPU read rows of "
            f"multiples of {KERNELS_MULTIPLE}; use KIND_CPU"
        )


def check_gpu_has_kernels(model: ModelConfig, dtype: torch.dtype) -> None:
    """Refuse a model that there are no kernels for on this GPU, likewise."""
    check_gpu(dtype)
    check_has_kernels(model, dtype)
    if model.experts and model.experts.layers:
        moe.check_gpu()


def compiled_in(model: ModelConfig) -> Compiled:
    """What of a model's shape its kernels are compiled for."""
    variants = frozenset((bool(kind.window), bool(kind.soft_cap)) for kind in model.attention)
    return Compiled(model.head_dim, variants, model.activation)


def weight_bytes(model_config: ModelConfig, dtype: torch.dtype, device: torch.device = CPU) -> int:
    """What a model's weights take on a device, without reading them."""
    fp8 = model_config.fp8 if has_products(device, dtype) else None
    counted = CountedWeights(dtype, fp8)
    ARCHITECTURES[model_config.architecture].build(model_config, counted, 1)
    return counted.nbytes


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ConfigError(
            f"an engine on a GPU was asked for and torch {torch.__version__} finds none "
            f"(CUDA_VISIBLE_DEVICES: {visible}); see nvidia-smi, install a build of torch with "
            "CUDA, or use KIND_CPU"
        )
    return torch.device(config.device)


def _find_kernels(folder: Path) -> None:
    if prebuilt_manifest(folder) is not None:
        use_prebuilt(folder)
    else:
        log.warning(
            "no prebuilt kernels in %s: FlashInfer compiles those that it has not compiled here "
            "before, which takes minutes; python -m fi_runtime prebuild does it ahead",
            folder,
        )


def load_adapters(config: EngineConfig, model_config: ModelConfig) -> Adapters | None:
    """Those that a model is to have, opened; None: it is to have none.

    Raises:
        ConfigError: they cannot be served; says what was found and what is supported.
    """
    if not config.adapters:
        return None
    if model_config.fp8:
        raise ConfigError(
            f"{config.checkpoint}: adapters of weights in fp8 are not served; leave the knob "
            "adapters out, or use the same checkpoint in bfloat16"
        )
    return Adapters(config.adapters)


def _load(
    config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Decoder:
    adapters = load_adapters(config, model_config)
    needed, available = weight_bytes(model_config, dtype, device), available_memory(device)
    needed += adapters.nbytes if adapters else 0
    if needed > available:
        raise ConfigError(
            f"{config.checkpoint}: its weights take {needed / 1e9:.1f} GB in "
            f"{dtype_name(dtype)}; {available / 1e9:.1f} GB of memory are free"
        )
    folder = Path(config.checkpoint)
    weights: Weights
    if config.load_format == "dummy":
        log.warning("load_format dummy: the weights are random, and so is every answer")
        weights = DummyWeights(dtype, device, model_config.fp8)
    else:
        weights = CheckpointWeights(folder, dtype, device, model_config.fp8)
    if model_config.fp8:
        log.info(
            "weights in fp8 %s",
            "stay so where there are products for them"
            if has_products(device, dtype)
            else f"become {dtype_name(dtype)}, which products here are in",
        )
    positions = config.max_context or model_config.max_position
    family = ARCHITECTURES[model_config.architecture]
    model = family.build(model_config, weights, positions, adapters)
    weights.close()
    if adapters:
        adapters.close()
        log.info("%d adapters: %s", len(adapters.names), ", ".join(adapters.names))
    return model


def _build_on_cpu(config: EngineConfig, model: Decoder) -> Built:
    shape = _cache_shape(config, model.config, config.cache_tokens)
    dtype, device = cache_dtype(config), model.embedding.device
    # A quarter is for what else happens on the machine.
    fitting = available_memory(device) * 3 // 4 // (shape.nbytes(dtype) // shape.tokens)
    _check_cache(shape, dtype, fitting)
    cache = KVCache(shape, dtype, device)
    attention = ReferenceAttention(cache, model.config.attention)
    runner = Runner(model, attention, _last_tokens(config, device))
    max_context = _max_context(config, model.config, shape)
    return Built(model.config, runner, shape.pages, max_context, model.adapters)


def _build_on_gpu(config: EngineConfig, model: Decoder, phases: Phases) -> Built:
    """FlashInfer's attention, and decode from CUDA graphs, over what memory is left."""
    dtype, device = cache_dtype(config), model.embedding.device
    sizes = GraphSizes.of(config)
    limits = Limits(
        config.step_tokens,
        config.max_sequences,
        config.max_context or model.config.max_position,
        rows=max(sizes.tokens, default=0),
    )
    room = room_for_cache(
        model,
        limits,
        sizes,
        config.page_size,
        dtype,
        config.attention_backend,
        config.gpu_memory_fraction,
    )
    phases.end("memory")
    page_bytes = _cache_shape(config, model.config, 0).nbytes(dtype)
    fitting = max(0, room // page_bytes - 1) * config.page_size
    if fitting == 0:
        raise ConfigError(
            f"gpu_memory_fraction={config.gpu_memory_fraction}: no memory is left for the cache; "
            "use a larger one, fewer step_tokens, or fewer decode_graphs or piece_graphs"
        )
    shape = _cache_shape(config, model.config, config.cache_tokens or fitting)
    _check_cache(shape, dtype, fitting)
    max_context = _max_context(config, model.config, shape)
    cache = KVCache(shape, dtype, device)
    attention = FlashInferAttention(
        cache,
        model.config.heads,
        limits,
        config.attention_backend,
        model.config.attention,
        model.embedding.dtype,
    )
    phases.end("cache")
    last_tokens = _last_tokens(config, device)
    graphs = StepGraphs.capture(model, attention, sizes, last_tokens, config.page_size)
    attention.log_what_runs()
    phases.end("graphs")
    runner = Runner(model, attention, last_tokens, graphs)
    return Built(model.config, runner, shape.pages, max_context, model.adapters)


def _last_tokens(config: EngineConfig, device: torch.device) -> torch.Tensor:
    """One for each sequence that runs at a time, and one for padding."""
    return torch.zeros(config.max_sequences + 1, dtype=torch.int64, device=device)


def _cache_shape(config: EngineConfig, model: ModelConfig, tokens: int) -> CacheShape:
    return CacheShape(
        layers=model.layers,
        pages=tokens // config.page_size + 1,  # and the spare page
        page_size=config.page_size,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
    )


def _check_cache(shape: CacheShape, dtype: torch.dtype, fitting: int) -> None:
    """Refuse a cache that there is no memory for, before the kernel ends the engine."""
    tokens = shape.tokens - shape.page_size
    if tokens > fitting:
        raise ConfigError(
            f"cache_tokens={tokens} needs {shape.nbytes(dtype) / 1e9:.1f} GB "
            f"({shape.nbytes(dtype) // shape.tokens} bytes a token); there is memory for "
            f"{fitting}: set it to that or less"
        )


def _check_max_context(config: EngineConfig, model: ModelConfig) -> None:
    if config.max_context > model.max_position:
        raise ConfigError(
            f"max_context={config.max_context} is more than the {model.max_position} positions of "
            f"{config.checkpoint}"
        )


def _max_context(config: EngineConfig, model: ModelConfig, shape: CacheShape) -> int:
    """Tokens of one sequence: as asked for, or what both the model and the cache can hold."""
    cache_tokens = shape.tokens - shape.page_size
    if config.max_context > cache_tokens:
        raise ConfigError(
            f"max_context={config.max_context} is more than the cache holds; "
            f"it holds {cache_tokens} tokens (cache_tokens={config.cache_tokens})"
        )
    return config.max_context or min(model.max_position, cache_tokens)


def available_memory(device: torch.device) -> int:
    """Bytes of free memory: the GPU's, or what can be had without swapping, as Linux estimates."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return int(kilobytes["MemAvailable"].split()[0]) * 1024
