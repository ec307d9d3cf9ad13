"""Checkpoints for tests, written by transformers itself, and a server of one of them."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.families import write
from tests.serving import KNOBS, TENSORRT, VLLM, Reference, write_checkpoint
from tests.twins import Twin
from tools.repository import write_repository
from tools.serve import ROOT, TritonServer

# Server, engine and tests share few cores; more threads than cores would wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=10, help="how often the engine is killed under load"
    )
    parser.addoption(
        "--connects", type=int, default=2000, help="how often a client connects and leaves"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, those of a file share one, and those of the GPU.

    A file's tests share a server; and of a GPU's some have it for themselves.
    """
    for item in items:
        group = "gpu" if item.get_closest_marker("gpu") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


TWINS: dict[str, dict[str, Any]] = {
    "llama 3.1": {"num_attention_heads": 6, "head_dim": 16},
    "llama, biased": {"num_key_value_heads": 4, "head_dim": 12},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
}
"""A few families, and what their shapes have of their own: one, three and four query heads for each
key/value head."""


@pytest.fixture(scope="session", params=TWINS)
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    """Of a few families, for what is alike in all."""
    folder = tmp_path_factory.mktemp("twin")
    return Twin(folder, write(request.param, folder, **TWINS[request.param]))


@pytest.fixture(scope="session")
def served_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the checkpoint that test servers serve."""
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="session")
def reference(served_checkpoint: Path) -> Reference:
    """What transformers answers on the checkpoint that test servers serve."""
    return Reference(write_checkpoint(served_checkpoint))


@pytest.fixture(scope="session")
def server(
    reference: Reference, served_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A tritonserver with all doors. Tests leave it as they found it."""
    folder = tmp_path_factory.mktemp("server")
    repository = write_repository(folder / "repository", served_checkpoint, KNOBS)
    for sample in (VLLM, TENSORRT):
        shutil.copytree(ROOT / "docs" / "samples" / sample, repository / sample)
    with TritonServer(repository, log=folder / "log") as running:
        running.wait_ready()
        yield running
