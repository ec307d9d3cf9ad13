"""The engine alone on many prompts at once, the way mini-sglang's offline benchmark does it.

    python -m bench.offline [MODEL ...] [--cache-dtype fp8] [--kernels FOLDER] [--out FILE]

256 prompts of 100 to 1024 random tokens, 100 to 1024 new tokens each (133,966 in all), seed 0,
temperature 0.6, end tokens ignored; the second of two runs, with nothing left in the cache of the
first. Models are shapes of ``bench.shapes`` with random weights, by default the dense ones. Needs a
GPU.
"""

import functools
import gc
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.cold_start import model_repository
from bench.limits import Limits, limits_of
from bench.options import Kernels, Out
from bench.results import write_results
from bench.shapes import DENSE, SHAPES
from fi_runtime.attention.timing import memory_bandwidth
from fi_runtime.config import CacheDTypeName
from fi_runtime.engine.build import cache_dtype as dtype_of_cache
from fi_runtime.engine.core import Engine
from fi_runtime.frontend.repository import read_engine_config
from fi_runtime.messages import SamplingParams

SEQUENCES = 256
LEAST, MOST = 100, 1024
"""tokens of a prompt, and of an answer"""
VOCABULARY = 10_000
"""the tokens that prompts are drawn from"""


def work() -> tuple[list[list[int]], list[int]]:
    """The prompts, and how many tokens to generate after each."""
    rng = random.Random(0)
    prompts = [
        [rng.randint(0, VOCABULARY) for _ in range(rng.randint(LEAST, MOST))]
        for _ in range(SEQUENCES)
    ]
    return prompts, [rng.randint(LEAST, MOST) for _ in range(SEQUENCES)]


def seconds_of(engine: Engine) -> float:
    """Of the second of two runs."""
    prompts, outputs = work()
    params = [
        SamplingParams(max_tokens=count, temperature=0.6, seed=number, ignore_eos=True)
        for number, count in enumerate(outputs)
    ]
    seconds = 0.0
    for _ in range(2):
        engine.tree.forget()
        begin = time.perf_counter()
        results = engine.generate(prompts, params)
        seconds = time.perf_counter() - begin
        assert [len(result.tokens) for result in results] == outputs
    return seconds


@functools.cache
def bytes_per_s() -> float:
    """That a copy within the GPU's memory moves, reading and writing counted.

    Raises:
        typer.BadParameter: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise typer.BadParameter("no GPU is visible to torch; run this on a machine with one")
    return memory_bandwidth(torch.device("cuda")) * 1e9


def engine_of(
    model: str, kernels: Path | None, folder: Path, **knobs: object
) -> tuple[Engine, Limits]:
    """A model's engine on the GPU, as its process sets it up, and the model's limits there.

    Args:
        model: of ``bench.shapes``.
        kernels: folder that prebuild filled.
        folder: where to write what the engine reads.
        knobs: of the engine, other than the defaults.

    Raises:
        typer.BadParameter: there is no GPU.
    """
    moved = bytes_per_s()
    repository = model_repository(model, folder, kernels)
    config = msgspec.structs.replace(read_engine_config(repository / "llm", "cuda"), **knobs)
    engine = Engine(config)
    gc.collect()
    gc.freeze()
    return engine, limits_of(Path(config.checkpoint), moved, dtype_of_cache(config))


def release() -> None:
    """Give back the GPU's memory of an engine that nothing holds any more."""
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()


def measure(model: str, kernels: Path | None, cache_dtype: CacheDTypeName) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as name:
        engine, limits = engine_of(model, kernels, Path(name), cache_dtype=cache_dtype)
        seconds = seconds_of(engine)
    prompts, outputs = work()
    tokens = sum(outputs)
    limit_s = limits.offline_s([len(prompt) for prompt in prompts], outputs)
    return {
        "model": model,
        "cache_dtype": cache_dtype,
        "cache_pages": engine.tree.usable,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "limit_tokens_per_s": round(tokens / limit_s, 1),
    }


def main(
    models: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SHAPES)}.")] = None,
    cache_dtype: Annotated[CacheDTypeName, typer.Option(help="The engine's knob.")] = "auto",
    kernels: Kernels = None,
    out: Out = None,
) -> None:
    """Measure each model and print a table."""
    rows = []
    for model in models or DENSE:
        rows.append(measure(model, kernels, cache_dtype))
        release()
        if out is not None:  # what there is, should a later model fail
            command = f"python -m bench.offline --cache-dtype {cache_dtype}"
            write_results(out, rows, f"{command} --kernels KERNELS --out FILE")
    table = Table("model", "pages held", "tokens/s", "limit", "share")
    for row in rows:
        speed, limit = row["tokens_per_s"], row["limit_tokens_per_s"]
        numbers = (f"{row['cache_pages']:,}", f"{speed:,.0f}", f"{limit:,.0f}")
        table.add_row(row["model"], *numbers, f"{speed / limit:.0%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
