"""Sharded checkpoints are read whole and right, in little host memory, and say how far they are."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fi_runtime.models.weights import STAGING_BYTES, CheckpointWeights

SHARDS = 4
SHAPE = (2048, 3072)
PER_SHARD = 8
FILE_BYTES = SHARDS * PER_SHARD * SHAPE[0] * SHAPE[1] * 2  # 403 MB

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def write_shards(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    """Save safetensors files and their index, named as transformers names them."""
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(7)
    shards = [
        {
            f"{shard}.{number}": torch.randint(-999, 999, SHAPE, generator=generator).bfloat16()
            for number in range(PER_SHARD)
        }
        for shard in range(SHARDS)
    ]
    write_shards(folder, shards)
    return folder


# Takes all tensors in a process of its own, while a thread watches its anonymous memory, which is
# all that is neither the page cache nor another process's.
WATCHED = """
import json, sys, threading
from pathlib import Path
import torch
from fi_runtime.models.weights import CheckpointWeights

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

folder, dtype, device = Path(sys.argv[1]), getattr(torch, sys.argv[2]), torch.device(sys.argv[3])
torch.zeros(1, device=device)
names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
peak, done = 0, threading.Event()
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
weights = CheckpointWeights(folder, dtype, device)
taken = [weights.take(name, tuple(map(int, sys.argv[4:]))) for name in names]
weights.close()
done.set()
watcher.join()
print(max(peak, anonymous()) - before)
"""


def peak_of(folder: Path, dtype: str, device: str) -> int:
    """Bytes of anonymous memory that reading a checkpoint took at most."""
    arguments = [sys.executable, "-c", WATCHED, str(folder), dtype, device, *map(str, SHAPE)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize(
    ("dtype", "kept"), [("bfloat16", 0), ("float16", FILE_BYTES), ("float32", 2 * FILE_BYTES)]
)
def test_the_cpu_holds_what_it_keeps_and_no_file(big_folder: Path, dtype: str, kept: int) -> None:
    assert peak_of(big_folder, dtype, "cpu") < kept + FILE_BYTES // 10


@pytest.mark.parametrize("_", [pytest.param(None, marks=needs_gpu)])
def test_a_gpus_host_holds_two_buffers_and_no_file(big_folder: Path, _: None) -> None:
    assert peak_of(big_folder, "bfloat16", "cuda") < 2 * STAGING_BYTES + FILE_BYTES // 4


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_what_is_taken_is_what_was_saved(tmp_path: Path, stored: torch.dtype, device: str) -> None:
    """Of no element and of one, of a buffer's size and about it, and of several buffers."""
    full = STAGING_BYTES // 2
    sizes = [(), (0,), (1,), (3, 5, 7), (full - 1,), (full,), (full + 1,), (5, full // 2 + 3)]
    saved = {str(size): random_tensor(size, stored, seed) for seed, size in enumerate(sizes)}
    write_shards(tmp_path, [dict([*saved.items()][::2]), dict([*saved.items()][1::2])])
    for dtype in (torch.bfloat16, torch.float32):
        weights = CheckpointWeights(tmp_path, dtype, torch.device(device))
        taken = {name: weights.take(name, tuple(tensor.shape)) for name, tensor in saved.items()}
        weights.close()
        for name, tensor in saved.items():
            assert taken[name].device.type == device
            assert taken[name].dtype == dtype
            assert torch.equal(taken[name].cpu(), tensor.to(dtype)), name


def test_progress_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fi_runtime.models.weights.PROGRESS_S", 0.0)
    caplog.set_level(logging.INFO)
    write_shards(tmp_path, [{name: random_tensor((1000, 1000), torch.float32, 1)} for name in "ab"])
    weights = CheckpointWeights(tmp_path, torch.float32, torch.device("cpu"))
    for name in "ab":
        weights.take(name, (1000, 1000))
    weights.close()
    half, whole, end = caplog.messages
    assert half == f"{tmp_path}: 50% of 0.0 GB loaded"
    assert whole == f"{tmp_path}: 100% of 0.0 GB loaded"
    assert end.startswith(f"{tmp_path}: 0.0 GB loaded in ")
