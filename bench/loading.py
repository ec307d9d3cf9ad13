"""How long a checkpoint takes from its files to the GPU, beside reading those files alone.

    python -m bench.loading [MODEL] [--folder FOLDER] [--out FILE]

Writes a sharded checkpoint of a shape of ``bench.shapes`` with random weights, reads its files with
several threads, and loads it as the engine does: once with the files only on disk, and once with
them in the page cache. Beside it, how much memory of its own the process takes at most for it:
neither page cache nor pinned buffers. Needs a GPU, and room on disk for the checkpoint.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from bench.offline import release
from bench.options import Out
from bench.results import write_results
from bench.shapes import write_shape
from fi_runtime.models import ARCHITECTURES, ModelConfig, load_model_config
from fi_runtime.models.weights import INDEX, CheckpointWeights, DummyWeights, Weights

MODEL = "Llama-3.1-8B"
SHARD_BYTES = 5 << 30
READERS = 8
"""threads that read a file"""
PIECE_BYTES = 16 << 20
"""that each reads at a time"""
WATCH_S = 0.002
"""between two looks at how much memory is taken"""


class _Written(DummyWeights):
    """Saves the random weights that a model takes, in shards, as it takes them."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(torch.bfloat16, device)
        self._folder = folder
        self._shard: dict[str, torch.Tensor] = {}
        self._weight_map: dict[str, str] = {}
        self._files = 0

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """As it is made; kept until its shard is full."""
        tensor = super().take(name, shape)
        self._shard[name] = tensor.cpu()
        if sum(kept.nbytes for kept in self._shard.values()) >= SHARD_BYTES:
            self._save()
        return tensor

    def _save(self) -> None:
        self._files += 1
        file = f"model-{self._files:05}.safetensors"
        save_file(self._shard, self._folder / file)
        self._weight_map |= dict.fromkeys(self._shard, file)
        self._shard = {}

    def close(self) -> None:
        """Save what is left, and the index."""
        self._save()
        index = json.dumps({"weight_map": self._weight_map})
        (self._folder / INDEX).write_text(index, encoding="utf-8")


def build(config: ModelConfig, weights: Weights) -> None:
    """Take all that a model takes, and let it go."""
    model = ARCHITECTURES[config.architecture].build(config, weights, config.max_position)
    weights.close()
    if model.embedding.is_cuda:
        torch.cuda.synchronize()


def forget(files: list[Path]) -> None:
    """Leave them on disk only."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(file: Path) -> int:
    """All of it, with several threads, each into a buffer of its own; how many bytes that is."""
    offsets = range(0, file.stat().st_size, PIECE_BYTES)
    local = threading.local()
    with file.open("rb", buffering=0) as opened, ThreadPoolExecutor(READERS) as readers:

        def read_piece(offset: int) -> int:
            if not hasattr(local, "buffer"):
                local.buffer = bytearray(PIECE_BYTES)
            return os.preadv(opened.fileno(), [local.buffer], offset)

        return sum(readers.map(read_piece, offsets))


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """The most bytes, as the one element, that this process takes while it lasts."""
    most, done = [0], threading.Event()
    before = _anonymous()

    def watch() -> None:
        while not done.wait(WATCH_S):
            most[0] = max(most[0], _anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def _anonymous() -> int:
    """Bytes of this process's memory that no file is behind."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(model: str, folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """A row for each state of the page cache, of the shape whose config.json is in the folder.

    Keys: model, gigabytes, page_cache, read_s, load_s, host_gigabytes (of its own, at most).
    """
    config = load_model_config(folder)
    build(config, _Written(folder, device))
    release()
    files = sorted(folder.glob("*.safetensors"))
    rows = []
    for page_cache in ("cold", "warm"):
        times = []
        for load in (False, True):
            if page_cache == "cold":
                forget(files)
            begin = time.perf_counter()
            with watched_memory() as most:
                if load:
                    build(config, CheckpointWeights(folder, torch.bfloat16, device))
                else:
                    assert sum(map(read, files)) == sum(file.stat().st_size for file in files)
            times.append(time.perf_counter() - begin)
            release()
        rows.append(
            {
                "model": model,
                "gigabytes": round(sum(file.stat().st_size for file in files) / 1e9, 3),
                "page_cache": page_cache,
                "read_s": round(times[0], 2),
                "load_s": round(times[1], 2),
                "host_gigabytes": round(most[0] / 1e9, 3),
            }
        )
    return rows


def main(
    model: Annotated[str, typer.Argument(help="A shape.")] = MODEL,
    folder: Annotated[
        Path | None, typer.Option(help="In which to write it for a while.", show_default="/tmp")
    ] = None,
    out: Out = None,
) -> None:
    """Measure and print a table."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        rows = measure(model, write_shape(model, Path(name)), torch.device("cuda"))
    table = Table("page cache", "GB", "reading, s", "loading, s", "times", "host memory, GB")
    for row in rows:
        keys = ("page_cache", "gigabytes", "read_s", "load_s")
        times = f"{row['load_s'] / row['read_s']:.2f}"
        table.add_row(*(str(row[key]) for key in keys), times, str(row["host_gigabytes"]))
    Console().print(table)
    if out is not None:
        write_results(out, rows, "python -m bench.loading --out FILE")


if __name__ == "__main__":
    typer.run(main)
