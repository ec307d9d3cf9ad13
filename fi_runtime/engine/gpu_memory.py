"""How much of a GPU's memory is left for the cache, measured instead of guessed."""

import gc
import logging

import torch

from fi_runtime.attention.base import spare_layout
from fi_runtime.attention.flashinfer import FlashInferAttention, Limits
from fi_runtime.cache.kv_cache import CacheShape, KVCache
from fi_runtime.config import Backend
from fi_runtime.engine.step_graphs import GraphSizes, StepGraphs
from fi_runtime.kernels.sampling import Draws, TokenSlots, choose, scratch_for
from fi_runtime.models import Decoder

log = logging.getLogger(__name__)


def room_for_cache(
    model: Decoder,
    limits: Limits,
    sizes: GraphSizes,
    page_size: int,
    cache_dtype: torch.dtype,
    backend: Backend,
    fraction: float,
) -> int:
    """Bytes that the cache may take so that ``fraction`` of the memory is in use in the end.

    Runs the largest step and captures the two largest graphs of each kind on a cache of one page,
    to see what they take; each further one takes as much more as the second did.
    """
    weights = _in_use()
    config = model.config
    # The spare page, and one that nobody asks for.
    shape = CacheShape(config.layers, 2, page_size, config.kv_heads, config.head_dim)
    cache = KVCache(shape, cache_dtype, model.embedding.device)
    attention = FlashInferAttention(
        cache, config.heads, limits, backend, config.attention, model.embedding.dtype
    )
    _run_largest_step(model, attention, limits, page_size)
    step = _in_use() - weights
    # Captures give back what torch keeps of the step, which the next step will take again.
    torch.cuda.empty_cache()
    before = _in_use()
    last = torch.zeros(limits.sequences + 1, dtype=torch.int64, device=model.embedding.device)
    graphs = StepGraphs.capture(model, attention, sizes.largest(2), last, page_size)
    captured = _in_use() - before
    kinds = (
        (graphs.decode, sizes.decode),
        (graphs.tokens, sizes.tokens),
        (graphs.pieces, sizes.pieces),
    )
    more = sum(
        min(some.nbytes.values()) * (len(all_sizes) - len(some.nbytes))
        for some, all_sizes in kinds
        if some is not None
    )
    total = torch.cuda.mem_get_info()[1]
    room = int(fraction * total) - weights - step - captured - more
    log.info(
        "memory: %.1f of %.1f GB may be used; in use before the cache: %.1f GB with the weights, "
        "%.2f GB by a step of %d tokens and its workspace, %.2f GB by graphs of %d steps",
        fraction * total / 1e9,
        total / 1e9,
        weights / 1e9,
        step / 1e9,
        limits.tokens,
        (captured + more) / 1e9,
        len(sizes),
    )
    del graphs, kinds, attention, cache
    gc.collect()
    torch.cuda.empty_cache()
    return room


@torch.inference_mode()
def _run_largest_step(
    model: Decoder, attention: FlashInferAttention, limits: Limits, page_size: int
) -> None:
    """As many tokens as a step has at most, and as many drawn from."""
    device = model.embedding.device
    each = min(limits.tokens, limits.context)
    layout = spare_layout([each] * (limits.tokens // each), page_size)
    count = int(layout.query_starts[-1])
    tokens = torch.zeros(count, dtype=torch.int64, device=device)
    last_tokens = torch.zeros(limits.sequences + 1, dtype=torch.int64, device=device)
    attention.plan(layout)
    adapters = torch.zeros_like(tokens) if model.adapters else None
    hidden = model(tokens, last_tokens, attention, adapters)
    logits = model.logits(hidden[: limits.sequences])
    rows = len(logits)
    half = torch.full((5, rows), 0.5, dtype=torch.float64, device=device)
    slots = TokenSlots(last_tokens, torch.arange(rows, device=device))
    choose(logits, Draws.of(half), slots, True, scratch_for(rows, device))


def _in_use() -> int:
    """Bytes of the current device's memory that are taken, by whomever; cached ones count."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free
