"""Paged attention in plain torch, on any device: what the kernels are measured against."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from fi_runtime.attention.base import AttentionKind, StepLayout, plain_kinds
from fi_runtime.cache.kv_cache import KVCache
from fi_runtime.kernels.heads import Heads, as_kept, turned


@dataclass(frozen=True)
class _Group:
    """Sequences that are computed in one call: as many new tokens each, and contexts alike."""

    rows: torch.Tensor
    """(sequences * queries,): which of the step's tokens."""
    slots: torch.Tensor
    """(sequences, longest context): cache slots to read, the spare page's where there are none."""
    masks: dict[int | None, torch.Tensor]
    """For each window: (sequences, 1, queries, longest context), true where a query may look."""


class ReferenceAttention:
    """Gathers each sequence's keys and values through its page table, then attends to them.

    Args:
        cache: on any device; in the dtype of queries, or one that is read as that.
        kinds: of each layer; default: plain.
    """

    def __init__(self, cache: KVCache, kinds: Sequence[AttentionKind] | None = None) -> None:
        self._cache = cache
        self._kinds = kinds or plain_kinds(cache.shape.layers, cache.shape.head_dim)
        self._windows = {kind.window for kind in self._kinds}
        self._device = cache.data.device
        self._groups: list[_Group] = []
        self._write_slots = torch.empty(0, dtype=torch.int64, device=self._device)
        self._positions = torch.empty(0, dtype=torch.int32, device=self._device)

    def plan(self, layout: StepLayout) -> None:
        alike: dict[tuple[int, int], list[int]] = {}
        counts = np.diff(layout.query_starts).tolist()
        contexts = layout.context_lens.tolist()
        for sequence, (count, context) in enumerate(zip(counts, contexts, strict=True)):
            # No context is padded to more than twice its length: a long one costs itself alone.
            alike.setdefault((count, context.bit_length()), []).append(sequence)
        self._groups = [self._group(layout, key[0], members) for key, members in alike.items()]
        rows, positions = layout.places
        self._positions = self._to_device(positions)
        page_size = self._cache.shape.page_size
        pages = layout.pages[layout.page_starts[rows] + positions // page_size].astype(np.int64)
        self._write_slots = self._to_device(pages * page_size + positions % page_size)

    def __call__(self, layer: int, qkv: torch.Tensor, heads: Heads) -> torch.Tensor:
        q, k, v = turned(qkv, heads, self._positions)
        keys, values = (side.flatten(0, 1) for side in self._cache.layer(layer))
        keys[self._write_slots] = as_kept(k, keys.dtype)
        values[self._write_slots] = as_kept(v, values.dtype)
        kind, out = self._kinds[layer], torch.empty_like(q)
        for group in self._groups:
            sequences = group.slots.shape[0]
            # (sequences, heads, queries or context, head_dim), as the library wants them
            queries = q[group.rows].view(sequences, -1, *q.shape[1:]).transpose(1, 2)
            attended = _attend(
                queries,
                keys[group.slots].to(q.dtype).transpose(1, 2),
                values[group.slots].to(q.dtype).transpose(1, 2),
                group.masks[kind.window],
                kind,
                heads.sinks,
            )
            out[group.rows] = attended.transpose(1, 2).flatten(0, 1)
        return out

    def _group(self, layout: StepLayout, queries: int, members: list[int]) -> _Group:
        page_size = self._cache.shape.page_size
        contexts = layout.context_lens[members]
        longest = int(contexts.max())
        slots = np.zeros((len(members), longest), dtype=np.int64)
        for row, sequence in enumerate(members):
            pages = layout.pages[layout.page_starts[sequence] : layout.page_starts[sequence + 1]]
            own = pages[:, None].astype(np.int64) * page_size + np.arange(page_size)
            slots[row, : contexts[row]] = own.reshape(-1)[: contexts[row]]
        rows = layout.query_starts[members][:, None] + np.arange(queries)
        positions = contexts[:, None] - queries + np.arange(queries)  # (sequences, queries)
        # Of each query and key, how far back the key is.
        back = positions[:, None, :, None] - np.arange(longest)
        return _Group(
            rows=self._to_device(rows.reshape(-1).astype(np.int64)),
            slots=self._to_device(slots),
            masks={
                window: self._to_device((back >= 0) & (back < (window or longest)))
                for window in self._windows
            },
        )

    def _to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    kind: AttentionKind,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Where the mask is true: (sequences, heads, queries, head_dim), the shape of ``q``.

    ``k``, ``v``: (sequences, kv_heads, context, head_dim). ``sinks``: as ``Heads`` has them.
    """
    if kind.soft_cap is None and sinks is None:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=kind.scale, enable_gqa=True
        )
    # The library has no place for a cap, nor for sinks.
    groups = q.shape[1] // k.shape[1]
    k, v = (side.repeat_interleave(groups, dim=1) for side in (k, v))
    scores = q @ k.transpose(-1, -2) * kind.scale
    if kind.soft_cap is not None:
        scores = kind.soft_cap * torch.tanh(scores / kind.soft_cap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        of_sinks = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, of_sinks), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., : k.shape[2]]
    return weights.to(q.dtype) @ v
