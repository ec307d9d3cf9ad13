"""Drive both doors with perf_analyzer and print its tables.

python -m tools.perf                                  # starts a server for it
python -m tools.perf --http-url localhost:8000 --grpc-url localhost:8001
python -m tools.perf --concurrency-range 1:8          # anything else goes to perf_analyzer
"""

import argparse
import contextlib
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.serve import EXAMPLE, ServerError, TritonServer, find_program

# Three windows of so many requests each, stable or not; the table is their average.
DEFAULTS = (
    "--concurrency-range=4",
    "--measurement-mode=count_windows",
    "--measurement-request-count=40",
    "--max-trials=3",
    "--stability-percentage=999",
)


def main(arguments: Sequence[str]) -> int:
    """Command line; perf_analyzer's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--http-url", help="host:port of a running server")
    parser.add_argument("--grpc-url", help="host:port of a running server")
    options, others = parser.parse_known_args(arguments)
    if (options.http_url is None) != (options.grpc_url is None):
        parser.error("give both --http-url and --grpc-url, or neither to start a server")
    try:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            http, grpc = options.http_url, options.grpc_url
            if http is None:
                server = stack.enter_context(TritonServer(log=folder / "server.log"))
                server.wait_ready(["llm", "llm_unary"])
                http, grpc = server.http_address, server.grpc_url
            return max(
                measure(folder, door, transport, others) for door, transport in doors(http, grpc)
            )
    except ServerError as error:
        sys.exit(f"perf: {error}")


def doors(http: str, grpc: str) -> list[tuple[str, list[str]]]:
    """Each door with each transport to drive it over, as perf_analyzer's options."""
    return [
        ("llm", ["-i", "grpc", "-u", grpc, "--streaming", "--async"]),
        ("llm_unary", ["-i", "grpc", "-u", grpc]),
        ("llm_unary", ["-i", "http", "-u", http]),
    ]


def measure(
    folder: Path,
    door: str,
    transport: list[str],
    others: Sequence[str],
    request: Mapping[str, object] = EXAMPLE,
) -> int:
    """Run perf_analyzer on one door over one transport; its exit code."""
    data = folder / f"{door}.json"
    data.write_text(json.dumps(input_data(request, streaming="--streaming" in transport)))
    command = [find_program("perf_analyzer"), "-m", door, *transport, f"--input-data={data}"]
    command += [default for default in DEFAULTS if not replaced(default, others)]
    print(f"\n=== {door}, {' '.join(transport)}", flush=True)
    return subprocess.run([*command, *others], check=False).returncode


def figures(
    folder: Path,
    door: str,
    transport: list[str],
    others: Sequence[str],
    request: Mapping[str, object],
) -> dict[str, str]:
    """Measure one load, and perf_analyzer's figures of it by the names of its columns.

    Raises:
        RuntimeError: perf_analyzer failed.
    """
    table = folder / "table.csv"
    if code := measure(folder, door, transport, [*others, "-f", str(table)], request):
        raise RuntimeError(f"perf_analyzer ended with code {code}")
    [row] = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    return row


def input_data(request: Mapping[str, object], streaming: bool) -> dict[str, Any]:
    """The requests, as perf_analyzer reads them; the batch dimension is implied."""
    request = {**request, "stream": True} if streaming else request
    return {"data": [{k: {"content": [v], "shape": [1]} for k, v in request.items()}]}


def replaced(default: str, others: Sequence[str]) -> bool:
    """Whether the caller says otherwise."""
    name = default.partition("=")[0]
    return any(other.partition("=")[0] == name for other in others)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
