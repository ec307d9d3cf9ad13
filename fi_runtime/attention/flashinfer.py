"""Paged attention through FlashInfer, with FA2 pinned in every wrapper.

FlashInfer's automatic choice once picked FA3 for decode on Hopper GPUs, several times slower at
long contexts. So nothing is left to it: each wrapper is told FA2, and what each will really run is
checked when the engine starts, since what it was told lies in a private attribute.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fi_runtime.attention.ahead import Ahead, Staging
from fi_runtime.attention.base import (
    AttentionKind,
    Int32s,
    StepLayout,
    plain_kinds,
    spare_layout,
)
from fi_runtime.attention.beside import Beside
from fi_runtime.attention.splits import Splits
from fi_runtime.attention.workspace import (
    MIN_PLAN_BYTES,
    Workspace,
    partial_bytes,
    plan_bytes,
)
from fi_runtime.cache.kv_cache import KVCache
from fi_runtime.cache.pages import SPARE_PAGE
from fi_runtime.config import Backend, ConfigError
from fi_runtime.kernels.heads import Heads, Places, place
from fi_runtime.kernels.library import flashinfer
from fi_runtime.upload import upload, upload_to

log = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)
"""elements of a head that FA2's kernels and the paged append are made for"""
TENSOR_CORE_RATIO = 4
"""query heads for each key/value head from which decode is faster on tensor cores"""
APART_CONTEXT = 65_536
"""tokens of context, at most, of all those tokens in a captured step that are a prompt's, each
computed as a sequence of its own"""


def check_head_dim(head_dim: int) -> None:
    """Refuse heads that there are no kernels for.

    Raises:
        ConfigError: says what was found and what is possible.
    """
    if head_dim not in HEAD_DIMS:
        raise ConfigError(
            f"head_dim={head_dim}: FlashInfer's FA2 kernels are for "
            f"{', '.join(map(str, HEAD_DIMS))}; such a model runs on the CPU only (KIND_CPU)"
        )


INPUTS = 8
"""words of 8 bytes for each sequence of a captured step, for what else it reads"""


@dataclass(frozen=True)
class Limits:
    """The largest step that attention is prepared for."""

    tokens: int
    sequences: int
    context: int
    """tokens of one sequence"""
    rows: int = 0
    """tokens of a captured step, each a sequence of its own; or ``sequences``, if that is more"""

    @property
    def captured(self) -> int:
        """Sequences of a captured step."""
        return max(self.sequences, self.rows)

    def page_numbers(self, page_size: int) -> int:
        """Of all sequences; more than there are pages, where many begin with the same ones."""
        return self.sequences * -(-self.context // page_size)


class FlashInferAttention:
    """Prefill by one wrapper, decode by another; a step may have both.

    In one wrapper's hands, few long runs of queries among many single ones would be cut into tiles
    of a size that is right for neither (``FA2DetermineCtaTileQ`` in FlashInfer's utils.cuh goes by
    the mean).

    Args:
        cache: on the GPU.
        heads: query heads.
        limits: what the workspace is made for.
        backend: what every wrapper is told to run.
        kinds: of each layer; default: plain.
        dtype: of queries and outputs; default: the cache's, which else is float8_e4m3fn.

    Raises:
        ConfigError: a wrapper would run something else than it was told, or needs a larger
            workspace than it has.
    """

    def __init__(
        self,
        cache: KVCache,
        heads: int,
        limits: Limits,
        backend: Backend = "fa2",
        kinds: Sequence[AttentionKind] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape, device = cache.shape, cache.data.device
        check_head_dim(shape.head_dim)
        self._limits = limits
        self.runs: dict[str, str] = {}
        """what each kind of wrapper really runs: fa2, fa3, or cuda-core"""
        processors = torch.cuda.get_device_properties(device).multi_processor_count

        def bytes_there(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.uint8, device=device)

        # Of decode, captured or not, and of prompts, which a step may have beside it.
        partial, partial_of_prompts = (
            bytes_there(partial_bytes(heads, shape.kv_heads, shape.head_dim, count, processors))
            for count in (limits.captured, 0)
        )
        layers = tuple(kinds or plain_kinds(shape.layers, shape.head_dim))
        distinct = list(dict.fromkeys(layers))

        def workspaces(tokens: int, partial: torch.Tensor) -> dict[AttentionKind, Workspace]:
            planned = plan_bytes(heads, shape.kv_heads, tokens, limits.captured)
            return {kind: Workspace(partial, bytes_there(planned)) for kind in distinct}

        tensor_cores = heads // shape.kv_heads >= TENSOR_CORE_RATIO
        self._common = _Common(
            cache, dtype or cache.data.dtype, heads, layers, tensor_cores, backend
        )
        # The pages of sequences, those of padding, and those that prompts' tokens have each for
        # itself, of which one is not full.
        own = limits.page_numbers(shape.page_size)
        apart = APART_CONTEXT // shape.page_size + limits.captured if limits.rows else 0
        least = 0 if backend == "fa2" else MIN_PLAN_BYTES
        planned = plan_bytes(heads, shape.kv_heads, limits.captured, limits.captured, least)
        self.ahead = Ahead(
            device,
            plans=[planned] * len(distinct),
            inputs=INPUTS * limits.captured,
            layout=4 * limits.captured + 1 + own + apart,
        )
        """what captured steps read is put there: of attention, and ``INPUTS`` words a sequence"""
        self._captured = _Captured(limits.captured, partial, distinct, self.ahead)
        library = flashinfer()
        self._decode = _Wrappers(
            self._common,
            workspaces(limits.captured, partial),
            lambda: library.BatchDecodeWithPagedKVCacheWrapper(
                partial, "NHD", use_tensor_cores=tensor_cores, backend=backend
            ),
        )
        self._prefill = _Wrappers(
            self._common,
            workspaces(limits.tokens, partial_of_prompts),
            lambda: library.BatchPrefillWithPagedKVCacheWrapper(
                partial_of_prompts, "NHD", backend=backend
            ),
            prefill=True,
        )
        self._beside = Beside(device)
        self._planned: list[tuple[slice, _Wrappers]] = []
        """which of the step's tokens each kind of wrapper attends to"""
        self._check(limits)

    def plan(self, layout: StepLayout) -> None:
        parts = (*layout.places, layout.page_starts, layout.pages)
        # One copy for all.
        there = upload(np.concatenate(parts), self._common.cache.data.device)
        self._places = Places(*torch.split(there, [len(part) for part in parts]))
        self.plan_on(layout, self._places.pages)

    def plan_on(self, layout: StepLayout, pages: torch.Tensor) -> None:
        """Plan ``attend`` alone; ``pages``: the layout's, on the device.

        Raises:
            ValueError: a sequence of several tokens comes after one of one.
        """
        several = np.diff(layout.query_starts) > 1
        prompts, sequences = int(several.sum()), len(several)
        if several[prompts:].any():
            raise ValueError("sequences of several tokens must come before those of one")
        self._planned = []
        parts = (0, prompts, self._prefill), (prompts, sequences, self._decode)
        for first, last, wrappers in parts:
            if first < last:
                own = slice(layout.page_starts[first], layout.page_starts[last])
                wrappers.plan(layout.part(first, last), pages[own])
                rows = slice(layout.query_starts[first], layout.query_starts[last])
                self._planned.append((rows, wrappers))

    def __call__(self, layer: int, qkv: torch.Tensor, heads: Heads) -> torch.Tensor:
        q = place(qkv, heads, self._places, self._common.cache.layer(layer))
        return self.attend(layer, q, heads.sinks, torch.empty_like(q))

    def attend(
        self, layer: int, q: torch.Tensor, sinks: torch.Tensor | None, out: torch.Tensor
    ) -> torch.Tensor:
        """Attention to what is in the cache, written to ``out``.

        Args:
            sinks: as ``Heads`` has them.
        """
        first, *others = self._planned
        try:
            for rows, wrappers in others:
                # Decode waits for memory, prompts for arithmetic. It is launched first, since what
                # computes prompts leaves no room on the GPU for what comes after it.
                with self._beside.launching():
                    wrappers.run(layer, q[rows], sinks, out[rows])
            rows, wrappers = first
            wrappers.run(layer, q[rows], sinks, out[rows])
        finally:
            # RACE: after an error, too, memory that decode reads and writes may be another's next.
            if others:
                self._beside.join()
        return out

    def for_graph(self, sequences: int) -> "GraphDecodeAttention":
        """Decode of exactly so many sequences, to be captured in a CUDA graph.

        Raises:
            ConfigError: its wrapper would run something else than it was told.
        """
        attention = GraphDecodeAttention(self._common, self._captured, sequences)
        self.runs["graph decode"] = attention.runs
        return attention

    def for_pieces(self, tokens: int) -> "PieceAttention":
        """Steps of up to so many, of which all but the attention itself is in CUDA graphs."""
        return PieceAttention(self, self._common, tokens, self._limits)

    def log_what_runs(self) -> None:
        """One line; loud where it is not what is meant to be used."""
        told = log.info if self._common.backend == "fa2" else log.warning
        told(
            "attention: FlashInfer %s, %s, decode on %s cores",
            flashinfer().__version__,
            ", ".join(f"{name} runs {runs}" for name, runs in sorted(self.runs.items())),
            "tensor" if self._common.tensor_cores else "CUDA",
        )

    def _check(self, limits: Limits) -> None:
        """Plan both wrappers: what they run is known then."""
        page_size = self._common.cache.shape.page_size
        self.plan(spare_layout([1], page_size))
        self.runs["decode"] = self._decode.check_backend("decode")
        self.plan(spare_layout([2], page_size))
        self.runs["prefill"] = self._prefill.check_backend("prefill")
        for tokens in {min(count, limits.tokens, limits.context) for count in (16, 256, 1 << 20)}:
            longest = spare_layout([tokens], page_size, [limits.context])
            self._prefill.check_workspace(f"prefill of {tokens} tokens", longest)


class GraphDecodeAttention:
    """Decode of a fixed number of sequences from buffers that never move.

    Fewer may be planned: the rest are padding, of one token each in the spare page.

    Args:
        buffers: that steps of any size share.
        sequences: of each step.
    """

    def __init__(self, common: "_Common", buffers: "_Captured", sequences: int) -> None:
        self._common = common
        self.ahead = buffers.ahead
        self._sequences = sequences
        self._first = buffers.first_of(sequences)
        there, read = (_Layout.of(side[self._first :], sequences) for side in self.ahead.layout)
        self._staged = [
            _Layout.of(staging.layout[self._first :], sequences) for staging in self.ahead.stagings
        ]
        self._arrays = [[part.numpy() for part in staged] for staged in self._staged]
        self._padding = np.arange(1, sequences + 1, dtype=np.int32)
        self._places = Places(None, read.positions, read.starts, read.pages)
        # One plans where the next step's is put; the other has been captured, and never plans
        # again, since where in its workspace a plan has what depends on the sizes alone.
        self._planning = buffers.wrappers(common, there, side=0)
        self._running = buffers.wrappers(common, read, side=1)
        spare = spare_layout([1] * sequences, common.cache.shape.page_size)
        with self.ahead.filling() as staging:
            self._write(spare, staging)
            self._planning.plan(spare, there.pages[:sequences], staging.turn)
        self._running.plan(spare, read.pages[:sequences])
        self.plan(spare)
        self.runs = self._running.check_backend("graph decode")
        self._running.check_workspace(f"graph decode of {sequences} sequences", spare)

    def plan(self, layout: StepLayout) -> None:
        """Also before each replay: a replay with a stale plan reads the wrong keys."""
        with self.ahead.filling() as staging:
            self.put(layout, staging)

    def put(self, layout: StepLayout, staging: Staging) -> None:
        """``plan``, while ``ahead`` is being filled."""
        self._write(layout, staging)
        self._planning.plan_again(self._staged[staging.turn], staging.turn)

    def _write(self, layout: StepLayout, staging: Staging) -> None:
        last, starts, positions, pages = self._arrays[staging.turn]
        count, used = len(layout.context_lens), len(layout.pages)
        missing = self._sequences - count
        positions[:count] = layout.context_lens
        positions[:count] -= 1
        np.remainder(positions[:count], self._common.cache.shape.page_size, out=last[:count])
        last[:count] += 1
        starts[: count + 1] = layout.page_starts
        pages[:used] = layout.pages
        if missing:
            last[count:], positions[count:] = 1, 0
            starts[count + 1 :] = self._padding[:missing] + used
            pages[used : used + missing] = SPARE_PAGE
        staging.layout_words = self._first + 3 * self._sequences + 1 + used + missing

    def __call__(self, layer: int, qkv: torch.Tensor, heads: Heads) -> torch.Tensor:
        q = place(qkv, heads, self._places, self._common.cache.layer(layer))
        return self._running.run(layer, q, heads.sinks)


class _Layout(NamedTuple):
    """What a captured step reads of its layout, int32; see ``StepLayout``."""

    last: torch.Tensor
    """(sequences,): tokens in each one's last page"""
    starts: torch.Tensor
    """(sequences + 1,): where the pages of each begin, and those of the last end"""
    positions: torch.Tensor
    """(sequences,): of each one's token"""
    pages: torch.Tensor
    """of all"""

    @classmethod
    def of(cls, whole: torch.Tensor, sequences: int) -> "_Layout":
        """They lie one after another."""
        sizes = [sequences, sequences + 1, sequences]
        return cls(*torch.split(whole, [*sizes, len(whole) - sum(sizes)]))


class _Captured:
    """The buffers of captured steps of any size.

    Args:
        sequences: of a step at most.
        partial: for partial results.
        kinds: of attention, each once.
        ahead: has a plan for each.
    """

    def __init__(
        self, sequences: int, partial: torch.Tensor, kinds: Sequence[AttentionKind], ahead: Ahead
    ) -> None:
        self.ahead = ahead
        self._sequences = sequences
        self._partial = partial
        self._workspaces = [
            {
                kind: Workspace(partial, plan[side])
                for kind, plan in zip(kinds, ahead.plans, strict=True)
            }
            for side in (0, 1)
        ]

    def first_of(self, sequences: int) -> int:
        """Where the layout of so many begins: pages do at the same place in any."""
        return 3 * (self._sequences - sequences)

    def wrappers(self, common: "_Common", layout: _Layout, side: int) -> "_Wrappers":
        """That plan to, and run from, one side of the buffers."""

        def make() -> Any:
            wrapper = flashinfer().CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
                self._partial,
                layout.starts,
                layout.pages,
                layout.last,
                "NHD",
                use_tensor_cores=common.tensor_cores,
            )
            # Its constructor takes no backend; what it would choose itself is what this is about.
            wrapper._backend = common.backend
            return wrapper

        return _Wrappers(common, self._workspaces[side], make)


class PieceAttention:
    """Attention of steps whose other parts are replayed from CUDA graphs, one between two layers.

    Keys and values are written in the graphs, from buffers that never move; attention itself is
    launched from the host, since how it is split depends on the lengths. Tokens beyond a step's own
    are padding, written to the spare page.

    Args:
        tokens: of a step at most.
        limits: of its sequences.
    """

    def __init__(
        self, attention: FlashInferAttention, common: "_Common", tokens: int, limits: Limits
    ) -> None:
        self._attention = attention
        shape, cache = common.cache.shape, common.cache.data
        # The spare page is the page of a sequence of its own, before all others.
        parts = (tokens, tokens, limits.sequences + 2, 1 + limits.page_numbers(shape.page_size))
        self._buffer = torch.zeros(sum(parts), dtype=torch.int32, device=cache.device)
        self._places = Places(*torch.split(self._buffer, list(parts)))
        self._parts = parts
        self._cache = common.cache
        self._q = torch.zeros(
            (tokens, common.heads, shape.head_dim), dtype=common.dtype, device=cache.device
        )
        self.out = torch.zeros_like(self._q)
        """(tokens, heads, head_dim): what ``attend`` leaves for the next graph"""
        self._sinks: dict[int, torch.Tensor | None] = {}
        """of each layer, from when it was captured"""

    def plan(self, layout: StepLayout) -> None:
        """Fill the buffers, and plan the attention of the step."""
        rows, positions = layout.places
        count = len(positions)
        head = np.zeros(sum(self._parts[:-1]) + 1 + len(layout.pages), dtype=np.int32)
        own_rows, own_positions, page_starts, pages = np.split(head, np.cumsum(self._parts[:-1]))
        own_rows[:count], own_positions[:count] = rows + 1, positions
        page_starts[1 : len(layout.page_starts) + 1] = layout.page_starts + 1
        pages[0], pages[1:] = SPARE_PAGE, layout.pages
        upload_to(self._buffer, head)
        self._attention.plan_on(layout, self._places.pages[1 : 1 + len(layout.pages)])

    def place(self, layer: int, qkv: torch.Tensor, heads: Heads) -> None:
        """Of as many tokens as there are; the queries are left for ``attend``."""
        count, (rows, positions, page_starts, pages) = len(qkv), self._places
        assert rows is not None
        own = Places(rows[:count], positions[:count], page_starts, pages)
        place(qkv, heads, own, self._cache.layer(layer), self._q[:count])
        self._sinks[layer] = heads.sinks

    def attend(self, layer: int, count: int) -> None:
        """Attention of the step's tokens, from what ``place`` left to ``out``."""
        self._attention.attend(layer, self._q[:count], self._sinks[layer], self.out[:count])


@dataclass(frozen=True)
class _Common:
    """What all wrappers of an engine share."""

    cache: KVCache
    dtype: torch.dtype
    """of queries"""
    heads: int
    kinds: tuple[AttentionKind, ...]
    """of each layer"""
    tensor_cores: bool
    """of decode"""
    backend: Backend


class _Wrappers:
    """One wrapper for each kind of attention: windows and caps are compiled in, and planned for.

    Args:
        workspaces: of each kind. Wrappers that share one are never planned for the same step.
    """

    def __init__(
        self,
        common: _Common,
        workspaces: dict[AttentionKind, Workspace],
        make: Callable[[], Any],
        prefill: bool = False,
    ) -> None:
        self._of_kind = {
            kind: _Wrapper(common, kind, workspace, make(), prefill)
            for kind, workspace in workspaces.items()
        }
        self._of_layer = [self._of_kind[kind] for kind in common.kinds]

    def plan(self, layout: StepLayout, pages: torch.Tensor, turn: int | None = None) -> None:
        """``pages``: the layout's, on the device; a copy from the host would be waited for."""
        for wrapper in self._of_kind.values():
            wrapper.plan(layout, pages, turn)

    def plan_again(self, layout: "_Layout", turn: int) -> None:
        """As ``_Wrapper``'s, of every one."""
        for wrapper in self._of_kind.values():
            wrapper.plan_again(layout, turn)

    def run(
        self,
        layer: int,
        q: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._of_layer[layer].run(layer, q, sinks, out)

    def check_backend(self, name: str) -> str:
        """As ``_Wrapper``'s, of every one; they are told the same."""
        return [wrapper.check_backend(name) for wrapper in self._of_kind.values()][-1]

    def check_workspace(self, what: str, layout: StepLayout) -> None:
        """As ``_Wrapper``'s, of every one."""
        for wrapper in self._of_kind.values():
            wrapper.check_workspace(what, layout)


class _Wrapper:
    """One wrapper of FlashInfer's, planned in the workspace of its kind."""

    def __init__(
        self,
        common: _Common,
        kind: AttentionKind,
        workspace: Workspace,
        wrapper: Any,
        prefill: bool,
    ) -> None:
        self._common = common
        self._workspace = workspace
        self._wrapper = wrapper
        self._prefill = prefill
        self._splits: Splits | None = None
        """of a plan of prompts"""
        self._workspace.share_with(wrapper)
        shape = common.cache.shape
        self._shape = (common.heads, shape.kv_heads, shape.head_dim, shape.page_size)
        self._options: dict[str, Any] = {
            "q_data_type": common.dtype,
            "kv_data_type": common.cache.data.dtype,
            # It counts those before a token only, and knows no window as -1.
            "window_left": (kind.window or 0) - 1,
            "logits_soft_cap": kind.soft_cap,
            "sm_scale": kind.scale,
        }

    def plan(self, layout: StepLayout, pages: torch.Tensor, turn: int | None = None) -> None:
        """``turn``: as ``Workspace.staged`` takes it."""
        arguments, options = self._arguments(layout, pages)
        with self._workspace.staged(self._wrapper, turn):
            self._wrapper.plan(*arguments, **options)
        if self._prefill:
            heads, _, head_dim, _ = self._shape
            self._splits = Splits.taken_from(
                self._wrapper, self._workspace, heads, head_dim, self._common.dtype
            )

    def plan_again(self, layout: "_Layout", turn: int) -> None:
        """For other lengths, on the host, of a wrapper that decodes from buffers which get them.

        Its own ``plan`` looks for the longest of many sequences one by one, which takes longer than
        all the rest.
        """
        with self._workspace.staged(self._wrapper, turn):
            flashinfer().fast_decode_plan(
                self._wrapper,
                layout.starts,
                layout.pages,
                layout.last,
                *self._shape,
                **self._options,
            )

    def run(
        self,
        layer: int,
        q: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        cache = self._common.cache.layer(layer)
        result: torch.Tensor
        sums: torch.Tensor | None = None
        if sinks is None:
            result = self._wrapper.run(q, cache, out=out)
        else:
            result, sums = self._wrapper.run(q, cache, out=out, return_lse=True)
        if self._splits is not None:
            self._splits.merge(result, sums)
        if sums is None or sinks is None:
            return result
        return beside_sinks(result, sums, sinks)

    def check_backend(self, name: str) -> str:
        """What it runs, once planned.

        Raises:
            ConfigError: something else than FA2, where FA2 was asked for.
        """
        if not (self._prefill or self._common.tensor_cores):
            return "cuda-core"  # a kernel of its own, whatever the backend
        runs = str(getattr(self._wrapper, "_backend", "unknown"))
        if self._common.backend == "fa2" and runs != "fa2":
            raise ConfigError(
                f"attention: the {name} wrapper of FlashInfer {flashinfer().__version__} would run "
                f"{runs} although it was told fa2; install the version of requirements.lock"
            )
        return runs

    def check_workspace(self, what: str, layout: StepLayout) -> None:
        """Ask what a step needs, where FlashInfer can tell: not for FA3, nor in older versions.

        Raises:
            ConfigError: more than the workspace has.
        """
        arguments, options = self._arguments(layout, torch.from_numpy(layout.pages))
        with contextlib.suppress(AttributeError, NotImplementedError):
            needed = self._wrapper.workspace_size(*arguments, **options)
            self._workspace.check(what, needed)

    def _arguments(
        self, layout: StepLayout, pages: torch.Tensor
    ) -> tuple[list[Any], dict[str, Any]]:
        arguments = [
            torch.from_numpy(layout.page_starts),
            pages,
            torch.from_numpy(_last_page_lens(layout, self._common.cache.shape.page_size)),
            *self._shape,
        ]
        options = dict(self._options)
        if self._prefill:
            arguments.insert(0, torch.from_numpy(layout.query_starts))
            options["causal"] = True
            # It would look for it token by token.
            options["max_token_per_sequence"] = int(np.diff(layout.query_starts).max())
        return arguments, options


def beside_sinks(out: torch.Tensor, sums: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """What attention gives where the softmax has one more score, for which there is no value.

    Its weights are those without it, times exp(s) / (exp(s) + exp(sink)), s being the logarithm of
    the sum of the exponentials of the keys' scores: the sigmoid of s - sink.

    Args:
        out: (tokens, heads, head_dim), overwritten.
        sums: (tokens, heads), float32: the logarithm to the base of 2, as FlashInfer gives it.
        sinks: (heads,), float32.
    """
    return out.mul_(torch.add(-sinks, sums, alpha=math.log(2)).sigmoid_().unsqueeze(-1))


def _last_page_lens(layout: StepLayout, page_size: int) -> Int32s:
    """Tokens in each sequence's last page, 1 to page_size."""
    lengths: Int32s = (layout.context_lens - 1) % page_size + 1
    return lengths.astype(np.int32)
