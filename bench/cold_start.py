"""From launching tritonserver to both doors ready, and where the time goes.

    python -m bench.cold_start [--kernels FOLDER] [--out FILE]

The default checkpoint (demo), and the shapes of published models with random weights that are made
on the device. Runs on a GPU: kernels come from ``--kernels``, and decode graphs are captured.
"""

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.options import Kernels, Out
from bench.results import write_results
from bench.shapes import PEERS, write_shape
from tools.repository import SHIPPED, STREAMED, write_repository
from tools.serve import TritonServer

MODELS = ["demo", *PEERS]
STARTED = re.compile(r"started in [\d.]+ s: (.+)$", re.MULTILINE)
"""What the engine logs once it is ready, with the seconds of each phase."""


@contextmanager
def started(model: str, kernels: Path | None) -> Iterator[tuple[TritonServer, dict[str, Any]]]:
    """A server of one model that is ready, and the row of its start."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = TritonServer(model_repository(model, folder, kernels), log=folder / "log")
        begin = time.perf_counter()
        with server:
            server.wait_ready(timeout=600)
            ready_s = time.perf_counter() - begin
            phases = _phases((folder / "log").read_text(encoding="utf-8"))
            yield server, {"model": model, "ready_s": round(ready_s, 1), "phases": phases}


def print_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """A table of starts."""
    table = Table("model", "ready, s", "of it, in the engine")
    for row in rows:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["phases"].items())
        table.add_row(row["model"], f"{row['ready_s']:.1f}", phases)
    console.print(table)


def model_repository(model: str, folder: Path, kernels: Path | None, front_ends: int = 2) -> Path:
    """Both doors on a shape with random weights, or on the default checkpoint."""
    knobs: dict[str, object] = {"kernels": kernels.resolve()} if kernels else {}
    if model == "demo":
        checkpoint = SHIPPED / STREAMED / "demo_checkpoint"
    else:
        checkpoint = write_shape(model, folder / "checkpoint")
        knobs["load_format"] = "dummy"
    return write_repository(folder / "repository", checkpoint, knobs, instances=front_ends)


def _phases(log: str) -> dict[str, float]:
    """Seconds of each phase of the engine's start, from its log."""
    found = STARTED.search(log)
    if found is None:
        raise RuntimeError(f"the engine's log does not say what its start took:\n{log}")
    parts = (part.rsplit(" ", 1) for part in found[1].split(", "))
    return {name: float(seconds) for name, seconds in parts}


def main(
    models: Annotated[
        list[str] | None, typer.Argument(help=f"Some of {', '.join(MODELS)}.")
    ] = None,
    kernels: Kernels = None,
    out: Out = None,
) -> None:
    """Start a server of each model and print what it took."""
    console = Console()
    if not torch.cuda.is_available():
        console.print("no GPU here; a start on the CPU captures nothing and says little")
        raise typer.Exit(1)
    rows = []
    for model in models or MODELS:
        with started(model, kernels) as (_, row):
            rows.append(row)
    print_rows(console, rows)
    if out is not None:
        write_results(out, rows, "python -m bench.cold_start --kernels KERNELS --out FILE")


if __name__ == "__main__":
    typer.run(main)
