"""Contexts of prompts that FlashInfer splits, merged by a kernel of the project's own.

A prompt beside decode is too few tiles of queries for a GPU, and FA2's plan splits its context.
What FlashInfer merges the parts with has a block for each token's head, and took 33 us of a layer
for 352 tokens of the Llama-3.1-8B shape on an H100, most of it waiting; a step has 32 layers.
"""

from typing import Any, NamedTuple

import torch

from fi_runtime.attention.workspace import Workspace
from fi_runtime.kernels.merge import merge_parts


class _Plan(NamedTuple):
    """FA2's plan of prompts, as ``PrefillPlanInfo`` of FlashInfer's scheduler.cuh lays it out.

    Offsets are in bytes: of partial results and their sums in the workspace for those, of all else
    in the plan's.
    """

    padded_tiles: int
    total_rows: int
    total_rows_offset: int
    tile_rows: int
    requests_offset: int
    query_tiles_offset: int
    key_tiles_offset: int
    starts_offset: int
    outputs_offset: int
    chunk_size_offset: int
    parts_offset: int
    sums_offset: int
    valid_offset: int
    captured: int
    split: int


class Splits:
    """What a plan has split, and where its parts will be.

    Args:
        plan: of a wrapper of prompts, for one step.
        workspace: of the wrapper.
        heads: of queries.
        head_dim: of each.
        dtype: of results.
    """

    def __init__(
        self, plan: _Plan, workspace: Workspace, heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        rows = plan.padded_tiles * plan.tile_rows
        partial, planned = workspace.partial, workspace.plan
        self._parts = _view(partial, plan.parts_offset, dtype, (rows, heads, head_dim))
        self._sums = _view(partial, plan.sums_offset, torch.float32, (rows, heads))
        self._starts = _view(planned, plan.starts_offset, torch.int32, (plan.total_rows + 1,))

    @classmethod
    def taken_from(
        cls, wrapper: Any, workspace: Workspace, heads: int, head_dim: int, dtype: torch.dtype
    ) -> "Splits | None":
        """Have a wrapper that has just planned leave the merging to ``merge``.

        It still merges the first token's parts, since it can launch nothing for none. None where
        nothing is split, or plans are of another kind, as FA3's are: then it merges what there is.
        """
        numbers = list(getattr(wrapper, "_plan_info", ()))
        if len(numbers) != len(_Plan._fields):
            return None
        plan = _Plan(*numbers)
        if not plan.split:
            return None
        wrapper._plan_info = type(wrapper._plan_info)(plan._replace(total_rows=1))
        return cls(plan, workspace, heads, head_dim, dtype)

    def merge(self, out: torch.Tensor, sums: torch.Tensor | None) -> None:
        """Once the wrapper has run: what it has left, to where it would have merged it.

        RACE: the next layer's parts go to the same place. They are computed by the same stream.
        """
        merge_parts(self._parts, self._sums, self._starts, out, sums)


def _view(
    memory: torch.Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return memory[offset : offset + size].view(dtype).view(shape)
