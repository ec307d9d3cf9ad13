"""The version guard, without a GPU."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fi_runtime.config import ConfigError
from fi_runtime.kernels.library import MIN_VERSION, check_version
from tools.serve import ROOT


@pytest.mark.parametrize("version", ["0.2.14", "0.5.0", "0.6.3", "0.6.3.post1", "0.6.4rc1"])
def test_a_version_with_the_regression_is_refused(version: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_version(version)
    message = str(caught.value)
    assert f"flashinfer-python {version} is installed" in message
    assert "FA3" in message
    assert "flashinfer-python>=0.6.4" in message


@pytest.mark.parametrize("version", ["0.6.4", "0.6.4.post1", "0.6.18.post1", "1.0"])
def test_a_version_without_it_is_taken(version: str) -> None:
    check_version(version)


def test_a_version_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        check_version("unknown")


@pytest.fixture(scope="module")
def old_flashinfer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last published version with the regression, as pip installs it."""
    folder = tmp_path_factory.mktemp("flashinfer")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run(
        [*pip, "flashinfer-python==0.6.3"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"pip cannot fetch it: {done.stderr[-300:]}")
    return folder


def test_the_real_old_version_is_refused_before_it_is_imported(old_flashinfer: Path) -> None:
    """The library itself would fail otherwise here: it needs a compiler and a GPU."""
    code = "from fi_runtime.kernels.library import flashinfer; flashinfer()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{old_flashinfer}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fi_runtime.config.ConfigError: flashinfer-python 0.6.3 is installed")
    assert "install flashinfer-python>=0.6.4" in last


def test_the_packages_gpu_extra_asks_for_a_version_without_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [wanted] = [Requirement(text) for text in project["optional-dependencies"]["gpu"]]
    assert wanted.name == "flashinfer-python"
    assert not wanted.specifier.contains("0.6.3")
    assert wanted.specifier.contains(str(MIN_VERSION))
