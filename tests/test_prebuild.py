"""What is said where kernels cannot be compiled, or have not been. Compiling takes minutes."""

from pathlib import Path

import pytest
import torch

from fi_runtime.config import ConfigError
from fi_runtime.kernels import prebuild
from fi_runtime.kernels.library import prebuilt_manifest, use_prebuilt


def test_all_that_is_missing_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(prebuild, "DEFAULT_CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(prebuild.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(prebuild.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    with pytest.raises(ConfigError) as caught:
        prebuild.prebuild(128, torch.bfloat16, ["fa2"], "9.0a", tmp_path / "out", lambda *_: None)
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
    monkeypatch.setenv("PATH", str(script))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(prebuild, "DEFAULT_CUDA_HOME", str(toolkit))
    monkeypatch.setattr(prebuild.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(prebuild.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    with pytest.raises(ConfigError, match="cannot compile without ninja"):
        prebuild.prebuild(128, torch.bfloat16, ["fa2"], "9.0a", tmp_path / "out", lambda *_: None)
