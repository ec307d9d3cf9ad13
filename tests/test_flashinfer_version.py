"""The version guard, without a GPU."""

import pytest

from fi_runtime.config import ConfigError
from fi_runtime.kernels.library import check_version


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
