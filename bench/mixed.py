"""Streams beside long prompts: how even the streams stay, and how fast the prompts are computed.

    python -m bench.mixed [MODEL ...] [--chunk-tokens 512 ...] [--kernels FOLDER] [--out FILE]

The engine alone. 32 sequences decode; then prompts of 16,384 tokens arrive one after another. Times
between tokens are those between the steps that give them; a prompt takes from its arrival to its
first token. Each step of the last prompt is kept, too: what the policy of ``engine/scheduler.py``
is chosen by. Models are shapes of ``bench.shapes`` with random weights. Needs a GPU.
"""

import itertools
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
from fi_runtime.config import EngineConfig
from fi_runtime.engine.core import Engine
from fi_runtime.messages import SamplingParams

MODELS = ["Llama-3.1-8B"]
STREAMS = 32
STREAM_CONTEXT = 128
"""tokens of each stream's prompt"""
PROMPT = 16_384
PROMPTS = 4
IDLE_STEPS = 200


def measure_engine(engine: Engine, prompt_tokens: int = PROMPT) -> dict[str, Any]:
    """Times between tokens, and prompt tokens a second, alone and mixed.

    Keys: streams, prompt_tokens, itl_idle_ms_p50 and _p99, itl_mixed_ms_p50 and _p99,
    prefill_alone_tokens_per_s, prefill_mixed_tokens_per_s, and steps: of the last prompt its tokens
    in each, those that it has then, and milliseconds.
    """
    rng = random.Random(0)

    def prompt(tokens: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(tokens)]

    def compute_prompts() -> tuple[float, list[float], list[int]]:
        """Seconds that the prompts take one after another, and those of each step.

        And how many tokens of the last prompt are computed, or being so, after each of its own.
        """
        steps, cached, begin = [], list[int](), time.perf_counter()
        for number in range(PROMPTS):
            engine.add((b"prompt", number), prompt(prompt_tokens), _tokens(1))
            sequence = engine.scheduler.waiting[-1]
            cached, done = [], False
            while not done:
                step = time.perf_counter()
                done = any(key[0] == b"prompt" for key, _ in engine.step())
                steps.append(time.perf_counter() - step)
                cached.append(prompt_tokens if done else sequence.num_cached)
        return time.perf_counter() - begin, steps, cached

    compute_prompts()  # to warm up
    alone_s, *_ = compute_prompts()
    longest = engine.max_context - STREAM_CONTEXT
    for number in range(STREAMS):
        engine.add((b"stream", number), prompt(STREAM_CONTEXT), _tokens(longest))
    for _ in range(STREAMS):
        engine.step()
    idle = []
    for _ in range(IDLE_STEPS):
        begin = time.perf_counter()
        engine.step()
        idle.append(time.perf_counter() - begin)
    mixed_s, mixed, cached = compute_prompts()
    for number in range(STREAMS):
        engine.abort((b"stream", number))
    while engine.busy:
        engine.step()
    tokens = PROMPTS * prompt_tokens
    return {
        "streams": STREAMS,
        "prompt_tokens": prompt_tokens,
        **_percentiles("itl_idle_ms", idle),
        **_percentiles("itl_mixed_ms", mixed),
        "prefill_alone_tokens_per_s": round(tokens / alone_s, 1),
        "prefill_mixed_tokens_per_s": round(tokens / mixed_s, 1),
        "steps": _steps(mixed[-len(cached) :], cached, engine.runs_ahead),
    }


def _steps(seconds: list[float], cached: list[int], ahead: bool) -> list[tuple[int, int, float]]:
    """A prompt's tokens in each step, all that it has then, and the step's milliseconds.

    Args:
        ahead: each step is computed while the next one is launched and waited for.
    """
    if ahead:
        seconds, cached = seconds[1:], cached[:-1]
    counts = np.diff([0, *cached]).tolist()
    return [
        (count, total, round(each * 1e3, 2))
        for count, total, each in zip(counts, cached, seconds, strict=True)
        if count
    ]


def _tokens(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, seed=0, ignore_eos=True)


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    return {f"{name}_p{p}": round(float(np.percentile(seconds, p)) * 1e3, 3) for p in (50, 99)}


def measure(model: str, chunk_tokens: int, kernels: Path | None) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as name:
        engine, _ = engine_of(model, kernels, Path(name), chunk_tokens=chunk_tokens)
        return {"model": model, "chunk_tokens": chunk_tokens, **measure_engine(engine)}


def main(
    models: Annotated[list[str] | None, typer.Argument(help=f"Default: {MODELS}.")] = None,
    chunk_tokens: Annotated[list[int] | None, typer.Option(help="May be given again.")] = None,
    kernels: Kernels = None,
    out: Out = None,
) -> None:
    """Measure each model and print a table."""
    rows = []
    default = EngineConfig(checkpoint="", device="cuda").chunk_tokens
    for model, chunk in itertools.product(models or MODELS, chunk_tokens or [default]):
        rows.append(measure(model, chunk, kernels))
        release()
    table = Table(
        "model", "chunk", "between tokens, idle p99", "mixed p99", "prompts alone", "mixed"
    )
    for row in rows:
        table.add_row(
            row["model"],
            str(row["chunk_tokens"]),
            *(f"{row[f'itl_{kind}_ms_p99']:.1f} ms" for kind in ("idle", "mixed")),
            *(f"{row[f'prefill_{kind}_tokens_per_s']:,.0f}/s" for kind in ("alone", "mixed")),
        )
    Console(width=100).print(table)
    if out is not None:
        write_results(out, rows, "python -m bench.mixed --kernels KERNELS --out FILE")


if __name__ == "__main__":
    typer.run(main)
