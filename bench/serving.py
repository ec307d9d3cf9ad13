"""The engine offline against the same engine served, both in one run.

    python -m bench.serving [MODEL ...] [--concurrency 16 ...] [--tokens 64] [--rounds 8]

Offline: the engine in a process of its own generates so many prompts at a time, ``rounds`` times.
Served: a real tritonserver with the same engine and knobs; as many clients each stream ``rounds``
answers over gRPC, one after another. Both generate exactly ``tokens`` tokens an answer, greedily,
from the same prompts. The first round of each is left out as a warm-up. On a machine with a GPU
the engine runs there; models are those of ``bench.cold_start``.

Tokens a second served are those that came while all streams ran: from the first request until a
stream has had its last answer. ``served_to_the_end_tokens_per_s`` goes on until the last one has,
with ever fewer streams.

A step's time is the mean time between tokens of an answer, as the engine's caller sees them:
offline this process, served the front ends, which say it in their metrics. So do they of the time
to the first token, from a request's arrival there.
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import numpy.typing as npt
import torch
import tritonclient.grpc as triton
import typer
from rich.console import Console
from rich.table import Table
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelStreamInferResponse

from bench.cold_start import MODELS, model_repository
from bench.options import Kernels, Out
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
STEP, FIRST = "vllm:time_per_output_token_seconds", "vllm:time_to_first_token_seconds"
METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"


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


def _request(prompt: list[int], tokens: int) -> ModelInferRequest:
    knobs = json.dumps({"max_tokens": tokens, "temperature": 0, "ignore_eos": True})
    values: list[tuple[str, str, Any]] = [
        ("input_ids", "INT32", np.array([prompt], dtype=np.int32)),
        ("stream", "BOOL", np.array([[True]])),
        ("sampling_parameters", "BYTES", np.array([[knobs]], dtype=np.object_)),
        ("return_num_output_tokens", "BOOL", np.array([[True]])),
    ]
    request = ModelInferRequest(model_name="llm")
    for name, datatype, value in values:
        tensor = triton.InferInput(name, list(value.shape), datatype)
        tensor.set_data_from_numpy(value)
        request.inputs.append(tensor._get_tensor())
        request.raw_input_contents.append(tensor._get_content())
    return request


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
    """One client: streams its answers one after another, the warm-up's left out.

    It takes the messages as they are: tritonclient's objects of each would take these processes
    twice as long, on the cores that they share with the server.
    """
    request = _request(load.prompt(number), load.tokens)
    come: list[tuple[float, float, ModelStreamInferResponse]] = []
    async with grpc.aio.insecure_channel(url) as channel:
        call = channel.stream_stream(
            METHOD,
            request_serializer=ModelInferRequest.SerializeToString,
            response_deserializer=ModelStreamInferResponse.FromString,
        )()
        for count in range(load.rounds + 1):
            if count == 1:
                come.clear()
                await start.wait()
            sent = time.perf_counter()
            await call.write(request)
            over = False
            while not over:
                message = await call.read()
                come.append((sent, time.perf_counter(), message))
                if message.error_message:
                    raise RuntimeError(message.error_message)
                over = message.infer_response.parameters["triton_final_response"].bool_param
        await call.done_writing()
    return [
        Response(sent, when, _new_tokens(message.infer_response)) for sent, when, message in come
    ]


def _new_tokens(response: Any) -> int:
    [index] = [i for i, one in enumerate(response.outputs) if one.name == "num_output_tokens"]
    return int.from_bytes(response.raw_output_contents[index], "little")


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
    url, before = server.grpc_url, _sums(server)
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
    all_ran = min(stream[-1].come for stream in streams)
    come = sum(response.tokens for response in everything if response.come <= all_ran)
    first = np.array([answer[0].come - answer[0].sent for answer in answers]) * 1e3
    gaps = [b.come - a.come for answer in answers for a, b in itertools.pairwise(answer)]
    between = np.array(gaps or [0.0]) * 1e3
    time.sleep(METRICS_S)
    after = _sums(server)
    told = {name: after[name] - before[name] for name in after}
    return {
        "served_tokens_per_s": come / (all_ran - begin),
        "served_to_the_end_tokens_per_s": tokens / (end - begin),
        "ttft_ms_p50": float(np.percentile(first, 50)),
        "ttft_ms_p99": float(np.percentile(first, 99)),
        "itl_ms_p50": float(np.percentile(between, 50)),
        "itl_ms_p99": float(np.percentile(between, 99)),
        # Of all rounds, the warm-up among them.
        "served_step_ms": _mean_ms(told[STEP]),
        "front_ends_ttft_ms": _mean_ms(told[FIRST]),
        "responses": len(everything) / len(answers),
    }


def _sums(server: TritonServer) -> dict[str, npt.NDArray[np.float64]]:
    """Sums in seconds and counts so far: of answers' mean times between tokens, of first tokens."""
    with urllib.request.urlopen(server.metrics_url) as reply:
        text = reply.read().decode()
    return {
        name: np.array(
            [
                sum(map(float, re.findall(rf"^{name}_{part}{{.*}} (\S+)$", text, re.M)))
                for part in ("sum", "count")
            ]
        )
        for name in (STEP, FIRST)
    }


def _mean_ms(told: npt.NDArray[np.float64]) -> float:
    seconds, count = told
    return float(seconds / count) * 1e3


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
            "rounds": load.rounds,
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
    kernels: Kernels = None,
    out: Out = None,
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
