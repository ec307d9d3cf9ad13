"""The engine without its sockets: sequences in, a step at a time, tokens out."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fi_runtime.attention.flashinfer import FlashInferAttention
from fi_runtime.attention.reference import ReferenceAttention
from fi_runtime.cache.kv_cache import CacheShape, KVCache
from fi_runtime.cache.pages import PagePool
from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.engine.decode_graphs import DecodeGraphs
from fi_runtime.engine.runner import Runner, Sampled
from fi_runtime.engine.scheduler import Scheduler
from fi_runtime.engine.sequence import Sequence, SequenceKey
from fi_runtime.kernels.library import use_prebuilt
from fi_runtime.messages import FinishReason, Output, SamplingParams
from fi_runtime.models import (
    ARCHITECTURES,
    CheckpointWeights,
    Decoder,
    ModelConfig,
    load_model_config,
)
from fi_runtime.models.config import DTYPES

log = logging.getLogger(__name__)


class BadRequest(ValueError):
    """A sequence that this engine cannot run."""


@dataclass(frozen=True)
class Generation:
    """A finished sequence's output."""

    tokens: list[int]
    logprobs: list[float]
    """of each token, where the parameters ask for them"""
    finish: FinishReason


class Engine:
    """Continuous batching over a paged cache.

    Raises:
        ConfigError: the checkpoint or a knob cannot be served; says why.
    """

    def __init__(self, config: EngineConfig) -> None:
        device = _device(config)
        torch.set_num_threads(config.cpu_threads or max(1, len(os.sched_getaffinity(0)) // 2))
        folder = Path(config.checkpoint)
        self.model_config = load_model_config(folder, list(ARCHITECTURES))
        dtype = _dtype(config)
        shape = _cache_shape(config, self.model_config)
        _check_memory(shape, dtype, device)
        self.pool = PagePool(shape.pages)
        self.max_context = _max_context(config, self.model_config, self.pool)
        weights = CheckpointWeights(folder, dtype, device)
        model = ARCHITECTURES[self.model_config.architecture](
            self.model_config, weights, self.max_context
        )
        weights.close()
        cache = KVCache(shape, dtype, device)
        self._runner = _runner(config, model, cache)
        self.scheduler = Scheduler(
            self.pool, config.page_size, config.max_sequences, config.step_tokens
        )
        self._sequences: dict[SequenceKey, Sequence] = {}
        log.info(
            "%s from %s in %s on %s, %d sequences of up to %d tokens, cache of %d tokens (%.0f MB)",
            self.model_config.architecture,
            folder,
            str(dtype).removeprefix("torch."),
            device,
            config.max_sequences,
            self.max_context,
            self.pool.usable * config.page_size,
            cache.data.nbytes / 1e6,
        )

    @property
    def busy(self) -> bool:
        """Whether a step has anything to compute."""
        return bool(self._sequences)

    def add(self, key: SequenceKey, prompt: list[int], params: SamplingParams) -> None:
        """Queue a new sequence.

        Raises:
            BadRequest: it cannot run; says what was given and what is allowed.
        """
        if key in self._sequences:
            raise BadRequest(f"request {key[1]} is already running")
        if not prompt:
            raise BadRequest("the prompt is empty; give at least one token")
        if len(prompt) + params.max_tokens > self.max_context:
            raise BadRequest(
                f"{len(prompt)} prompt tokens and max_tokens={params.max_tokens} are more than "
                f"the context of {self.max_context} tokens"
            )
        if max(prompt) >= self.model_config.vocab_size:
            raise BadRequest(
                f"token id {max(prompt)} is outside the vocabulary of "
                f"{self.model_config.vocab_size} tokens"
            )
        self._sequences[key] = Sequence(key, list(prompt), params)
        self.scheduler.add(self._sequences[key])

    def abort(self, key: SequenceKey) -> bool:
        """End a sequence and free its pages; false if there is no such sequence any more."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return False
        self.scheduler.remove(sequence)
        return True

    def keys_of(self, front_end: bytes) -> list[SequenceKey]:
        return [key for key in self._sequences if key[0] == front_end]

    def step(self) -> list[tuple[SequenceKey, Output]]:
        """Compute one step; what it gave each sequence that has a new token."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        completing = [chunk.sequence for chunk in chunks if chunk.completes]
        try:
            sampled = self._runner.run(chunks)
        except Exception as error:  # what one sequence did to a step must not end the engine
            log.exception("a step of %d sequences failed", len(chunks))
            return [self._give_up(chunk.sequence, error) for chunk in chunks]
        for chunk in chunks:
            chunk.sequence.num_cached += chunk.count
        return [
            (sequence.key, self._advance(sequence, new))
            for sequence, new in zip(completing, sampled, strict=True)
        ]

    def generate(
        self, prompts: Iterable[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[Generation]:
        """Run prompts to their end, in one batch with whatever else is running."""
        prompts = list(prompts)
        each = params if isinstance(params, list) else [params] * len(prompts)
        outputs: dict[SequenceKey, list[Output]] = {(b"", i): [] for i in range(len(prompts))}
        for key, prompt, own in zip(outputs, prompts, each, strict=True):
            self.add(key, prompt, own)
        while self.busy:
            for key, output in self.step():
                outputs[key].append(output)
        return [
            Generation(
                tokens=[token for one in steps for token in one.tokens],
                logprobs=[row[0].logprob for one in steps for row in one.logprobs or ()],
                finish=steps[-1].finish or "failed",
            )
            for steps in outputs.values()
        ]

    def _give_up(self, sequence: Sequence, error: Exception) -> tuple[SequenceKey, Output]:
        self.abort(sequence.key)
        reason = f"the engine could not compute it: {error!r}; the server's log has more"
        return sequence.key, Output(sequence.key[1], [], None, "failed", reason)

    def _advance(self, sequence: Sequence, new: Sampled) -> Output:
        """Append a token; where it ends the sequence, free its pages."""
        sequence.tokens.append(new.token)
        finish = self._finish_reason(sequence, new.token)
        if finish is not None:
            self.abort(sequence.key)
        return Output(
            request=sequence.key[1],
            tokens=[new.token],
            logprobs=None if new.logprobs is None else [new.logprobs],
            finish=finish,
        )

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.params
        if token in params.stop_token_ids:
            return "stop"
        if token in self.model_config.eos_ids and not params.ignore_eos:
            return "stop"
        if sequence.num_generated >= params.max_tokens:
            return "length"
        return None


def _cache_shape(config: EngineConfig, model: ModelConfig) -> CacheShape:
    return CacheShape(
        layers=model.layers,
        pages=config.cache_tokens // config.page_size + 1,  # and the spare page
        page_size=config.page_size,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
    )


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device='cuda': torch finds no GPU (torch "
            f"{torch.__version__}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}); "
            "use device='cpu', or a machine and a torch build with CUDA"
        )
    return torch.device(config.device)


def _dtype(config: EngineConfig) -> torch.dtype:
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    return torch.float32 if config.device == "cpu" else torch.bfloat16


def _runner(config: EngineConfig, model: Decoder, cache: KVCache) -> Runner:
    """Plain torch on the CPU; on a GPU FlashInfer, and decode from CUDA graphs."""
    device = cache.data.device
    if device.type == "cpu":
        return Runner(model, ReferenceAttention(cache), config.page_size, device)
    if config.kernels:
        use_prebuilt(Path(config.kernels))
    attention = FlashInferAttention(cache, model.config.heads, config.attention_backend)
    captured = min(config.decode_graphs, config.max_sequences)
    graphs = DecodeGraphs(model, attention, captured) if captured else None
    return Runner(model, attention, config.page_size, device, graphs)


def _check_memory(shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a cache that there is no memory for, before the kernel ends the engine."""
    on_gpu = device.type == "cuda"
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else _available_memory()
    token_bytes = shape.nbytes(dtype) // shape.tokens
    if shape.nbytes(dtype) > available:
        raise ConfigError(
            f"cache_tokens={shape.tokens - shape.page_size} needs "
            f"{shape.nbytes(dtype) / 1e9:.1f} GB ({token_bytes} bytes a token); "
            f"{available / 1e9:.1f} GB are free: set it to {available // token_bytes // 2} or less"
        )


def _available_memory() -> int:
    """Bytes that can be had without swapping, as Linux estimates them."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return int(kilobytes["MemAvailable"].split()[0]) * 1024


def _max_context(config: EngineConfig, model: ModelConfig, pool: PagePool) -> int:
    """Tokens of one sequence: as asked for, or what both the model and the cache can hold."""
    cache_tokens = pool.usable * config.page_size
    if config.max_context > model.max_position:
        raise ConfigError(
            f"max_context={config.max_context} is more than the {model.max_position} positions of "
            f"{config.checkpoint}"
        )
    if config.max_context > cache_tokens:
        raise ConfigError(
            f"max_context={config.max_context} is more than the cache holds; "
            f"it holds {cache_tokens} tokens (cache_tokens={config.cache_tokens})"
        )
    return config.max_context or min(model.max_position, cache_tokens)
