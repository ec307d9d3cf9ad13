"""What is said of a checkpoint that cannot be served: which file, what is there, what should be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bench.families import prompt_of, write
from fi_runtime.__main__ import app
from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.engine.core import Engine
from fi_runtime.messages import SamplingParams
from fi_runtime.tokenizer import tokenizer_file
from tests.serving import byte_tokenizer

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, seed=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write("llama 3.1", tmp_path)
    return tmp_path


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def greedy(folder: Path) -> list[int]:
    engine = Engine(EngineConfig(checkpoint=str(folder), cache_tokens=64))
    return engine.generate([prompt_of(17)], [GREEDY])[0].tokens


def transformers_greedy(folder: Path) -> list[int]:
    """What transformers makes of the folder itself."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder)
    prompt = torch.tensor([prompt_of(17)])
    found = model.generate(prompt, max_new_tokens=GREEDY.max_tokens, do_sample=False)
    return list(found[0, 17:].tolist())


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Engine(EngineConfig(checkpoint=str(folder)))
    return str(caught.value)


def test_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == (
        f"{folder}: no *.safetensors file; weights are read from safetensors only"
    )
    (folder / "config.json").unlink()
    assert refusal(folder).startswith(f"{folder}/config.json: no such file")
    assert refusal(folder / "nowhere").startswith(f"{folder}/nowhere/config.json: no such file")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": None}, ["architecture none", "Qwen3ForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "'silu' and 'gelu_pytorch_tanh'"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}},
            ["rope type 'proportional'", "llama3"],
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor is 0.5", "supported is 1"],
        ),
        ({"hidden_size": "wide"}, ["hidden_size"]),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            ["quantization_config has quant_method 'awq'", "supported are quant_method fp8"],
        ),
    ],
)
def test_a_config_that_is_not_served(
    folder: Path, values: dict[str, Any], words: list[str]
) -> None:
    edit_config(folder, **values)
    message = refusal(folder)
    assert message.startswith(f"{folder}/config.json: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_config_that_is_no_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert refusal(folder).startswith(f"{folder}/config.json: ")


def test_a_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    message = refusal(folder)
    assert "tensor model.layers.1.mlp.up_proj.weight is in none of its 1 safetensors" in message
    assert "expected one of shape [72, 48]" in message


def test_a_tensor_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=81)
    assert refusal(folder) == (
        f"{folder}/model.safetensors: tensor model.layers.0.mlp.gate_proj.weight has shape "
        "[72, 48]; expected [81, 48] from config.json"
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_a_tensor_of_another_dtype(folder: Path, dtype: torch.dtype) -> None:
    name = "model.norm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert f"tensor {name} has dtype {dtype}; supported are float32, bfloat16" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(folder)
    assert message.startswith(f"{path}: not a whole safetensors file ({path.stat().st_size} bytes)")


def test_files_beside_the_one_that_transformers_reads_are_left_alone(folder: Path) -> None:
    expected = greedy(folder)
    zeros = {name: torch.zeros_like(t) for name, t in load_file(folder / WHOLE).items()}
    save_file(zeros, folder / "older.safetensors")
    assert greedy(folder) == expected
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(zeros, "older.safetensors")})
    )
    assert greedy(folder) == expected, "nor is an index of others"


def test_a_tensor_that_is_in_two_files(folder: Path) -> None:
    (folder / WHOLE).rename(folder / "b.safetensors")
    name = "model.norm.weight"
    save_file({name: torch.ones(48)}, folder / "a.safetensors")
    assert refusal(folder) == (
        f"{folder}: tensor {name} is in a.safetensors and in b.safetensors; "
        "leave one of them in the folder"
    )


@pytest.mark.parametrize("family", ["llama 3.1", "gemma 3, with images"])
def test_a_head_that_is_stored_beside_embeddings_it_is_said_to_be_tied_to(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the checkpoint's where it differs, whatever config.json says; transformers' manner."""
    write(family, tmp_path)
    prefix = "language_model." if "images" in family else ""
    embedding, head = f"{prefix}model.embed_tokens.weight", f"{prefix}lm_head.weight"
    tied = greedy(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    assert greedy(tmp_path) == tied
    assert "lm_head" not in caplog.text
    edit_tensors(tmp_path, lambda tensors: tensors.update({head: tensors[embedding].flip(0)}))
    expected = transformers_greedy(tmp_path)
    assert greedy(tmp_path) == expected != tied
    assert "lm_head.weight is stored and is not the embedding" in caplog.text
    caplog.clear()
    edit_config(tmp_path, tie_word_embeddings=False)
    assert greedy(tmp_path) == transformers_greedy(tmp_path) == expected
    assert "lm_head" not in caplog.text


def test_an_index_whose_files_are_not_there(folder: Path) -> None:
    index = folder / INDEX
    (folder / WHOLE).rename(folder / "one.safetensors")
    for name in ("other.safetensors", "../one.safetensors", str(folder / "one.safetensors")):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert refusal(folder) == f"{index}: names '{name}', which is no file of that folder"
    index.write_text("{}")
    assert refusal(folder).startswith(f"{index}: no weight_map")
    index.write_text("[]")
    assert refusal(folder) == f"{index}: holds a list; expected an object"


@pytest.mark.parametrize("asked", ["truncation", "padding"])
def test_the_command_answers_whole_prompts_alone(folder: Path, asked: str) -> None:
    """Whatever its tokenizer.json was last used for."""
    tokenizer, text = byte_tokenizer(), "What is 17 and 25?"
    prompt = tokenizer.encode(text).ids
    engine = Engine(EngineConfig(checkpoint=str(folder), cache_tokens=64))
    expected = tokenizer.decode(engine.generate([prompt], [GREEDY])[0].tokens)
    if asked == "truncation":
        tokenizer.enable_truncation(5)
    else:
        tokenizer.enable_padding(length=32, pad_id=33)
    tokenizer.save(str(folder / "tokenizer.json"))
    line = f'parameters {{ key: "checkpoint" value {{ string_value: "{folder}" }} }}'
    (folder / "config.pbtxt").write_text(line)
    given = ["generate", text, "--model", str(folder), "--max-tokens", "8", "--device", "cpu"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0
    assert done.stdout == f"{expected}\n"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([""], "the prompt is empty"),
        (["a", "--max-tokens", "100000"], "max_tokens=100000 are more than the context"),
        (["a", "--seed", str(2**63)], "9223372036854775807"),
    ],
)
def test_what_the_command_cannot_answer_is_told(folder: Path, given: list[str], words: str) -> None:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    line = f'parameters {{ key: "checkpoint" value {{ string_value: "{folder}" }} }}'
    (folder / "config.pbtxt").write_text(line)
    told = CliRunner().invoke(app, ["generate", *given, "--model", str(folder), "--device", "cpu"])
    assert told.exit_code in (1, 2)
    assert isinstance(told.exception, SystemExit), "no traceback"
    assert words in told.output


def test_a_tokenizer_that_is_none(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        tokenizer_file(folder, tmp_path)


def test_no_tokenizer_at_all(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file, and transformers finds"):
        tokenizer_file(folder, tmp_path)
