"""Time for each further token of a mixture of experts, beside the limit of the experts it reads.

    python -m bench.moe [--kernels FOLDER] [--out FILE]

As ``bench.latency`` measures it, with Qwen3-30B-A3B's shape and random weights. How many experts of
a layer a step's tokens go to is counted in a run of its own, of the same prompts, without graphs;
the limit is the time to read those, all other weights, keys and values. Needs a GPU with 80 GB.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer

from bench.latency import point, print_rows, seconds_of
from bench.offline import engine_of, release
from bench.options import Kernels, Out
from bench.results import write_results
from bench.shapes import MIXTURE
from fi_runtime.kernels.moe import route
from fi_runtime.layers import moe

POINTS = ((1, 1024), (8, 1024), (64, 1024))
"""batch and tokens of each prompt"""
COUNTED_TOKENS = 64
"""of each answer, while experts are counted"""


@contextlib.contextmanager
def counting(tokens: int) -> Iterator[list[torch.Tensor]]:
    """While it lasts, layers add to a list how many experts a step of so many tokens goes to.

    Each number is a tensor of its own, (), on the model's device. Steps that are replayed from a
    graph add nothing.
    """
    numbers: list[torch.Tensor] = []

    def counted(
        logits: torch.Tensor, per_token: int, normalised: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = route(logits, per_token, normalised)
        if len(logits) == tokens:
            used = torch.zeros(logits.shape[-1], device=logits.device)
            numbers.append(used.index_fill_(0, chosen.flatten(), 1.0).sum())
        return weights, chosen

    with mock.patch.object(moe, "route", counted):
        yield numbers


def touched(kernels: Path | None) -> list[float]:
    """The mean number of experts of a layer that a step reads, at each point."""
    means = []
    with tempfile.TemporaryDirectory() as name:
        eager = {"decode_graphs": 0, "piece_graphs": 0}
        engine, _ = engine_of(MIXTURE, kernels, Path(name), **eager)
        for batch, context in POINTS:
            with counting(batch) as numbers:
                seconds_of(engine, batch, context, COUNTED_TOKENS)
            means.append(torch.stack(numbers).mean().item())
    return means


def measure(kernels: Path | None, means: list[float]) -> list[dict[str, Any]]:
    """A row for each point."""
    with tempfile.TemporaryDirectory() as name:
        engine, limits = engine_of(MIXTURE, kernels, Path(name))
        return [
            {
                "model": MIXTURE,
                **point(engine, limits, *each, mean),
                "experts_touched": round(mean, 1),
                "experts": limits.experts,
            }
            for each, mean in zip(POINTS, means, strict=True)
        ]


def main(
    kernels: Kernels = None,
    out: Out = None,
) -> None:
    """Count experts, measure, and print a table."""
    means = touched(kernels)
    release()
    rows = measure(kernels, means)
    if out is not None:
        write_results(out, rows, "python -m bench.moe --kernels KERNELS --out FILE")
    print_rows(rows)


if __name__ == "__main__":
    typer.run(main)
