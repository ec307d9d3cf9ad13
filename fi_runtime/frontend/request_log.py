"""A line in the log for each request, where the door's ``log_requests`` asks for it."""

import json
import logging
import time
from dataclasses import dataclass

from fi_runtime.frontend.metrics import RequestTimes

log = logging.getLogger(__name__)


@dataclass
class RequestRecord:
    """What the line of one request says. Never prompts or answers, nor messages that quote them."""

    request_id: str
    """the client's; as JSON it can neither end the line nor look like another"""
    arrived: float
    """in the front end, of ``time.monotonic``, in seconds"""
    times: RequestTimes | None = None
    """once it is known to be a request that an engine can compute"""

    def write(self, end: str) -> None:
        """``end``: answered, or an error's code."""
        line: dict[str, str | int | float] = {"id": self.request_id, "end": end}
        if self.times is not None:
            line["prompt_tokens"] = self.times.prompt_tokens
            line["answers"] = self.times.answers
            line["tokens"] = self.times.tokens
            if self.times.tokens:
                line["first_token_s"] = round(self.times.first_token - self.arrived, 4)
        line["total_s"] = round(time.monotonic() - self.arrived, 4)
        log.info("request %s", json.dumps(line))
