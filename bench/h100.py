"""Everything that is claimed of a GPU, in one command on a machine that has one.

    python -m bench.h100 --kernels FOLDER --old FOLDER --old-kernels FOLDER [PART ...]

Runs the tests marked gpu, doctor, the table of decode attention with this FlashInfer and an older
one; for each model a real tritonserver: its start, perf_analyzer against both doors, and for the
default checkpoint the share of its tasks answered exactly; the transport alone; the engine offline
against the same engine served; and the engine alone: how near each family's answers are to
transformers', its peers' benchmarks, a mixture of experts, what its steps are made of, streams
beside long prompts, shared prefixes, adapters, products by rows, and how fast weights are loaded;
and a server under faults. Each part writes its results file and is run whatever became of those
before it; the exit code is 1 if any failed. Parts: tests, doctor, attention, served, transport,
serving, fidelity, offline, latency, moe, timeline, mixed, prefix, lora, offline_fp8_cache,
accuracy_fp8_cache, offline_fp8_weights, products, loading, soak; all where none is named.
"""

import functools
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import cold_start
from bench.options import Kernels
from bench.results import write_results
from bench.shapes import PEERS
from tools import perf
from tools.serve import TritonServer

COMMAND = "python -m bench.h100 --kernels KERNELS --old FLASHINFER --old-kernels KERNELS"
PROMPT = "The quick brown fox jumps over the lazy dog, and then it does so once more. " * 2
OUTPUT_TOKENS = 64
GPU_TESTS = (
    "tests/test_gpu.py",
    "tests/test_gpu_adapters.py",
    "tests/test_gpu_families.py",
    "tests/test_gpu_fp8.py",
    "tests/test_gpu_timing.py",
    "tests/test_guides.py",
    "tests/test_loading.py",
)
AT_A_TIME = 4
"""of the tests that may share the GPU; what takes long is that each starts an engine"""
CONCURRENCIES = (1, 32)
STREAMS = (1, 16, 64, 256)
FP8_WEIGHTS = ("Llama-3.1-8B-FP8", "Qwen3-14B-FP8")
SOAK_MINUTES = "8"
ALONE = ("fidelity", "offline", "latency", "moe", "timeline", "mixed", "prefix", "lora")
"""of the engine, without a server"""

console = Console(width=140)


def gpu_tests(out: Path) -> None:
    """Run the tests marked gpu; one row: passed, failed, skipped, seconds."""
    suites = [
        _tests("gpu and not alone", "-n", str(AT_A_TIME), "--dist", "load"),
        _tests("gpu and alone"),
    ]
    row = {key: round(sum(suite[key] for suite in suites), 1) for key in suites[0]}
    write_results(out / "gpu_tests.json", [row], f"{COMMAND} (python -m pytest -m gpu)")
    if row["failed"]:
        raise RuntimeError(f"{row['failed']} tests failed")


def _tests(marked: str, *options: str) -> dict[str, float]:
    """Run the tests that are marked so: passed, failed, skipped, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # By name: what another test lacks on the machine must not keep these from running.
        arguments = ["-m", marked, "-p", "no:cacheprovider", f"--junitxml={report}", *options]
        _exit_code("pytest", *GPU_TESTS, *arguments)
        suite = ElementTree.parse(report).getroot()[0]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": float(suite.get("time", 0)),
    }


def served(out: Path, kernels: Path | None) -> None:
    """Start, drive and stop a server of each model; one that fails keeps none from the others."""
    starts: list[dict[str, Any]] = []
    loads: list[dict[str, Any]] = []
    failed = []
    for model in cold_start.MODELS:
        try:
            with cold_start.started(model, kernels) as (server, row):
                starts.append(row)
                write_results(out / "cold_start.json", starts, COMMAND)
                if model == "demo":
                    _accuracy(server, out)
                for count in CONCURRENCIES:
                    loads += [{"model": model, **load} for load in _drive(server, count)]
                    write_results(out / "served.json", loads, COMMAND)
        except Exception as error:
            failed.append(f"{model}: {error}")
    cold_start.print_rows(console, starts)
    if failed:
        raise RuntimeError("; ".join(failed))


def _accuracy(server: TritonServer, out: Path) -> None:
    """The share of the default checkpoint's tasks answered exactly."""
    options = ["--url", server.grpc_url, "--out", str(out / "accuracy.json")]
    _run("bench.accuracy", *options)


def _drive(server: TritonServer, concurrency: int) -> list[dict[str, Any]]:
    """perf_analyzer against each door: one row each, of its own figures."""
    knobs = {"max_tokens": OUTPUT_TOKENS, "temperature": 0.0, "ignore_eos": True}
    request = {"text_input": PROMPT, "sampling_parameters": json.dumps(knobs)}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for door, transport in perf.doors(server.http_address, server.grpc_url):
            options = [
                f"--concurrency-range={concurrency}",
                f"--measurement-request-count={4 * concurrency}",
            ]
            figures = perf.figures(folder, door, transport, options, request)
            requests_per_s = float(figures["Inferences/Second"])
            rows.append(
                {
                    "door": door,
                    "protocol": transport[1],
                    "concurrency": concurrency,
                    "prompt_bytes": len(PROMPT),
                    "output_tokens": OUTPUT_TOKENS,
                    "requests_per_s": requests_per_s,
                    "tokens_per_s": round(requests_per_s * OUTPUT_TOKENS, 1),
                    # To the whole answer, also of a stream.
                    "p50_ms": float(figures["p50 latency"]) / 1e3,
                    "p99_ms": float(figures["p99 latency"]) / 1e3,
                }
            )
    return rows


def _run(module: str, *arguments: str) -> None:
    """Run a module in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    if code := _exit_code(module, *arguments):
        raise RuntimeError(f"{module} ended with code {code}")


def _exit_code(module: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode


def main(
    parts: Annotated[list[str] | None, typer.Argument(help="What to run.")] = None,
    kernels: Kernels = None,
    old: Annotated[Path | None, typer.Option(help="Folder with an older FlashInfer.")] = None,
    old_kernels: Annotated[Path | None, typer.Option(help="Its compiled modules.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("bench/results/h100"),
) -> None:
    """Run every part, or those that are named."""

    def measure(module: str, *options: str, name: str = "") -> None:
        given = ("--kernels", str(kernels)) if kernels else ()
        _run(f"bench.{module}", *options, *given, "--out", str(out / f"{name or module}.json"))

    def offline_fp8_cache() -> None:
        options = (*PEERS, "--cache-dtype", "fp8")
        measure("offline", *options, name="offline_fp8_cache")

    def accuracy_fp8_cache() -> None:
        measure("accuracy", "--cache-dtype", "fp8", name="accuracy_fp8_cache")

    def offline_fp8_weights() -> None:
        measure("offline", *FP8_WEIGHTS, name="offline_fp8_weights")

    def attention() -> None:
        given = {"--old": old, "--old-kernels": old_kernels}
        measure(
            "decode_attention",
            *(text for name, path in given.items() if path for text in (name, str(path))),
        )

    def serving() -> None:
        counts = (text for count in STREAMS for text in ("--concurrency", str(count)))
        options = ("--tokens", "256", "--rounds", "8", "--front-ends", "4")
        measure("serving", *PEERS, *counts, *options)

    known: dict[str, Callable[[], None]] = {
        "tests": lambda: gpu_tests(out),
        "doctor": lambda: _run("fi_runtime", "doctor"),
        "attention": attention,
        "served": lambda: served(out, kernels),
        "transport": lambda: _run("bench.transport", "4", "--out", str(out / "transport.json")),
        "serving": serving,
        **{name: functools.partial(measure, name) for name in ALONE},
        "offline_fp8_cache": offline_fp8_cache,
        "offline_fp8_weights": offline_fp8_weights,
        "accuracy_fp8_cache": accuracy_fp8_cache,
        **{
            name: functools.partial(_run, f"bench.{name}", "--out", str(out / f"{name}.json"))
            for name in ("products", "loading")
        },
        "soak": lambda: measure("soak", "--minutes", SOAK_MINUTES),
    }
    failed = []
    for name in parts or known:
        console.rule(name)
        try:
            known[name]()
        except Exception as error:  # the others are worth having all the same
            console.print(f"{name}: {error!r}", style="red", markup=False)
            failed.append(name)
    console.print(f"failed: {', '.join(failed)}" if failed else "all parts ran")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
