"""The engine offline against the same engine served, both in one run.

    python -m bench.serving [MODEL ...] [--concurrency 16 ...] [--tokens 64] [--rounds 8]

Offline: the engine in a process of its own generates so many prompts at a time, ``rounds`` times.
Served: a real tritonserver with the same engine and knobs; as many clients each stream ``rounds``
answers over gRPC, one after another. Both generate exactly ``tokens`` tokens an answer, greedily,
from the same prompts. The first round of each is left out as a warm-up. On a machine with a GPU
the engine runs there; models are those of ``bench.cold_start``.

A step's time is the mean time between tokens of an answer, as the engine's caller sees them:
offline this process, served the front ends, which say it in their metrics.
"""

import asyncio
import gc
import itertools
import json
import multiprocessing
import os
import re
import tempfile
import threading
import time
import urllib.request
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tritonclient.grpc.aio as triton
import typer
from rich.console import Console
from rich.table import Table

from bench.cold_start import MODELS, model_repository
from bench.results import write_results
from fi_runtime.config import Device, EngineConfig
from fi_runtime.engine.core import Engine
from fi_runtime.frontend.repository import read_engine_config
from fi_runtime.messages import SamplingParams
from tools.serve import TritonServer

PROMPT_TOKENS = 32
START_S = 120.0
"""after which a process that does not begin is given up"""
METRICS_S = 2.5
"""after which Triton has what the front ends told it"""


@dataclass(frozen=True)
class Load:
    streams: int
    tokens: int
    rounds: int

    def prompt(self, stream: int) -> list[int]:
        """Token ids that every vocabulary has, other ones for each stream."""
        return [(stream * 37 + i * 11) % 200 + 20 for i in range(PROMPT_TOKENS)]


@dataclass(frozen=True)
class Response:
    sent: float
    """when its request was"""
    come: float
    tokens: int


def offline(config: EngineConfig, loads: list[Load]) -> list[dict[str, float]]:
    """The engine alone under each load; times are in milliseconds."""
    engine = Engine(config)
    gc.collect()
    gc.freeze()  # as the engine's process does
    return [_offline(engine, load) for load in loads]


def _offline(engine: Engine, load: Load) -> dict[str, float]:
    _offline_round(engine, load)
    begin = time.perf_counter()
    firsts, steps = [], []
    for _ in range(load.rounds):
        sent = time.perf_counter()
        for times in _offline_round(engine, load):
            firsts.append(times[0] - sent)
            steps.append((times[-1] - times[0]) / max(1, load.tokens - 1))
    seconds = time.perf_counter() - begin
    return {
        "offline_tokens_per_s": load.streams * load.tokens * load.rounds / seconds,
        "offline_ttft_ms_p50": float(np.percentile(firsts, 50)) * 1e3,
        "offline_step_ms": float(np.mean(steps)) * 1e3,
    }


def _offline_round(engine: Engine, load: Load) -> list[list[float]]:
    """One answer to each prompt; when each of its tokens came."""
    params = SamplingParams(max_tokens=load.tokens, temperature=0.0, seed=0, ignore_eos=True)
    times: list[list[float]] = [[] for _ in range(load.streams)]
    for stream in range(load.streams):
        engine.add((b"", stream), load.prompt(stream), params)
    while engine.busy:
        outputs = engine.step()
        now = time.perf_counter()
        for (_, stream), output in outputs:
            times[stream] += [now] * len(output.tokens)
    assert all(len(one) == load.tokens for one in times)
    return times


def _inputs(prompt: list[int], tokens: int) -> list[Any]:
    values: list[tuple[str, str, Any]] = [
        ("input_ids", "INT32", np.array([prompt], dtype=np.int32)),
        ("stream", "BOOL", np.array([[True]])),
        (
            "sampling_parameters",
            "BYTES",
            np.array(
                [[json.dumps({"max_tokens": tokens, "temperature": 0, "ignore_eos": True})]],
                dtype=np.object_,
            ),
        ),
        ("return_num_output_tokens", "BOOL", np.array([[True]])),
    ]
    inputs = []
    for name, datatype, value in values:
        tensor = triton.InferInput(name, list(value.shape), datatype)
        tensor.set_data_from_numpy(value)
        inputs.append(tensor)
    return inputs


processes: threading.Barrier | None = None
"""of this process and those beside it, that drive a server together"""


def _join(barrier: threading.Barrier) -> None:
    global processes
    processes = barrier


class _Start:
    """Lets the streams of all processes begin together, once each has had its warm-up.

    Args:
        streams: of this process.
    """

    def __init__(self, streams: int) -> None:
        self._warm = asyncio.Barrier(streams + 1)
        self._begin = asyncio.Event()

    async def wait(self) -> None:
        await self._warm.wait()
        await self._begin.wait()

    async def give(self) -> None:
        """When the streams of every process are waiting."""
        await self._warm.wait()
        if processes is not None:
            await asyncio.to_thread(processes.wait, START_S)
        self._begin.set()


async def _stream(url: str, load: Load, number: int, start: _Start) -> list[Response]:
    """One client: streams its answers one after another, the warm-up's left out."""
    inputs = _inputs(load.prompt(number), load.tokens)
    sent: list[float] = []
    answered = asyncio.Event()
    responses = []

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for count in range(load.rounds + 1):
            if count == 1:
                await start.wait()
            answered.clear()
            sent.append(time.perf_counter())
            yield {"model_name": "llm", "inputs": inputs}
            await answered.wait()

    async with triton.InferenceServerClient(url) as client:
        async for result, error in client.stream_infer(requests()):
            if error is not None:
                raise error
            tokens = int(result.as_numpy("num_output_tokens")[0, 0])
            responses.append(Response(sent[-1], time.perf_counter(), tokens))
            if result.get_response().parameters["triton_final_response"].bool_param:
                answered.set()
    return [response for response in responses if response.sent != sent[0]]


def _clients(url: str, load: Load, numbers: list[int]) -> list[list[Response]]:
    """Some of the streams, in a process of their own; the responses of each."""

    async def together() -> list[list[Response]]:
        start = _Start(len(numbers))
        streams = (_stream(url, load, number, start) for number in numbers)
        answers, _ = await asyncio.gather(asyncio.gather(*streams), start.give())
        return answers

    return asyncio.run(together())


def serve(server: TritonServer, load: Load) -> dict[str, float]:
    """Drive a server with all streams at once; times are in milliseconds."""
    url, before = server.grpc_url, _between_tokens(server)
    # One process of Python reads a few thousand responses a second.
    count = min(load.streams, max(1, len(os.sched_getaffinity(0)) // 2))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _join, (context.Barrier(count),)) as pool:
        numbers = [list(range(first, load.streams, count)) for first in range(count)]
        parts = list(pool.map(_clients, [url] * count, [load] * count, numbers))
    streams = list(itertools.chain.from_iterable(parts))
    everything = list(itertools.chain.from_iterable(streams))
    answers = [list(a) for s in streams for _, a in itertools.groupby(s, lambda r: r.sent)]
    tokens = sum(response.tokens for response in everything)
    assert tokens == load.streams * load.rounds * load.tokens, "tokens were lost"
    begin, end = min(r.sent for r in everything), max(r.come for r in everything)
    first = np.array([answer[0].come - answer[0].sent for answer in answers]) * 1e3
    gaps = [b.come - a.come for answer in answers for a, b in itertools.pairwise(answer)]
    between = np.array(gaps or [0.0]) * 1e3
    time.sleep(METRICS_S)
    seconds, count = np.array(_between_tokens(server)) - before
    return {
        "served_tokens_per_s": tokens / (end - begin),
        "ttft_ms_p50": float(np.percentile(first, 50)),
        "ttft_ms_p99": float(np.percentile(first, 99)),
        "itl_ms_p50": float(np.percentile(between, 50)),
        "itl_ms_p99": float(np.percentile(between, 99)),
        # Of all rounds, the warm-up among them.
        "served_step_ms": float(seconds / count) * 1e3,
        "responses": len(everything) / len(answers),
    }


def _between_tokens(server: TritonServer) -> tuple[float, float]:
    """Sum and count of the answers' mean times between tokens so far, in seconds."""
    with urllib.request.urlopen(server.metrics_url) as reply:
        text = reply.read().decode()
    name = "vllm:time_per_output_token_seconds"
    total, count = (
        sum(float(value) for value in re.findall(rf"^{name}_{part}{{.*}} (\S+)$", text, re.M))
        for part in ("sum", "count")
    )
    return total, count


def measure(
    model: str, kernels: Path | None, front_ends: int, loads: list[Load]
) -> list[dict[str, Any]]:
    """A row for each load."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repository = model_repository(model, folder, kernels, front_ends)
        device: Device = "cuda" if torch.cuda.is_available() else "cpu"
        config = read_engine_config(repository / "llm", device)
        # A process of its own, so that its memory and threads are gone when the server is measured.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            alone = pool.submit(offline, config, loads).result()
        with TritonServer(repository, log=folder / "log") as server:
            server.wait_ready(timeout=600)
            served = [serve(server, load) for load in loads]
    return [
        {
            "model": model,
            "concurrency": load.streams,
            **{name: round(value, 3) for name, value in (own | row).items()},
        }
        for load, own, row in zip(loads, alone, served, strict=True)
    ]


def main(
    models: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(MODELS)}.")] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Streams at a time; may be given again.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(help="Answers one after another in each stream.")] = 8,
    front_ends: Annotated[int, typer.Option(help="Processes that answer clients.")] = 2,
    kernels: Annotated[Path | None, typer.Option(help="Folder that prebuild filled.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
) -> None:
    """Measure the engine offline and served, and print both."""
    concurrency = concurrency or [16]
    loads = [Load(streams, tokens, rounds) for streams in concurrency]
    counts = "".join(f" --concurrency {streams}" for streams in concurrency)
    options = f"--tokens {tokens} --rounds {rounds} --front-ends {front_ends}"
    command = f"python -m bench.serving {' '.join(models or [])}{counts} {options}"
    rows: list[dict[str, Any]] = []
    for model in models or ["demo"]:
        rows += measure(model, kernels, front_ends, loads)
        if out is not None:  # what there is, should a later model fail
            write_results(out, rows, command)
    table = Table(title=f"Answers of {tokens} tokens, {rounds} rounds")
    columns = ["streams", "offline tokens/s", "served tokens/s", "served / offline"]
    columns += ["offline step, ms", "served step, ms", "offline first token, ms"]
    columns += ["first token ms, p50", "p99", "between responses ms, p50", "p99"]
    table.add_column("model")
    for column in [*columns, "responses an answer"]:
        table.add_column(column, justify="right")
    for row in rows:
        alone, served = row["offline_tokens_per_s"], row["served_tokens_per_s"]
        names = ["offline_step_ms", "served_step_ms", "offline_ttft_ms_p50"]
        names += ["ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99"]
        table.add_row(
            row["model"],
            str(row["concurrency"]),
            f"{alone:,.0f}",
            f"{served:,.0f}",
            f"{served / alone:.2f}",
            *(f"{row[name]:.1f}" for name in names),
            f"{row['responses']:.0f}",
        )
    Console(width=180).print(table)


if __name__ == "__main__":
    typer.run(main)
