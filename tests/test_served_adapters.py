"""Adapters through a real tritonserver, against transformers' models with the same ones merged."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3ForCausalLM

from tests.adapters import merge, write_adapter
from tests.serving import (
    KNOBS,
    VLLM,
    Reference,
    at_once,
    error_of,
    generate,
    infer_grpc,
    joined,
    stream,
    write_checkpoint,
)
from tools.repository import UNARY, write_repository
from tools.serve import ROOT, TritonServer

TOKENS = 24
NAMES = ("", "formal", "terse")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Reference]]:
    """A checkpoint's folder, with a folder for each adapter beside it, and what each answers."""
    folder = tmp_path_factory.mktemp("models")
    model = write_checkpoint(folder / "base")
    # Not of what writes to the channels that keep its text well-formed.
    which = "(q|k|v|gate|up)_proj"
    references = {"": Reference(model)}
    for seed, name in enumerate(NAMES[1:], 7):
        path = write_adapter(model, folder / name, which, seed=seed, r=3 + seed)
        merged = merge(copy.deepcopy(model), path)
        assert isinstance(merged, Qwen3ForCausalLM)
        references[name] = Reference(merged)
    return folder, references


@pytest.fixture(scope="module")
def adapted(
    models: tuple[Path, dict[str, Reference]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("adapted")
    adapters = json.dumps({name: str(models[0] / name) for name in NAMES[1:]})
    knobs = {**KNOBS, "adapters": adapters}
    repository = write_repository(folder / "repository", models[0] / "base", knobs)
    shutil.copytree(ROOT / "docs" / "samples" / VLLM, repository / VLLM)
    with TritonServer(repository, log=folder / "log") as running:
        running.wait_ready()
        yield running


def knobs(name: str, **more: Any) -> str:
    """sampling_parameters as clients of Triton's vLLM backend write them."""
    given = {"temperature": 0, "max_tokens": TOKENS, **more}
    return json.dumps(given | ({"lora_name": name} if name else {}))


def test_each_request_is_answered_with_its_own(
    adapted: TritonServer, models: tuple[Path, dict[str, Reference]]
) -> None:
    """On every door and in every way to name it, all at once and after the same beginning."""
    prompt = "the same beginning for all, and long enough for pages of it to be kept"
    expected = {name: models[1][name].text(prompt, TOKENS) for name in NAMES}
    assert len(set(expected.values())) == len(NAMES), "they all answer alike"

    def unary(name: str) -> str:
        inputs = {"sampling_parameters": knobs(name), "exclude_input_in_output": True}
        return infer_grpc(adapted, text_input=prompt, **inputs).text

    def streamed(name: str) -> str:
        return joined(stream(adapted, text_input=prompt, sampling_parameters=knobs(name)))

    def of_vllm(name: str) -> str:
        inputs = {"text_input": prompt, "sampling_parameters": knobs(name)}
        return joined(stream(adapted, door=VLLM, **inputs))

    def as_parameter(name: str) -> str:
        body = {"text_input": prompt, "max_tokens": TOKENS, "temperature": 0.0}
        named = {"lora_name": name} if name else {}
        _, answer = generate(adapted, UNARY, **body, **named, exclude_input_in_output=True)
        return str(answer["text_output"])

    ways = (unary, streamed, of_vllm, as_parameter)
    calls = [lambda way=way, name=name: way(name) for way in ways for name in NAMES]
    found = at_once(calls)
    assert found == [expected[name] for _ in ways for name in NAMES]


def test_several_answers_and_the_client_take_the_adapter(
    adapted: TritonServer, models: tuple[Path, dict[str, Reference]]
) -> None:
    expected = models[1]["terse"].text("several", TOKENS)
    inputs = {"sampling_parameters": knobs("terse", n=2), "exclude_input_in_output": True}
    both = infer_grpc(adapted, text_input="several", **inputs).outputs["text_output"]
    assert [text.decode() for text in both.reshape(-1)] == [expected] * 2
    command = [sys.executable, "-m", "client", "generate", "several", "--lora", "terse"]
    options = ["--temperature", "0", "--max-tokens", str(TOKENS), "--url", adapted.grpc_url]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert ran.stdout == expected


def test_an_unknown_name_is_an_error_that_lists_the_known(adapted: TritonServer) -> None:
    given = {"text_input": "a", "sampling_parameters": knobs("casual")}
    status, message = error_of(infer_grpc, adapted, **given)
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "lora_name='casual' is no adapter of this model; known are formal, terse" in message
    _, message = error_of(stream, adapted, **given)
    assert "known are formal, terse" in message


def test_tensorrts_way_to_name_an_adapter_is_not_ignored(adapted: TritonServer) -> None:
    status, answer = generate(adapted, UNARY, text_input="a", lora_task_id=1)
    assert status == 400
    assert "lora_task_id=1 is not supported" in answer["error"]
