"""Knobs of config.pbtxt: what is read from them and what is said of wrong ones."""

from pathlib import Path

import pytest

from fi_runtime.config import ConfigError, engine_config, split_parameters
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
