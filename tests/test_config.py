"""Knobs of config.pbtxt: what is read from them and what is said of wrong ones."""

from pathlib import Path

import pytest

from fi_runtime.config import ConfigError, engine_config, split_parameters
from fi_runtime.frontend.engine_link import visible_gpu
from fi_runtime.frontend.repository import read_engine_config

REPOSITORY = Path(__file__).parents[1] / "model_repository"


def test_the_shipped_models_say_what_they_mean() -> None:
    config = read_engine_config(REPOSITORY / "llm")
    assert Path(config.checkpoint).is_absolute() or (REPOSITORY / "llm").exists()
    assert Path(config.checkpoint) == REPOSITORY / "llm" / "demo_checkpoint"
    with pytest.raises(ConfigError, match="engine='llm' sends on to another model"):
        read_engine_config(REPOSITORY / "llm_unary")


def test_a_relative_checkpoint_is_in_the_models_folder_and_an_absolute_one_where_it_says() -> None:
    folder = Path("/models/llm")
    assert engine_config({"checkpoint": "here"}, folder).checkpoint == "/models/llm/here"
    assert engine_config({"checkpoint": "/else/where"}, folder).checkpoint == "/else/where"


def test_values_are_read_from_strings() -> None:
    config = engine_config({"checkpoint": "a", "page_size": "4", "dtype": "float16"}, Path("/m"))
    assert (config.page_size, config.dtype) == (4, "float16")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, ["'checkpoint' is missing"]),
        ({"checkpoint": ""}, ["checkpoint=''", ">= 1"]),
        ({"checkpoint": "a", "page_size": "0"}, ["page_size='0'", ">= 1"]),
        ({"checkpoint": "a", "page_size": "many"}, ["page_size='many'", "int"]),
        ({"checkpoint": "a", "dtype": "int4"}, ["dtype='int4'"]),
        ({"checkpoint": "a", "cache_dtype": "bfloat16"}, ["cache_dtype='bfloat16'"]),
        (
            {"checkpoint": "a", "cache_dtype": "fp8", "attention_backend": "fa3"},
            ["cache_dtype='fp8'", "'fa2'"],
        ),
        ({"checkpoint": "a", "adapters": "sql"}, ["adapters='sql'", "JSON"]),
        ({"checkpoint": "a", "adapters": '{"": "sql"}'}, ["adapters=", ">= 1"]),
        ({"checkpoint": "a", "adapters": '{"sql": 1}'}, ["adapters=", "str"]),
        (
            {"checkpoint": "a", "step_tokens": "8", "max_sequences": "9"},
            ["step_tokens=8", "max_sequences=9"],
        ),
        (
            {"checkpoint": "a", "cache_tokens": "16", "page_size": "32"},
            ["cache_tokens=16", "page_size=32"],
        ),
    ],
)
def test_a_wrong_knob_is_named(parameters: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_config(parameters, Path("/models/llm"))
    for word in ["llm/config.pbtxt", *words]:
        assert word in str(caught.value)


def test_an_unknown_key_is_refused_and_tritons_own_are_left_alone() -> None:
    door, engine = split_parameters({"EXECUTION_ENV_PATH": "x", "page_size": "4"}, "llm")
    assert (door.engine, engine) == ("", {"page_size": "4"})
    with pytest.raises(ConfigError, match=r"unknown parameter 'pagesize'; known: .*page_size"):
        split_parameters({"pagesize": "4"}, "llm")


def test_an_engines_knob_belongs_to_the_model_that_has_the_engine() -> None:
    with pytest.raises(ConfigError, match="'page_size' is a knob of the engine, which llm/config"):
        split_parameters({"engine": "llm", "page_size": "4"}, "llm_unary")


def test_what_depends_on_the_device_is_put_in_where_nothing_was_said() -> None:
    cpu = engine_config({"checkpoint": "a"}, Path("/m"))
    gpu = engine_config({"checkpoint": "a"}, Path("/m"), "cuda")
    assert (cpu.cache_tokens, cpu.max_sequences, cpu.step_tokens, cpu.chunk_tokens) == (
        65_536,
        64,
        512,
        512,
    )
    assert (gpu.cache_tokens, gpu.max_sequences, gpu.step_tokens, gpu.chunk_tokens) == (
        0,
        256,
        8192,
        512,
    )
    told = engine_config({"checkpoint": "a", "max_sequences": "7"}, Path("/m"), "cuda")
    assert told.max_sequences == 7


def test_adapters_are_named_in_an_object_of_their_folders() -> None:
    given = '{"sql": "adapters/sql", "chat": "/else/where"}'
    found = engine_config({"checkpoint": "a", "adapters": given}, Path("/models/llm")).adapters
    assert found == {"sql": "/models/llm/adapters/sql", "chat": "/else/where"}


def test_the_device_is_the_instance_groups_to_say() -> None:
    with pytest.raises(ConfigError, match="unknown parameter 'device'"):
        split_parameters({"device": "cuda"}, "llm")


@pytest.mark.parametrize(
    ("visible", "gpu", "expected"),
    [(None, 3, "3"), ("2,5", 0, "2"), ("2,5", 1, "5"), ("GPU-a, GPU-b", 1, "GPU-b")],
)
def test_an_engine_sees_the_gpu_that_triton_gave_its_front_end(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpu: int, expected: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpu(gpu) == {"CUDA_VISIBLE_DEVICES": expected}


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    with pytest.raises(ConfigError, match="gpus: 2: no such GPU; CUDA_VISIBLE_DEVICES=2,5 shows 2"):
        visible_gpu(2)
    assert visible_gpu(None) == {}
