"""Why there is no answer. Each message is one line that a user can act on."""


class ClientError(Exception):
    """There is no answer, or not all of it."""


class Unreachable(ClientError):
    """No server listens there, it was lost in mid-answer, or the model is not ready on it."""


class TimedOut(ClientError):
    """The answer was not complete in time; what was left of it has been cancelled."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"no complete answer in {timeout_s:g} s; --timeout allows for more")


class Refused(ClientError):
    """The server gave an error instead of the answer, or of the rest of it."""

    def __init__(self, code: str, message: str) -> None:
        """`code` is one of Triton's, such as INVALID_ARG; empty where the server gave none."""
        super().__init__(f"{code}: {message}" if code else message)
        self.code = code
        self.message = message


def one_line(text: object) -> str:
    """A message of another library's, without its line breaks and control characters."""
    printable = (c if c.isprintable() else " " for c in str(text))
    return " ".join("".join(printable).split())
