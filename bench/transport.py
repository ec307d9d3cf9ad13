"""How many responses and tokens a second get through front ends and tritonserver to clients.

    python -m bench.transport [FRONT_ENDS ...] [--out FILE]

The engine only echoes (``bench.echo_engine``), perf_analyzer streams from the door ``llm``.
Once with each token in a response of its own, and once with whatever piles up while a response is
being sent in the next one.
"""

import itertools
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.options import Out
from bench.results import write_results
from bench.shapes import made_up_tokenizer
from tools import perf
from tools.repository import STREAMED, copy_door
from tools.serve import TritonServer

STREAMS = 256
TOKENS = 400
"""of each answer"""
REQUESTS = 4 * STREAMS
VOCABULARY = 1000
MODEL = """\
from fi_runtime.frontend import engine_link

engine_link.ENGINE = "bench.echo_engine"
from fi_runtime.frontend.triton import TritonPythonModel
"""
GROUPS = {"1": "1", "any": "0"}
"""What the table calls it, and the door's max_group_tokens."""


def measure(front_ends: int, group: str) -> dict[str, Any]:
    """One row: front_ends, group, responses_per_s, tokens_per_s."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_up_tokenizer(VOCABULARY).save(str(folder / "tokenizer.json"))
        knobs = {
            "checkpoint": str(folder),
            "max_sequences": str(STREAMS),
            "step_tokens": str(STREAMS),
            "max_group_tokens": GROUPS[group],
        }
        door = copy_door(STREAMED, folder / "repository" / STREAMED, knobs, instances=front_ends)
        (door / "1" / "model.py").write_text(MODEL, encoding="utf-8")
        with TritonServer(folder / "repository", log=folder / "log") as server:
            server.wait_ready()
            return {"front_ends": front_ends, "group": group, **_drive(server, folder)}


def _drive(server: TritonServer, folder: Path) -> dict[str, float]:
    [(door, transport), *_] = perf.doors(server.http_address, server.grpc_url)
    options = [
        f"--concurrency-range={STREAMS}",
        # So many in all: at high rates a window may never end, since perf_analyzer's thread that
        # looks waits for a lock that those which count responses pass among themselves.
        f"--request-count={REQUESTS}",
    ]
    request = {"text_input": "echo", "max_tokens": TOKENS}
    figures = perf.figures(folder, door, transport, options, request)
    return {
        "responses_per_s": float(figures["Response Throughput"]),
        "tokens_per_s": float(figures["Inferences/Second"]) * TOKENS,
    }


def main(
    front_ends: Annotated[list[int] | None, typer.Argument(help="Numbers to measure.")] = None,
    out: Out = None,
) -> None:
    """Measure each number of front ends in both ways and print a table."""
    numbers = front_ends or [n for n in (1, 2, 4, 8) if n <= len(os.sched_getaffinity(0))]
    rows = []
    for number, group in itertools.product(numbers, GROUPS):
        rows.append(measure(number, group))
        if out is not None:
            write_results(out, rows, f"python -m bench.transport {' '.join(map(str, numbers))}")
    table = Table(title=f"{STREAMS} streams of {TOKENS} tokens, an engine that echoes")
    for column in ("front ends", "tokens a response", "responses/s", "tokens/s"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (f"{row[name]:,.0f}" for name in ("responses_per_s", "tokens_per_s"))
        table.add_row(str(row["front_ends"]), row["group"], *figures)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
