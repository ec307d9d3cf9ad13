"""The command-line client.

    python -m client generate "17+25=" --stream
    python -m client chat
    python -m client health

Text goes to stdout; timing and errors go to stderr. ``EXIT_CODES`` is the contract with scripts.
"""

import contextlib
import os
import sys
from collections.abc import Generator, Iterator
from typing import Annotated

import typer

from client.answer import Answer
from client.chat import Conversation
from client.connection import connect
from client.console import (
    describe,
    exit_codes,
    fail,
    note,
    quit_usage,
    read_utf8,
    to_json,
    write,
)
from client.errors import ClientError
from client.request import DEFAULT_TIMEOUT_S, Piece, Request
from client.transport import Protocol, Transport

CHAT_MAX_TOKENS = 512
HEALTH_TIMEOUT_S = 10.0
UNHEALTHY = 1
"""the exit code of `health` for whatever keeps an answer from coming"""

EXIT_CODES = """\
**Exit codes**

- 0: answered
- 1: the server refused the request; its message, with its code where it sent one, is on stderr
- 2: usage
- 3: the server cannot be reached, was lost, or its model is not ready
- 4: no complete answer within --timeout
- 130: interrupted (Ctrl-C), and the request cancelled on the server (by HTTP only with --stream)
- 141: whoever read stdout left, and the request was cancelled
"""

app = typer.Typer(
    name="client",
    help="Ask a server for text. Text goes to stdout; timing and errors go to stderr.",
    epilog=EXIT_CODES,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Url = Annotated[
    str | None,
    typer.Option(
        help="The server, as HOST, HOST:PORT or PROTOCOL://HOST:PORT.",
        show_default="127.0.0.1:8001 for grpc, 127.0.0.1:8000 for http",
    ),
]
ProtocolOption = Annotated[Protocol, typer.Option(help="What to talk to it.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy.", show_default="the server's")
]
TopK = Annotated[
    int | None,
    typer.Option(help="Choose among so many tokens; 0 is all.", show_default="the server's"),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Choose among the likeliest tokens of this total probability.",
        show_default="the server's",
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Choose among tokens of at least this share of the likeliest one's probability.",
        show_default="the server's",
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="Makes sampling repeatable.", show_default="a random one")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text; may be given several times."),
]
LoraName = Annotated[
    str | None,
    typer.Option("--lora", help="Answer with this adapter.", show_default="with none"),
]
Timeout = Annotated[
    float, typer.Option(min=0.001, help="Seconds for the whole answer.", show_default=True)
]


@app.command(epilog=EXIT_CODES)
def generate(
    prompt: Annotated[
        str, typer.Argument(help="The text to go on from; - reads it from stdin.", metavar="PROMPT")
    ],
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Write text as it is made.")
    ] = False,
    url: Url = None,
    protocol: ProtocolOption = "grpc",
    model: Annotated[
        str | None,
        typer.Option(help="The model to ask.", show_default="llm with --stream, llm_unary without"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens at most.", show_default="the server's")
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    lora: LoraName = None,
    echo: Annotated[bool, typer.Option("--echo", help="Repeat the prompt first.")] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Write one JSON object, when all is there: text, finish_reason, prompt_tokens, "
            "output_tokens, timing.",
        ),
    ] = False,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Answer one prompt."""
    with exit_codes():
        request = Request(
            prompt=read_prompt(prompt),
            stream=stream,
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=read_stop(stop),
            lora_name=lora,
            timeout_s=timeout,
        )
        answer = Answer()
        with open_connection(protocol, url) as server:
            pieces = answer.follow(server.generate(request))
            before = request.prompt if echo else ""
            if as_json:
                for _ in pieces:
                    pass
                write(to_json(answer, before) + "\n")
            else:
                write_pieces(pieces, before)
                note(describe(answer))


@app.command()
def health(
    url: Url = None,
    protocol: ProtocolOption = "grpc",
    model: Annotated[
        str | None, typer.Option(help="The model to ask.", show_default="llm_unary")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds for the answer.", show_default=True)
    ] = HEALTH_TIMEOUT_S,
) -> None:
    """Say whether the server answers, for probes: exit code 0 if one token comes in time, else 1.

    A server that is ready by its own word may have no engine to answer with.
    """
    request = Request(prompt="?", model=model, max_tokens=1, temperature=0.0, timeout_s=timeout)
    with exit_codes():
        try:
            answer = Answer()
            with open_connection(protocol, url) as server:
                for _ in answer.follow(server.generate(request)):
                    pass
        except ClientError as error:
            fail(error)
            raise typer.Exit(UNHEALTHY) from None
        note(f"{request.door} at {server.address} answers: {describe(answer)}")


@app.command(epilog=EXIT_CODES)
def chat(
    url: Url = None,
    protocol: ProtocolOption = "grpc",
    model: Annotated[str | None, typer.Option(help="The model to ask.", show_default="llm")] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens at most in a turn.", show_default=True)
    ] = CHAT_MAX_TOKENS,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    lora: LoraName = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Talk: one line a turn, all turns so far sent each time.

    The served checkpoint's own chat template makes the prompt of them.

    /reset forgets the turns; /quit or the end of input ends. From a pipe, each line is a turn, and
    the first failure ends it all.
    """
    with exit_codes():
        settings = Request(
            stream=True,
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=read_stop(stop),
            lora_name=lora,
            timeout_s=timeout,
        )
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        with open_connection(protocol, url) as server:
            if interactive:
                note(f"{settings.door} at {server.address}; /reset forgets, /quit ends")
            conversation = Conversation(server, settings)
            for line in read_lines(interactive):
                if line == "/quit":
                    break
                if line == "/reset":
                    conversation.reset()
                elif line:
                    with going_on(interactive):
                        take_turn(conversation, line)


def take_turn(conversation: Conversation, line: str) -> None:
    """Say a line and write the reply, with a line's end even on a pipe."""
    answer = Answer()
    try:
        write_pieces(conversation.say(line, answer))
    finally:
        if answer.output_tokens and not sys.stdout.isatty():
            write("\n")
    note(describe(answer))


@contextlib.contextmanager
def going_on(interactive: bool) -> Iterator[None]:
    """At a terminal, let a turn fail or be interrupted without ending the chat."""
    try:
        yield
    except ClientError as error:
        if not interactive:
            raise
        fail(error)
    except KeyboardInterrupt:
        if not interactive:
            raise
        note("interrupted; what came is kept as the reply")


def write_pieces(pieces: Generator[Piece], before: str = "") -> None:
    """Write text as it comes; what is still to come when that fails is cancelled."""
    written = False
    with contextlib.closing(pieces):
        try:
            for piece in pieces:
                write(piece.text if written else before + piece.text)
                written = True
        finally:
            if written and sys.stdout.isatty():
                write("\n")


def open_connection(protocol: Protocol, url: str | None) -> Transport:
    try:
        return connect(protocol, url)
    except ValueError as error:
        quit_usage(error)


def read_prompt(given: str) -> str:
    """The prompt, from stdin less its last line's end where that is asked for."""
    if given == "-":
        return read_utf8(sys.stdin.buffer.read(), "stdin").removesuffix("\n")
    return read_utf8(os.fsencode(given), "the prompt")


def read_stop(given: list[str] | None) -> tuple[str, ...] | None:
    return tuple(read_utf8(os.fsencode(text), "--stop") for text in given) if given else None


def read_lines(interactive: bool) -> Iterator[str]:
    """What the user says, a line each, until its end."""
    if not interactive:
        for line in sys.stdin.buffer:
            yield read_utf8(line, "a line of stdin").strip()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and history
    while True:
        try:
            line = input("> ")
        except EOFError:
            write("\n")
            return
        yield read_utf8(line.encode(errors="surrogateescape"), "the line").strip()


if __name__ == "__main__":
    app(prog_name="python -m client")
