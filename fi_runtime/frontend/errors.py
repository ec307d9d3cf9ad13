"""Why a request gets no answer."""

from typing import Literal

Code = Literal["INVALID_ARG", "UNSUPPORTED", "UNAVAILABLE", "CANCELLED", "INTERNAL"]
"""Names of TritonError's codes."""


class RequestError(Exception):
    """Why a request gets no answer, and the code to say it with."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


def short(value: object) -> str:
    """A value as it was given, cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
