"""Time to the first token of many requests at once, whose prompts begin alike or not.

    python -m bench.prefix [MODEL ...] [--kernels FOLDER] [--out FILE]

The engine alone. 64 prompts of 2,000 tokens and 32 more of their own; once the 2,000 are different
in each, and once the same, and in the cache from a request before. Models are shapes of
``bench.shapes`` with random weights. Needs a GPU.
"""

import random
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.offline import VOCABULARY, engine_of, release
from bench.options import Kernels, Out
from bench.results import write_results
from bench.shapes import PEERS
from fi_runtime.engine.core import Engine
from fi_runtime.messages import SamplingParams

REQUESTS = 64
SHARED, OWN = 2000, 32
"""tokens of a prompt"""
TOKENS = 8
"""of each answer"""


def measure_engine(engine: Engine, shared: int = SHARED) -> dict[str, Any]:
    """requests, shared_tokens, ttft_uncached_ms_p50, ttft_cached_ms_p50."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    engine.generate([tokens(shared + OWN) for _ in range(REQUESTS)], _params())  # to warm up
    engine.tree.forget()
    uncached = _first_tokens(engine, [tokens(shared + OWN) for _ in range(REQUESTS)])
    engine.tree.forget()
    beginning = tokens(shared)
    engine.generate([beginning + tokens(OWN)], _params())
    cached = _first_tokens(engine, [beginning + tokens(OWN) for _ in range(REQUESTS)])
    return {
        "requests": REQUESTS,
        "shared_tokens": shared,
        "ttft_uncached_ms_p50": round(float(np.median(uncached)) * 1e3, 3),
        "ttft_cached_ms_p50": round(float(np.median(cached)) * 1e3, 3),
    }


def _params() -> SamplingParams:
    return SamplingParams(max_tokens=TOKENS, temperature=0.0, seed=0, ignore_eos=True)


def _first_tokens(engine: Engine, prompts: list[list[int]]) -> list[float]:
    """Seconds until each prompt's first token, of all at once."""
    begin = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add((b"", number), prompt, _params())
    first: dict[tuple[bytes, int], float] = {}
    while engine.busy:
        outputs = engine.step()
        now = time.perf_counter() - begin
        for key, _ in outputs:
            first.setdefault(key, now)
    return list(first.values())


def measure(model: str, kernels: Path | None) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as name:
        engine, _ = engine_of(model, kernels, Path(name))
        return {"model": model, **measure_engine(engine)}


def main(
    models: Annotated[list[str] | None, typer.Argument(help=f"Default: {PEERS}.")] = None,
    kernels: Kernels = None,
    out: Out = None,
) -> None:
    """Measure each model and print a table."""
    rows = []
    for model in models or PEERS:
        rows.append(measure(model, kernels))
        release()
    table = Table("model", "first token, nothing cached", "prefix cached", "share")
    for row in rows:
        uncached, cached = row["ttft_uncached_ms_p50"], row["ttft_cached_ms_p50"]
        share = f"{cached / uncached:.0%}"
        table.add_row(row["model"], f"{uncached:.1f} ms", f"{cached:.1f} ms", share)
    Console(width=100).print(table)
    if out is not None:
        write_results(out, rows, "python -m bench.prefix --kernels KERNELS --out FILE")


if __name__ == "__main__":
    typer.run(main)
