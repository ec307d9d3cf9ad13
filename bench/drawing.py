"""What plots are drawn with, which only the extra "bench" installs."""

import importlib
from typing import Any

from fi_runtime.config import ConfigError


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'fi-runtime[bench]'") from None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")
