"""The engine offline against the same engine served, both in one run.

    python -m bench.serving [--streams 16] [--tokens 64] [--rounds 8]

Offline: the engine in a process of its own generates ``streams`` prompts at a time, ``rounds``
times. Served: a real tritonserver with the same engine and knobs; ``streams`` clients each stream
``rounds`` answers over gRPC, one after another. Both generate exactly ``tokens`` tokens an answer,
greedily, from the same prompts. The first round of each is left out as a warm-up.
"""

import asyncio
import gc
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tritonclient.grpc.aio as triton
import typer
from rich.console import Console
from rich.table import Table

from fi_runtime.config import EngineConfig
from fi_runtime.engine.core import Engine
from fi_runtime.frontend.repository import read_engine_config
from fi_runtime.messages import SamplingParams
from tools.serve import ROOT, TritonServer

PROMPT_TOKENS = 32


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


@dataclass(frozen=True)
class Served:
    tokens_per_s: float
    first_token_ms: float
    """median"""
    gap_ms: float
    """median time between responses of one stream"""
    responses: int
    """for each answer, on average"""


def offline_tokens_per_s(config: EngineConfig, load: Load) -> float:
    """Output tokens a second of the engine alone."""
    engine = Engine(config)
    gc.collect()
    gc.freeze()  # as the engine's process does
    params = SamplingParams(max_tokens=load.tokens, temperature=0.0, seed=0, ignore_eos=True)
    prompts = [load.prompt(stream) for stream in range(load.streams)]
    engine.generate(prompts, params)
    begin = time.perf_counter()
    for _ in range(load.rounds):
        results = engine.generate(prompts, params)
        assert all(len(result.tokens) == load.tokens for result in results)
    return load.streams * load.tokens * load.rounds / (time.perf_counter() - begin)


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


async def _stream(url: str, load: Load, number: int) -> list[Response]:
    """One client: streams its answers one after another, the warm-up's left out."""
    inputs = _inputs(load.prompt(number), load.tokens)
    sent: list[float] = []
    answered = asyncio.Event()
    responses = []

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for _ in range(load.rounds + 1):
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


async def serve(url: str, load: Load) -> Served:
    """Drive a server with all streams at once."""
    streams = await asyncio.gather(*(_stream(url, load, i) for i in range(load.streams)))
    everything = list(itertools.chain.from_iterable(streams))
    answers = [list(a) for s in streams for _, a in itertools.groupby(s, lambda r: r.sent)]
    tokens = sum(response.tokens for response in everything)
    assert tokens == load.streams * load.rounds * load.tokens, "tokens were lost"
    begin, end = min(r.sent for r in everything), max(r.come for r in everything)
    gaps = [b.come - a.come for answer in answers for a, b in itertools.pairwise(answer)]
    return Served(
        tokens_per_s=tokens / (end - begin),
        first_token_ms=statistics.median(a[0].come - a[0].sent for a in answers) * 1e3,
        gap_ms=statistics.median(gaps) * 1e3 if gaps else 0.0,
        responses=round(len(everything) / len(answers)),
    )


def main(
    streams: Annotated[int, typer.Option(help="Answers generated at the same time.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(help="Answers one after another in each stream.")] = 8,
    repository: Annotated[Path, typer.Option(help="Model repository.")] = ROOT / "model_repository",
) -> None:
    """Measure the engine offline and served, and print both."""
    load = Load(streams, tokens, rounds)
    config = read_engine_config(repository / "llm")
    # A process of its own, so that its threads are gone when the server is measured.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        offline = pool.submit(offline_tokens_per_s, config, load).result()
    with (
        tempfile.NamedTemporaryFile() as log,
        TritonServer(repository, log=Path(log.name)) as server,
    ):
        server.wait_ready()
        served = asyncio.run(serve(server.grpc_url, load))
    table = Table(title=f"{streams} streams of {tokens} tokens, {rounds} rounds")
    columns = ["offline tokens/s", "served tokens/s", "served / offline"]
    for column in [*columns, "first token ms", "between responses ms", "responses an answer"]:
        table.add_column(column, justify="right")
    table.add_row(
        f"{offline:.0f}",
        f"{served.tokens_per_s:.0f}",
        f"{served.tokens_per_s / offline:.2f}",
        f"{served.first_token_ms:.1f}",
        f"{served.gap_ms:.1f}",
        f"{served.responses}",
    )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
