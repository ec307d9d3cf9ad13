"""Checkpoints for tests, written by transformers itself, and a server of one of them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.serving import KNOBS, VLLM, Reference, write_checkpoint
from tools.repository import write_repository
from tools.serve import ROOT, TritonServer

# Server, engine and tests share few cores; more threads than cores would wait for each other.
torch.set_num_threads(1)

VOCAB = 199


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=10, help="how often the engine is killed under load"
    )
    parser.addoption(
        "--connects", type=int, default=2000, help="how often a client connects and leaves"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, those of a file share one, and those of the GPU.

    A file's tests share a server; and engines on a GPU would take each other's memory.
    """
    for item in items:
        group = "gpu" if item.get_closest_marker("gpu") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    # Wide enough that the likeliest token leads by more than rounding.
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _llama() -> PreTrainedModel:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    shape = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    return LlamaForCausalLM(LlamaConfig(**_SHAPE, **shape, rope_parameters=rope))


def _llama_biased() -> PreTrainedModel:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}
    return LlamaForCausalLM(LlamaConfig(**_SHAPE, **shape, attention_bias=True, mlp_bias=True))


def _qwen3() -> PreTrainedModel:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
    return Qwen3ForCausalLM(Qwen3Config(**_SHAPE, **shape, tie_word_embeddings=True))


TWINS = {"llama": _llama, "llama_biased": _llama_biased, "qwen3": _qwen3}


def write_twin(name: str, folder: Path) -> PreTrainedModel:
    """Save a random tiny checkpoint of a family; the model that was saved, float32."""
    torch.manual_seed(1)
    model = TWINS[name]().eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session", params=sorted(TWINS))
def twin(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreTrainedModel]:
    """A checkpoint's folder and transformers' own model of it, for each family."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, write_twin(request.param, folder)


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
    shutil.copytree(ROOT / "docs" / "samples" / VLLM, repository / VLLM)
    with TritonServer(repository, log=folder / "log") as running:
        running.wait_ready()
        yield running
