"""FlashInfer's decode attention: FA2 against FA3, and what its automatic choice runs.

    python -m bench.decode_attention [--kernels FOLDER] [--old FOLDER] [--old-kernels FOLDER]
                                     [--page-size 16] [--out RESULTS.json]
    python -m bench.decode_attention plot RESULTS.json OUT.png

Times the CUDA-graph wrapper with tensor cores (``fi_runtime.attention.timing`` says how) with the
installed FlashInfer, and with another one that lies unpacked in a folder, such as 0.6.3, whose
automatic choice is FA3 on Hopper. Needs a GPU.
"""

import functools
import importlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.drawing import pyplot
from bench.results import read_results, write_results
from fi_runtime.attention.timing import DecodeShape, memory_bandwidth, time_decode
from fi_runtime.config import Backend, ConfigError
from fi_runtime.kernels.library import flashinfer, use_prebuilt

KV_HEADS, HEAD_DIM = 8, 128
TO_BEAT = {
    (16, 1, 32768): 57,
    (16, 8, 32768): 365,
    (16, 32, 8192): 365,
    (32, 1, 32768): 57,
    (32, 8, 8192): 101,
    (32, 32, 8192): 366,
    (40, 8, 32768): 366,
    (40, 64, 1024): 106,
}
"""FA2's microseconds on an H100 80GB HBM3 with FlashInfer 0.6.18, pages of 16 tokens, for each
number of query heads, batch and context."""
TO_BEAT_PAGE_SIZE = 16
TOLERANCE = 1.05
LONG_RATIO = 5.0
"""times as long as FA2 that FA3 is said to take at batch 1 and 32k"""

COLOURS = {"fa2": "#0072B2", "fa3": "#D55E00"}
"""told apart by colour-blind readers too"""

app = typer.Typer(add_completion=False, help=__doc__)
errors = Console(stderr=True)

Row = dict[str, Any]


# Measuring, in a process of its own for each version


@functools.cache
def _library(old: Path | None, kernels: Path | None) -> Any:
    """FlashInfer, the installed one or that of a folder, and its prebuilt modules."""
    if old is None:
        if kernels is not None:
            use_prebuilt(kernels)
        return flashinfer()
    # Not through the package's own loader, which refuses such a version.
    sys.path.insert(0, str(old))
    library = importlib.import_module("flashinfer")
    if kernels is not None:
        places: Any = importlib.import_module("flashinfer.jit.env")
        places.FLASHINFER_AOT_DIR = kernels
    return library


def measure(old: Path | None, kernels: Path | None, shape: DecodeShape, backend: Backend) -> Row:
    """One row of the results.

    Raises:
        ConfigError: the backend cannot run.
    """
    library = _library(old, kernels)
    time = time_decode(library, shape, backend)
    return {
        "flashinfer": library.__version__,
        "backend": backend,
        "resolved_backend": time.resolved_backend,
        "query_heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "batch": shape.batch,
        "context": shape.context,
        "page_size": shape.page_size,
        "us": round(time.us, 2),
        "gb_per_s": round(time.gb_per_s, 1),
    }


def measure_all(
    old: Path | None, kernels: Path | None, page_sizes: list[int]
) -> tuple[list[Row], list[str]]:
    """All rows of one version, and what could not be measured."""
    rows, failures = [], []
    # Two versions cannot live in one process. A task a row: a crash loses none that came before.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [
            (shape, backend, pool.submit(measure, old, kernels, shape, backend))
            for shape in shapes(page_sizes)
            for backend in get_args(Backend)
        ]
        for shape, backend, task in tasks:
            name = f"{_place(shape)}, page size {shape.page_size}, {backend}"
            name += f" from {old.name}" if old else ""
            try:
                rows.append(task.result())
            except Exception as error:  # whatever one row ended with; the others still count
                failures.append(f"{name}: {error}")
                errors.print(failures[-1], style="red", markup=False)
            else:
                errors.print(f"{name}: {rows[-1]['us']:.0f} us", highlight=False, markup=False)
    return rows, failures


def shapes(page_sizes: list[int]) -> list[DecodeShape]:
    """What is measured: the shapes that there are numbers to beat for."""
    return [
        DecodeShape(heads, KV_HEADS, HEAD_DIM, batch, context, page_size)
        for page_size in page_sizes
        for heads, batch, context in TO_BEAT
    ]


def _place(shape: DecodeShape) -> str:
    return f"{shape.heads} query heads, {shape.batch} x {shape.context}"


# Reading


def index(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    """Rows by version, backend, query heads, batch, context and page size."""
    keys = ("flashinfer", "backend", "query_heads", "batch", "context", "page_size")
    return {tuple(row[key] for key in keys): row for row in rows}


def versions_of(rows: list[Row]) -> list[str]:
    """In the order of the rows: the installed one first."""
    return list(dict.fromkeys(row["flashinfer"] for row in rows))


def table_of(rows: list[Row], title: str) -> Table:
    """A line for each shape: FA2 and FA3 of the first version, what auto runs in each."""
    found, versions = index(rows), versions_of(rows)
    table = Table(title=title)
    for column in ("query heads", "batch x context", "page", "fa2 us", "fa3 us", "fa3/fa2"):
        table.add_column(column, justify="right")
    for column in ("fa2 GB/s", *(f"auto in {version}" for version in versions)):
        table.add_column(column, justify="right")
    for place in dict.fromkeys(key[2:] for key in found):
        heads, batch, context, page_size = place
        fa2, fa3 = (found.get((versions[0], backend, *place)) for backend in ("fa2", "fa3"))
        autos = [found.get((version, "auto", *place)) for version in versions]
        table.add_row(
            str(heads),
            f"{batch} x {context}",
            str(page_size),
            f"{fa2['us']:.0f}" if fa2 else "failed",
            f"{fa3['us']:.0f}" if fa3 else "failed",
            f"{fa3['us'] / fa2['us']:.1f}" if fa2 and fa3 else "",
            f"{fa2['gb_per_s']:.0f}" if fa2 else "",
            *(f"{auto['resolved_backend']}, {auto['us']:.0f} us" if auto else "" for auto in autos),
        )
    return table


def facts(rows: list[Row]) -> list[str]:
    """How the first version's numbers stand to those they are compared with."""
    found, version = index(rows), versions_of(rows)[0]
    ratios, slow = [], []
    for place, us in TO_BEAT.items():
        fa2, fa3 = (
            found.get((version, backend, *place, TO_BEAT_PAGE_SIZE)) for backend in ("fa2", "fa3")
        )
        if fa2:
            ratios.append(fa2["us"] / us)
        if fa2 and fa3 and place[1:] == (1, 32768):
            slow.append(fa3["us"] / fa2["us"])
    lines = []
    if ratios:
        within = sum(ratio <= TOLERANCE for ratio in ratios)
        lines.append(
            f"FA2 is within {TOLERANCE - 1:.0%} of the numbers to beat in {within} of "
            f"{len(ratios)} shapes; at worst it takes {max(ratios):.2f} times as long"
        )
    if slow:
        is_so = "at least" if min(slow) >= LONG_RATIO else "less than"
        lines.append(
            f"FA3 takes {is_so} {LONG_RATIO:.0f} times as long as FA2 at 1 x 32768: "
            + ", ".join(f"{ratio:.1f}" for ratio in slow)
        )
    return lines


# Commands


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    kernels: Annotated[
        Path | None, typer.Option(help="Prebuilt modules of the installed FlashInfer.")
    ] = None,
    old: Annotated[
        Path | None, typer.Option(help="Folder in which an older FlashInfer lies unpacked.")
    ] = None,
    old_kernels: Annotated[
        Path | None, typer.Option(help="Prebuilt modules of that one, NAME/NAME.so each.")
    ] = None,
    page_size: Annotated[list[int], typer.Option(min=1, help="May be given again.")] = [16],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="File of results to write.")] = None,
) -> None:
    """Time every shape and print a table; without a command."""
    if context.invoked_subcommand is not None:
        return
    if not torch.cuda.is_available():
        errors.print("no GPU: there is nothing to time", style="red")
        raise typer.Exit(1)
    rows, failures = measure_all(None, _resolved(kernels), page_size)
    command = "python -m bench.decode_attention"
    command += "".join(f" --page-size {size}" for size in page_size)
    command += " --kernels FOLDER" if kernels else ""
    if old is not None:
        old_rows, old_failures = measure_all(_resolved(old), _resolved(old_kernels), page_size)
        rows, failures = rows + old_rows, failures + old_failures
        command += " --old FOLDER" + (" --old-kernels FOLDER" if old_kernels else "")
    if out is not None:
        write_results(out, rows, command)
    console = Console(width=140)
    if rows:
        copy = memory_bandwidth(torch.device("cuda"))
        title = (
            f"Decode attention, {KV_HEADS} key/value heads of {HEAD_DIM}, bfloat16, FlashInfer "
            f"{versions_of(rows)[0]}, {torch.cuda.get_device_name()}; a copy moves {copy:.0f} GB/s"
        )
        console.print(table_of(rows, title))
        for fact in facts(rows):
            console.print(fact, highlight=False)
    for failure in failures:
        errors.print(f"failed: {failure}", style="red", markup=False)
    raise typer.Exit(1 if failures else 0)


@app.command()
def plot(results: Path, out: Path) -> None:
    """Draw FA2's and FA3's times of a file of results, page size 16."""
    try:
        draw(read_results(results), out)
    except ConfigError as error:
        errors.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None


def draw(results: dict[str, Any], out: Path) -> None:
    """Draw the first version's times.

    Raises:
        ConfigError: there are none, or there is nothing to draw with.
    """
    plots = pyplot()
    rows = index(results["rows"])
    version = next(iter(versions_of(results["rows"])), "none")
    times = {
        place: [rows[version, backend, *place, TO_BEAT_PAGE_SIZE]["us"] for backend in COLOURS]
        for place in TO_BEAT
        if all((version, backend, *place, TO_BEAT_PAGE_SIZE) in rows for backend in COLOURS)
    }
    if not times:
        raise ConfigError("the results have no shape with times of both FA2 and FA3")
    # Dots, not bars: on a logarithmic axis a distance is a ratio, and a bar's length is nothing.
    figure, axes = plots.subplots(figsize=(9, 4.8), layout="constrained")
    for number, (fa2, fa3) in enumerate(times.values()):
        axes.plot([fa2, fa3], [number, number], color="0.7", linewidth=3, zorder=1)
        text = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        axes.annotate(f"{fa2:.0f}", (fa2, number), xytext=(-10, 0), ha="right", **text)
        ratio = f"{fa3:.0f} us, {fa3 / fa2:.1f}x"
        axes.annotate(ratio, (fa3, number), xytext=(10, 0), **text)
    for (backend, colour), us in zip(
        COLOURS.items(), zip(*times.values(), strict=True), strict=True
    ):
        axes.scatter(us, range(len(times)), 80, color=colour, label=backend.upper(), zorder=2)
    labels = [f"{heads} query heads, {batch} x {tokens:,}" for heads, batch, tokens in times]
    axes.set_yticks(range(len(times)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [20, 50, 100, 200, 500, 1000, 2000, 5000]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(map(min, times.values())) / 1.4, max(map(max, times.values())) * 2.2)
    axes.grid(axis="x", color="0.9", zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("microseconds, logarithmic; less is better")
    axes.set_title(
        f"CUDA-graph decode attention, FlashInfer {version}, {results['gpu']}\n"
        f"batch x context, {KV_HEADS} key/value heads of {HEAD_DIM}, bfloat16",
        fontsize=11,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=160)


def _resolved(folder: Path | None) -> Path | None:
    return folder.resolve() if folder else None


if __name__ == "__main__":
    app()
