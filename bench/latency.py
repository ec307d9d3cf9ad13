"""Time for each further token, at a few batches and contexts.

    python -m bench.latency [MODEL ...] [--cache-dtype fp8] [--kernels FOLDER] [--out FILE]

Greedy: the time of prompts with many new tokens, less that of equal prompts with one, by the
tokens between. 512 new tokens at batch 1, 256 at others; nothing of a prompt is in the cache
before. Models are shapes of ``bench.shapes`` with random weights. Needs a GPU.
"""

import itertools
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.limits import Limits
from bench.offline import VOCABULARY, engine_of, release
from bench.options import Kernels, Out
from bench.results import write_results
from bench.shapes import PEERS
from fi_runtime.config import CacheDTypeName
from fi_runtime.engine.core import Engine
from fi_runtime.messages import SamplingParams

POINTS = ((1, 128), (8, 1024), (64, 1024))
"""batch and tokens of each prompt"""


def new_tokens(batch: int) -> int:
    return 512 if batch == 1 else 256


def seconds_of(
    engine: Engine, batch: int, context: int, tokens: int, adapters: Sequence[str] = ()
) -> float:
    """Of so many new tokens after each prompt, whose sequences take turns with the adapters."""
    rng = random.Random(batch)
    prompts = [[rng.randint(0, VOCABULARY) for _ in range(context)] for _ in range(batch)]
    params = [
        SamplingParams(max_tokens=tokens, temperature=0.0, seed=0, ignore_eos=True, lora_name=name)
        for name, _ in zip(itertools.cycle(adapters or [""]), prompts, strict=False)
    ]
    engine.tree.forget()
    begin = time.perf_counter()
    engine.generate(prompts, params)
    return time.perf_counter() - begin


def point(
    engine: Engine,
    limits: Limits,
    batch: int,
    context: int,
    touched: float | None = None,
    adapters: Sequence[str] = (),
) -> dict[str, Any]:
    """batch, context, tpot_ms, limit_ms: the latter in the middle of the answers.

    Args:
        touched: as ``Limits.decode_s`` takes it.
        adapters: that the sequences take turns with.
    """
    tokens = new_tokens(batch)
    for count in (1, tokens):
        seconds_of(engine, batch, context, count, adapters)  # to warm up
    first = min(seconds_of(engine, batch, context, 1, adapters) for _ in range(3))
    whole = seconds_of(engine, batch, context, tokens, adapters)
    limit_s = limits.decode_s([context + tokens // 2] * batch, touched)
    return {
        "batch": batch,
        "context": context,
        "tpot_ms": round((whole - first) / (tokens - 1) * 1e3, 3),
        "limit_ms": round(limit_s * 1e3, 3),
    }


def measure(model: str, kernels: Path | None, cache_dtype: CacheDTypeName) -> list[dict[str, Any]]:
    """A row for each point."""
    with tempfile.TemporaryDirectory() as name:
        engine, limits = engine_of(model, kernels, Path(name), cache_dtype=cache_dtype)
        row = {"model": model, "cache_dtype": cache_dtype}
        return [row | point(engine, limits, *each) for each in POINTS]


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A table of them."""
    table = Table("model", "batch x context", "ms a token", "limit", "share")
    for row in rows:
        share = row["limit_ms"] / row["tpot_ms"]
        where = f"{row['batch']} x {row['context']}"
        table.add_row(
            row["model"], where, f"{row['tpot_ms']:.2f}", f"{row['limit_ms']:.2f}", f"{share:.0%}"
        )
    Console().print(table)


def main(
    models: Annotated[list[str] | None, typer.Argument(help=f"Default: {PEERS}.")] = None,
    cache_dtype: Annotated[CacheDTypeName, typer.Option(help="The engine's knob.")] = "auto",
    kernels: Kernels = None,
    out: Out = None,
) -> None:
    """Measure each model and print a table."""
    rows: list[dict[str, Any]] = []
    for model in models or PEERS:
        rows += measure(model, kernels, cache_dtype)
        release()
        if out is not None:  # what there is, should a later model fail
            command = f"python -m bench.latency --cache-dtype {cache_dtype}"
            write_results(out, rows, f"{command} --kernels KERNELS --out FILE")
    print_rows(rows)


if __name__ == "__main__":
    typer.run(main)
