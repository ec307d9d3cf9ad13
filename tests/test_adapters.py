"""Adapters against transformers' models with the same ones merged, on the CPU in float32."""

import copy
import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from bench.families import prompt_of, write
from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.engine.core import BadRequest, Engine, Generation
from fi_runtime.engine.runner import Runner
from fi_runtime.messages import SamplingParams
from tests.adapters import CONFIG, merge, projections, write_adapter, write_files
from tests.twins import take_few_tokens_kernels

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, seed=0, logprobs=0)
LENGTHS = [1, 17, 64, 150]
FAMILIES = [
    "llama, biased",
    "qwen2, windows",
    "qwen3",
    "qwen3-moe",
    "gemma 2",
    "gemma 3, with images",
    "phi-3",
]


@dataclass
class AdaptedTwin:
    """A checkpoint and adapters of it, and transformers' models with and without them."""

    folder: Path
    models: dict[str, PreTrainedModel]
    """by the adapter's name; "" has none"""
    adapters: dict[str, str]

    def engine(self, **knobs: Any) -> Engine:
        values = {"cache_tokens": 4000, "max_sequences": 6, **knobs}
        return Engine(EngineConfig(checkpoint=str(self.folder), adapters=self.adapters, **values))

    def check(self, name: str, prompt: list[int], result: Generation) -> None:
        """Its tokens are the model's own greedy ones, and their logprobs within 1e-4."""
        tokens = prompt + result.tokens
        with torch.inference_mode():
            rows = self.models[name](torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1]
        rows = rows.float().log_softmax(-1)
        (best, second), chosen = rows.topk(2).values.unbind(-1), rows.argmax(-1)
        assert (best - second).min() > 1e-4, "a near tie: choose another seed"
        assert result.tokens == chosen.tolist(), f"{name}, prompt of {len(prompt)} tokens"
        assert result.logprobs == pytest.approx(best.tolist(), abs=1e-4), name
        assert len(result.tokens) == GREEDY.max_tokens

    def check_all(self, engine: Engine) -> None:
        """Every adapter and none after prompts of all lengths, at once."""
        work = random.Random(6).sample(
            [*itertools.product(self.models, LENGTHS)], k=len(self.models) * len(LENGTHS)
        )
        prompts = [prompt_of(length) for _, length in work]
        results = engine.generate(prompts, [with_adapter(name) for name, _ in work])
        for (name, _), prompt, result in zip(work, prompts, results, strict=True):
            self.check(name, prompt, result)
        assert engine.tree.free == engine.tree.usable


def with_adapter(name: str) -> SamplingParams:
    return msgspec.structs.replace(GREEDY, lora_name=name)


def make_twin(family: str, folder: Path) -> AdaptedTwin:
    """Three adapters: of all projections; of some of those joined; of some layers' MLPs."""
    model = write(family, folder / "base")
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "all": ("", {"r": 4, "lora_alpha": 8}),
        "some": ("(q|v|qkv|up)_proj", {"r": 3, "lora_alpha": 2, "use_rslora": True}),
        "layers": (
            r"[02]\.(mlp\.(gate|gate_up|down)|self_attn\.o)_proj",
            {"r": 11, "lora_alpha": 5.5},
        ),
    }
    models, adapters = {"": model}, {}
    for seed, (name, (which, config)) in enumerate(kinds.items()):
        path = write_adapter(model, folder / name, which, seed=seed, **config)
        models[name] = merge(copy.deepcopy(model), path)
        adapters[name] = str(path)
    return AdaptedTwin(folder / "base", models, adapters)


@pytest.fixture(scope="module", params=FAMILIES)
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdaptedTwin:
    return make_twin(request.param, tmp_path_factory.mktemp("twin"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> AdaptedTwin:
    return make_twin("llama 2", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(("page_size", "step_tokens"), [(1, 7), (16, 64)])
def test_several_and_none_in_one_batch(twin: AdaptedTwin, page_size: int, step_tokens: int) -> None:
    engine = twin.engine(page_size=page_size, step_tokens=step_tokens)
    twin.check_all(engine)
    assert engine.scheduler.num_preemptions == 0


def test_preemption_changes_nothing(twin: AdaptedTwin) -> None:
    engine = twin.engine(
        cache_tokens=176, page_size=4, step_tokens=40, max_sequences=16, max_context=160
    )
    twin.check_all(engine)
    assert engine.scheduler.num_preemptions > 0


def test_a_step_launched_ahead_has_its_adapters(
    llama: AdaptedTwin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "runs_ahead", True)
    llama.check_all(llama.engine(cache_tokens=400, max_context=200, step_tokens=48))


def test_few_tokens_meet_only_kernels_that_know_adapters(
    twin: AdaptedTwin, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_few_tokens_kernels(monkeypatch)
    twin.check_all(twin.engine(step_tokens=24))


def test_adapters_share_no_pages(llama: AdaptedTwin) -> None:
    engine = llama.engine()
    prompt = prompt_of(100)

    def reused(names: list[str]) -> int:
        results = engine.generate([prompt] * len(names), [with_adapter(name) for name in names])
        for name, result in zip(names, results, strict=True):
            llama.check(name, prompt, result)
        return engine.stats().reused_tokens

    assert reused(["", "all"]) == 0
    assert reused(["some"]) == 0
    assert reused(["layers", "layers"]) == 96, "one that is computed in the same step"
    assert reused([*llama.models]) == 4 * 96, "each has its own of before"
    engine.tree.forget()
    assert reused([*llama.models]) == 0


def test_what_is_infinite_in_one_adapter_is_no_other_rows_business(
    llama: AdaptedTwin, tmp_path: Path
) -> None:
    model = llama.models[""]
    loud = write_adapter(model, tmp_path / "loud", r=8, std=6e37)
    twin = AdaptedTwin(llama.folder, llama.models, {**llama.adapters, "loud": str(loud)})
    names = ["", "loud", "all"]
    prompts = [prompt_of(33)] * len(names)
    params = [with_adapter(name) for name in names]
    params[1] = msgspec.structs.replace(params[1], logprobs=None)
    results = twin.engine().generate(prompts, params)
    for name, prompt, result in zip(names, prompts, results, strict=True):
        if name != "loud":
            twin.check(name, prompt, result)


def test_an_unknown_name_is_refused_with_those_that_are_known(llama: AdaptedTwin) -> None:
    engine = llama.engine()
    with pytest.raises(BadRequest, match=r"lora_name='none' is no adapter .* all, some, layers$"):
        engine.add((b"a", 1), [1], with_adapter("none"))
    assert not engine.busy
    without = Engine(EngineConfig(checkpoint=str(llama.folder), cache_tokens=64))
    with pytest.raises(BadRequest, match=r"lora_name='all' is no adapter .*; it has none$"):
        without.add((b"a", 1), [1], with_adapter("all"))


# What is refused at start


def refused(folder: Path, adapter: Path) -> str:
    """The message, after the folder of the adapter."""
    with pytest.raises(ConfigError) as caught:
        Engine(EngineConfig(checkpoint=str(folder), adapters={"a": str(adapter)}))
    message = str(caught.value)
    assert message.startswith(f"{adapter}/")
    return message.removeprefix(f"{adapter}/")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; supported is 'LORA'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; supported is 'none'"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {'q_proj': 2}"),
        ({"from_the_future": 1}, "from_the_future is 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the weights"),
        ({"r": 0}, "r is 0; supported are 1 to 512"),
        ({"r": 513}, "r is 513; supported are 1 to 512"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a number"),
    ],
    ids=str,
)
def test_options_that_would_change_the_answer_are_refused(
    llama: AdaptedTwin, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    adapter = write_files(tmp_path / "a", CONFIG | config, {"a": torch.zeros(1)})
    assert refused(llama.folder, adapter).startswith(f"adapter_config.json: {words}")


Q = "base_model.model.model.layers.1.self_attn.q_proj"
A, B = torch.ones(4, 48), torch.ones(80, 4)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{Q}.lora_A.weight": A}, "of model.layers.1.self_attn.q_proj there is lora_A alone"),
        (
            {f"{Q}.lora_A.weight": A[:3], f"{Q}.lora_B.weight": B},
            f"tensor {Q}.lora_A.weight has shape [3, 48]; expected [4, 48]",
        ),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B[:79]},
            f"tensor {Q}.lora_B.weight has shape [79, 4]; expected [80, 4]",
        ),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B.int()},
            f"tensor {Q}.lora_B.weight has dtype torch.int32; supported are float32,",
        ),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B / 0},
            f"tensor {Q}.lora_B.weight has values that are not finite in float32",
        ),
        (
            {f"{Q}.lora_magnitude_vector": B[:, 0]},
            f"tensor {Q}.lora_magnitude_vector cannot be served; supported are lora_A.weight",
        ),
        (
            {"base_model.model.lm_head.lora_A.weight": A},
            "tensor base_model.model.lm_head.lora_A.weight cannot be served",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    llama: AdaptedTwin, tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    adapter = write_files(tmp_path / "a", CONFIG, whole)
    assert refused(llama.folder, adapter).startswith(f"adapter_model.safetensors: {words}")


@pytest.mark.parametrize(("old", "new"), [("layers.1.", "layers.3."), ("q_proj", "qkv_proj")])
def test_projections_that_the_model_has_not_are_refused(
    llama: AdaptedTwin, tmp_path: Path, old: str, new: str
) -> None:
    name = Q.replace(old, new)
    tensors = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    words = refused(llama.folder, write_files(tmp_path / "a", CONFIG, tensors))
    assert f"adapts {name.removeprefix('base_model.model.')}, which the model does not" in words
    # Those of the family, and no more.
    listed = words.rpartition(": ")[2].split(", ")
    has = {name.split(".", 3)[3] for name, _ in projections(llama.models[""], "")}
    assert (set(listed), len(listed)) == (has, 7)


def test_experts_are_refused(tmp_path: Path) -> None:
    model = write("qwen3-moe", tmp_path / "base")
    name = "base_model.model.model.layers.0.mlp.experts.1.up_proj"
    tensors = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": torch.ones(40, 4)}
    words = refused(tmp_path / "base", write_files(tmp_path / "a", CONFIG, tensors))
    assert f"tensor {name}.lora_A.weight cannot be served; " in words
    assert "experts not among them" in words
    # Nor is the router, which is a projection by name alone.
    name = "base_model.model.model.layers.0.mlp.gate"
    tensors = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": torch.ones(6, 4)}
    words = refused(tmp_path / "base", write_files(tmp_path / "b", CONFIG, tensors))
    assert f"tensor {name}.lora_A.weight cannot be served; " in words
    assert model.config.num_experts == 6


def test_files_that_are_not_there_or_not_whole_are_named(
    llama: AdaptedTwin, tmp_path: Path
) -> None:
    assert refused(llama.folder, tmp_path / "a").startswith("adapter_config.json: no such file;")
    adapter = write_files(tmp_path / "a", CONFIG, {"a": torch.zeros(9)})
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "adapter_model.safetensors: not a whole safetensors file" in refused(
        llama.folder, adapter
    )
    file.rename(adapter / "adapter_model.bin")
    assert refused(llama.folder, adapter).startswith("adapter_model.safetensors: no such file;")


def test_an_adapter_of_nothing_changes_nothing(llama: AdaptedTwin, tmp_path: Path) -> None:
    """As one is made: its B are zeros. Whatever dtype it is stored in."""
    path = write_adapter(llama.models[""], tmp_path / "new", dtype=torch.bfloat16)
    tensors = load_file(path / "adapter_model.safetensors")
    zeros = {name: t * float(".lora_A." in name) for name, t in tensors.items()}
    path = write_files(tmp_path / "zeros", CONFIG, zeros)
    twin = AdaptedTwin(llama.folder, {"new": llama.models[""]}, {"new": str(path)})
    twin.check_all(twin.engine())
