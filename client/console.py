"""What a terminal or a pipe sees, and the exit codes."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from enum import IntEnum
from typing import NoReturn

import typer
from rich.console import Console

from client.answer import Answer
from client.errors import ClientError, Refused, TimedOut, Unreachable, one_line


class Exit(IntEnum):
    """The command's exit codes; click gives 2 for what it finds wrong itself."""

    ANSWERED = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    TIMED_OUT = 4
    INTERRUPTED = 130
    BROKEN_PIPE = 141


EXITS: dict[type[ClientError], Exit] = {
    Refused: Exit.REFUSED,
    Unreachable: Exit.UNREACHABLE,
    TimedOut: Exit.TIMED_OUT,
}

# What a model writes may hold codes that a terminal would obey; shown as U+2400 and on.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}

_stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def write(text: str) -> None:
    """Text to stdout, now; to a terminal without its control characters."""
    if sys.stdout.isatty():
        text = text.translate(_VISIBLE)
    # UTF-8 whatever the locale, as the server gave it.
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def note(text: str, style: str = "dim") -> None:
    """A line about the answer, to stderr."""
    _stderr.print(text, style=style)


def fail(text: object) -> None:
    """A line about what went wrong, to stderr."""
    note(f"error: {one_line(text)}", style="red")


def quit_usage(text: object) -> NoReturn:
    """End over something in the command that cannot be."""
    fail(text)
    raise typer.Exit(Exit.USAGE)


def describe(answer: Answer) -> str:
    """Tokens and timing in a line."""
    timing = answer.timing
    streamed = timing.time_to_first_token_s < timing.total_s
    first = f"first token after {timing.time_to_first_token_s:.3f} s, " if streamed else ""
    return (
        f"{answer.prompt_tokens} tokens in, {answer.output_tokens} out ({answer.finish_reason}); "
        f"{first}all after {timing.total_s:.3f} s, {timing.tokens_per_second:.1f} tokens/s"
    )


def to_json(answer: Answer, echo: str) -> str:
    """An answer as one JSON object on one line."""
    return json.dumps(
        {
            "text": echo + answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "output_tokens": answer.output_tokens,
            "timing": asdict(answer.timing),
        }
    )


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """End the command with one line and the exit code of whatever is raised inside."""
    try:
        yield
    except ClientError as error:
        fail(error)
        raise typer.Exit(EXITS[type(error)]) from None
    except KeyboardInterrupt:
        note("interrupted")
        raise typer.Exit(Exit.INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read stdout has enough; what Python still holds for it must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(Exit.BROKEN_PIPE) from None


def read_utf8(data: bytes, what: str) -> str:
    """Decode what was given, or end the command."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        quit_usage(f"{what} is not UTF-8 (byte {error.start} is {data[error.start]:#x})")
