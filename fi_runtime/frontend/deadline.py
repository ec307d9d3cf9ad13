"""How long a request may take."""

import time
from dataclasses import dataclass

from fi_runtime.frontend.errors import RequestError


@dataclass(frozen=True)
class Deadline:
    """When a request has to be done."""

    seconds: float
    """from its arrival"""
    at: float
    """of time.monotonic"""

    @classmethod
    def of(cls, arrived: float, most_s: float, wanted_us: int) -> "Deadline":
        """``wanted_us``: Triton's own timeout of the request, 0 for none."""
        seconds = min(most_s, wanted_us / 1e6) if wanted_us else most_s
        return cls(seconds, arrived + seconds)

    @property
    def error(self) -> RequestError | None:
        """What the request gets once it has passed."""
        if time.monotonic() < self.at:
            return None
        return RequestError(
            "UNAVAILABLE",
            f"the request was not done within {self.seconds:g} s; ask for fewer tokens, or for a "
            "longer timeout, as far as request_timeout_s allows",
        )
