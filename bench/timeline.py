"""What the GPU does in 20 decode steps: how long it idles, and which kernels take how long.

    python -m bench.timeline [MODEL ...] [--batch 64 ...] [--kernels FOLDER] [--out FILE]

Each sequence has 1,024 tokens of context; recorded by torch's profiler once all decode. Beside it,
how long the host works for a step, without what it waits for the GPU.

With ``--out``, each trace lies beside the file as FILE-MODEL-BATCH.json.gz, for Perfetto to open.
Models are shapes of ``bench.shapes`` with random weights. Needs a GPU.
"""

import contextlib
import gzip
import itertools
import json
import random
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from bench.offline import VOCABULARY, engine_of, release
from bench.options import Kernels, Out
from bench.results import write_results
from bench.shapes import PEERS
from fi_runtime.engine.core import Engine
from fi_runtime.engine.runner import Launched
from fi_runtime.messages import SamplingParams

STEPS = 20
BATCHES = [1, 8, 64, 256]
CONTEXT = 1024
"""tokens of each prompt"""
HOST_STEPS = 100
WARM_UP = 8
"""decode steps before those that are recorded"""
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""categories of the trace's events that the GPU runs"""


@dataclass(frozen=True)
class Span:
    """One thing that the GPU did; in microseconds."""

    name: str
    begin: float
    end: float
    launch: int
    """the host's call that it is of; a graph's spans are of one"""


def spans_of(trace: dict[str, Any]) -> list[Span]:
    """What the GPU did, in the order of beginning, of a trace in Chrome's format."""
    spans = [
        Span(event["name"], event["ts"], event["ts"] + event["dur"], event["args"]["correlation"])
        for event in trace["traceEvents"]
        if event.get("cat") in ON_GPU
    ]
    return sorted(spans, key=lambda span: span.begin)


def gaps_of(spans: Iterable[Span]) -> list[float]:
    """Microseconds of each pause, in order; spans that overlap leave none."""
    gaps, busy_until = [], None
    for span in spans:
        if busy_until is not None and span.begin > busy_until:
            gaps.append(span.begin - busy_until)
        busy_until = max(span.end, busy_until or 0.0)
    return gaps


def replays_of(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """When each replay of a step's graph begins and ends, in order.

    A step may have smaller graphs besides, and kernels of their own; these are none.
    """
    launches: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        launches[span.launch].append(span)
    most = max(len(own) for own in launches.values())
    return sorted(
        (min(span.begin for span in own), max(span.end for span in own))
        for own in launches.values()
        if 2 * len(own) > most
    )


def totals_of(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Calls and microseconds of each kernel by name, most time first."""
    calls: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        calls[short(span.name)].append(span.end - span.begin)
    totals = [
        {"kernel": name, "calls": len(times), "us": round(sum(times), 1)}
        for name, times in calls.items()
    ]
    return sorted(totals, key=lambda row: -row["us"])


def short(name: str) -> str:
    """A kernel's name without its return type, parameters and template arguments."""
    name = re.sub(r"^void ", "", name)
    return re.split(r"[<(]", name.replace("(anonymous namespace)::", ""))[0][:60]


@contextlib.contextmanager
def decoding(engine: Engine, batch: int, params: SamplingParams) -> Iterator[None]:
    """So many sequences, all of which decode within this context."""
    rng = random.Random(batch)
    prompts = [[rng.randint(0, VOCABULARY) for _ in range(CONTEXT)] for _ in range(batch)]
    keys = [(b"", number) for number in range(batch)]
    for key, prompt in zip(keys, prompts, strict=True):
        engine.add(key, prompt, params)
    tokens = dict.fromkeys(keys, 0)
    while min(tokens.values()) < WARM_UP:
        for key, output in engine.step():
            tokens[key] += len(output.tokens)
    yield
    for key in keys:
        engine.abort(key)
    engine.step()
    engine.tree.forget()


def host_us(engine: Engine, batch: int, params: SamplingParams) -> float:
    """The median of what the host works for a step, without what it waits for the device.

    It finds its caches cold, as it does whenever it serves. No profiler may have run in this
    process: one that has stays attached to the driver, and delays its calls.
    """
    seconds = []
    with decoding(engine, batch, params), timed_waits() as waits:
        for _ in range(HOST_STEPS):
            waits.clear()
            begin = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - begin - sum(waits))
    return round(statistics.median(seconds) * 1e6, 1)


def record(engine: Engine, batch: int, params: SamplingParams, trace: Path) -> None:
    """Leave a trace of the steps in a file."""
    with decoding(engine, batch, params):
        for steps in (1, 1 + STEPS):  # to warm up, too
            with profile(activities=[ProfilerActivity.CUDA]) as recording:
                for _ in range(steps):
                    engine.step()
        recording.export_chrome_trace(str(trace))


@contextlib.contextmanager
def timed_waits() -> Iterator[list[float]]:
    """The seconds of each wait for a step, within this context."""
    waits: list[float] = []
    wait = Launched.wait

    def timed(launched: Launched) -> Any:
        begin = time.perf_counter()
        try:
            return wait(launched)
        finally:
            waits.append(time.perf_counter() - begin)

    with mock.patch.object(Launched, "wait", timed):
        yield waits


def point(engine: Engine, batch: int, params: SamplingParams, keep: Path | None) -> dict[str, Any]:
    """One batch's times of a step on the GPU, in microseconds, and what they are made of.

    Keys: batch, context, step_us, between_us (the longest time from one replay's end to
    the next one's begin), longest_gap_us and idle_us (of a step, with pauses between kernels),
    kernels of all the steps. From the end of the first replay on: the profiler itself delays what
    comes before.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record(engine, batch, params, path)
        text = path.read_bytes()
    if keep is not None:
        keep.write_bytes(gzip.compress(text))
    return {"batch": batch, "context": CONTEXT} | times_of(spans_of(json.loads(text)))


def times_of(spans: list[Span]) -> dict[str, Any]:
    """What ``point`` gives, but for what is known without a trace."""
    replays = replays_of(spans)
    begin, end = replays[0][1], replays[-1][1]
    recorded = [span for span in spans if begin <= span.begin < end]
    gaps = gaps_of([Span("", begin, begin, 0), *recorded])
    between = [after[0] - before[1] for before, after in itertools.pairwise(replays)]
    return {
        "step_us": round((end - begin) / len(between), 1),
        "between_us": round(max(between), 1),
        "longest_gap_us": round(max(gaps), 1),
        "idle_us": round(sum(gaps) / len(between), 1),
        "kernels": totals_of(recorded),
    }


def host_times(
    model: str, batches: list[int], params: SamplingParams, kernels: Path | None
) -> list[float]:
    """As ``host_us`` gives it, of each batch."""
    with tempfile.TemporaryDirectory() as name:
        engine, _ = engine_of(model, kernels, Path(name))
        return [host_us(engine, batch, params) for batch in batches]


def measure(
    model: str,
    batches: list[int],
    params: SamplingParams,
    kernels: Path | None,
    out: Path | None,
) -> list[dict[str, Any]]:
    """A row for each batch."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        engine, _ = engine_of(model, kernels, Path(name))
        for batch in batches:
            keep = out and out.with_name(f"{out.stem}-{model}-{batch}.json.gz")
            rows.append({"model": model, **point(engine, batch, params, keep)})
    return rows


def main(
    models: Annotated[list[str] | None, typer.Argument(help=f"Default: {PEERS}.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="May be given again.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.6,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps all tokens.")] = 1.0,
    kernels: Kernels = None,
    out: Out = None,
) -> None:
    """Record each model and print where its time goes."""
    console = Console(width=120)
    params = SamplingParams(
        max_tokens=1024,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=0,
        ignore_eos=True,
    )
    models, batches = models or list(PEERS), batch or BATCHES
    host: list[float] = []
    for model in models:  # of all, before any is recorded
        host += host_times(model, batches, params, kernels)
        release()
    rows: list[dict[str, Any]] = []
    for model in models:
        rows += measure(model, batches, params, kernels, out)
        release()
    for row, us in zip(rows, host, strict=True):
        row["host_us"] = us
        title = (
            "{model}, batch {batch}: step {step_us} us, host {host_us}, between two {between_us}, "
            "idle {idle_us}"
        )
        table = Table("kernel", "calls a step", "us a step", title=title.format(**row))
        for total in row["kernels"]:
            calls, us = total["calls"] / STEPS, total["us"] / STEPS
            table.add_row(total["kernel"], f"{calls:.1f}", f"{us:.1f}")
        console.print(table)
    if out is not None:
        drawing = f"--temperature {temperature} --top-k {top_k} --top-p {top_p}"
        write_results(out, rows, f"python -m bench.timeline {drawing} --kernels KERNELS --out FILE")


if __name__ == "__main__":
    typer.run(main)
