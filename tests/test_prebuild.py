"""What is said where kernels cannot be compiled, or have not been. Compiling takes minutes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from fi_runtime.config import ConfigError
from fi_runtime.engine.build import compiled_in
from fi_runtime.kernels import prebuild
from fi_runtime.kernels.library import prebuilt_manifest, use_prebuilt
from fi_runtime.models import load_model_config


def compile_with(monkeypatch: pytest.MonkeyPatch, folder: Path, path: Path, toolkit: Path) -> None:
    """Prebuild where there is nothing but these: one folder on PATH, and a CUDA toolkit."""
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(prebuild, "DEFAULT_CUDA_HOME", str(toolkit))
    monkeypatch.setattr(prebuild.sys, "executable", str(folder / "python"))
    monkeypatch.setattr(prebuild.sysconfig, "get_paths", lambda: {"purelib": str(folder)})
    model = prebuild.Compiled(128)
    dtypes = torch.bfloat16, torch.bfloat16
    prebuild.prebuild(model, *dtypes, ["fa2"], "9.0a", folder / "out", lambda *_: None)


def test_all_that_is_missing_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_with(monkeypatch, tmp_path, path=tmp_path, toolkit=tmp_path)
    for word in ("nvcc", "ninja", "c++", "cublasLt.h (pip install nvidia-cublas)", "curand.h"):
        assert word in str(caught.value)


def test_a_folder_without_kernels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no prebuilt kernels; fill it with"):
        use_prebuilt(tmp_path)


def test_kernels_for_something_else_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / ".build").mkdir()
    (tmp_path / ".build" / "libcuda.so").touch()  # what linking needs is no kernel
    (tmp_path / "norm").mkdir()
    (tmp_path / "norm" / "norm.so").touch()
    with pytest.raises(ConfigError, match=r"holds kernels and no prebuilt\.json"):
        prebuild.claim(tmp_path, {"arch": "9.0a", "flashinfer": "0.6.18"})
    (tmp_path / "norm" / "norm.so").unlink()
    prebuild.claim(tmp_path, {"arch": "9.0a", "flashinfer": "0.6.18"})
    prebuild.claim(tmp_path, {"arch": "9.0a", "flashinfer": "0.6.18"})
    assert prebuilt_manifest(tmp_path) == {"arch": "9.0a", "flashinfer": "0.6.18"}
    with pytest.raises(ConfigError, match=r"'arch': '9\.0a'.* not for .*'arch': '8\.0'"):
        prebuild.claim(tmp_path, {"arch": "8.0", "flashinfer": "0.6.18"})


def test_an_nvcc_that_only_calls_another_is_not_taken_for_the_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, toolkit = tmp_path / "local" / "bin", tmp_path / "cuda"
    for file in (script / "nvcc", toolkit / "bin" / "nvcc", toolkit / "include" / "cuda_runtime.h"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o755)
    with pytest.raises(ConfigError, match="cannot compile without ninja"):
        compile_with(monkeypatch, tmp_path, path=script, toolkit=toolkit)


@pytest.mark.parametrize(
    ("config", "variants", "activation"),
    [
        (LlamaConfig(head_dim=128), [(False, False)], "silu"),
        (MistralConfig(head_dim=128, sliding_window=4096), [(True, False)], "silu"),
        (Gemma2Config(), [(False, True), (True, True)], "gelu_tanh"),
    ],
    ids=["llama", "mistral", "gemma2"],
)
def test_the_windows_and_caps_of_a_checkpoint_are_compiled(
    config: PreTrainedConfig,
    variants: list[tuple[bool, bool]],
    activation: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = config.model_type.capitalize()
    config.architectures = [f"{name}ForCausalLM"]
    config.save_pretrained(tmp_path)
    model = load_model_config(tmp_path)

    class Specs:
        """Stands in for FlashInfer's modules: a specification is what it was asked for with."""

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: (name, arguments)

    monkeypatch.setattr(
        prebuild, "importlib", SimpleNamespace(import_module=lambda *_, **__: Specs())
    )
    monkeypatch.setattr(prebuild, "own_spec", lambda: ("own", ()))
    dtypes = torch.bfloat16, torch.float8_e4m3fn
    specs = list(prebuild._modules(compiled_in(model), *dtypes, ["fa2"]))
    assert ("gen_act_and_mul_module", (activation,)) in specs
    head_dims = (model.head_dim,) * 2
    for kind, first in (("decode", ()), ("prefill", ("fa2",))):
        asked = [args for name, args in specs if name == f"gen_batch_{kind}_module"]
        of = (*first, *dtypes, torch.bfloat16, torch.int32, *head_dims, 0)
        kinds = [(*of, *variant) for variant in variants]
        assert [args[: len(kinds[0])] for args in asked] == kinds
