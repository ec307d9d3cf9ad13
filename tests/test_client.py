"""The command-line client, as a process of its own, against a real server."""

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from client import Answer, Refused, Request, Unreachable, connect
from client.transport import Address
from tests.serving import CONTEXT, HANG_S, Reference, engines, is_idle, wait_until
from tools.serve import ROOT, TritonServer, free_ports

CLIENT = [sys.executable, "-m", "client"]
GREEDY = ["--temperature", "0"]
ENDLESS = ["--max-tokens", str(CONTEXT)]
PROMPT = "the door is open"
TOKENS = 24
PROMPT_S = 5.0
"""for the client to end when it is told to"""

WAYS = [
    pytest.param(protocol, stream, id=f"{protocol}{stream}")
    for protocol in ("grpc", "http")
    for stream in ("--stream", "--no-stream")
]
every_way = pytest.mark.parametrize(("protocol", "stream"), WAYS)
each_protocol = pytest.mark.parametrize("protocol", ["grpc", "http"])


def where(server: TritonServer, protocol: str) -> list[str]:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    return ["--protocol", protocol, "--url", url]


def run(*arguments: str, stdin: str | bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run the client; its output as the UTF-8 that it has to be."""
    done = subprocess.run(
        [*CLIENT, *arguments],
        cwd=ROOT,
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=HANG_S,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def assert_failed(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """It ended with this code, no text, and one line that has these words."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert [word for word in words if word not in done.stderr] == [], done.stderr


def wait_idle(server: TritonServer) -> None:
    """Wait until the engine computes nothing, long before an endless answer would end."""
    (engine,) = engines(server)
    wait_until(lambda: is_idle(engine), PROMPT_S, "the engine stops after a cancellation")


# generate


@every_way
def test_all_ways_give_the_same_text(
    server: TritonServer, reference: Reference, protocol: str, stream: str
) -> None:
    arguments = [stream, *where(server, protocol), *GREEDY, "--max-tokens", str(TOKENS)]
    done = run("generate", PROMPT, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == reference.text(PROMPT, TOKENS)
    assert done.stderr.count("\n") == 1
    assert f"{len(PROMPT)} tokens in, {TOKENS} out (length)" in done.stderr
    assert "tokens/s" in done.stderr
    assert ("first token" in done.stderr) == (stream == "--stream")


@every_way
def test_json(server: TritonServer, reference: Reference, protocol: str, stream: str) -> None:
    arguments = [stream, *where(server, protocol), *GREEDY, "--max-tokens", str(TOKENS)]
    done = run("generate", PROMPT, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    timing = answer.pop("timing")
    assert answer == {
        "text": reference.text(PROMPT, TOKENS),
        "finish_reason": "length",
        "prompt_tokens": len(PROMPT),
        "output_tokens": TOKENS,
    }
    assert 0 < timing["time_to_first_token_s"] <= timing["total_s"]
    assert timing["tokens_per_second"] == pytest.approx(TOKENS / timing["total_s"])


def test_prompt_from_stdin(server: TritonServer, reference: Reference) -> None:
    prompt = "two lines\nof Grüße"
    arguments = [*where(server, "grpc"), *GREEDY, "--max-tokens", str(TOKENS)]
    done = run("generate", "-", *arguments, stdin=prompt + "\n")
    assert done.stdout == reference.text(prompt, TOKENS), done.stderr


@every_way
def test_stop_and_echo(
    server: TritonServer, reference: Reference, protocol: str, stream: str
) -> None:
    text = reference.text(PROMPT, TOKENS)
    stop = text[5:7]
    done = run(
        *["generate", PROMPT, stream, "--echo", "--json", *where(server, protocol), *GREEDY],
        *["--max-tokens", str(TOKENS), "--stop", "no such text", "--stop", stop],
    )
    answer = json.loads(done.stdout)
    assert answer["text"] == PROMPT + text.partition(stop)[0]
    assert answer["finish_reason"] == "stop"


@every_way
def test_sampling_options_reach_the_server(
    server: TritonServer, reference: Reference, protocol: str, stream: str
) -> None:
    def generate(*options: str) -> str:
        given = ["--temperature", "1.5", "--max-tokens", str(TOKENS), *options]
        return run("generate", PROMPT, stream, *where(server, protocol), *given).stdout

    seed = str(2**64 - 1)
    assert generate("--seed", seed) == generate("--seed", seed) != generate("--seed", "1")
    assert generate("--top-k", "1") == reference.text(PROMPT, TOKENS)
    assert generate("--top-p", "1e-6") == reference.text(PROMPT, TOKENS)


def test_server_is_left_to_its_defaults(server: TritonServer) -> None:
    done = run("generate", PROMPT, "--json", *where(server, "grpc"))
    assert json.loads(done.stdout)["output_tokens"] == 16


# What can go wrong


@every_way
def test_refused(server: TritonServer, protocol: str, stream: str) -> None:
    done = run("generate", PROMPT, stream, *where(server, protocol), "--max-tokens", "0")
    assert_failed(done, 1, "max_tokens=0", ">= 1")
    # Streams over gRPC have no room for a code.
    assert ("INVALID_ARG" in done.stderr) == ((protocol, stream) != ("grpc", "--stream"))


@every_way
def test_bad_values_are_one_line_too(server: TritonServer, protocol: str, stream: str) -> None:
    for options in (["--temperature", "nan"], ["--top-p", "7"], ["--seed", str(2**64)]):
        assert_failed(run("generate", PROMPT, stream, *where(server, protocol), *options), 1)
    assert_failed(run("generate", "", stream, *where(server, protocol)), 1, "empty")


@every_way
def test_unknown_model_is_not_ready(server: TritonServer, protocol: str, stream: str) -> None:
    done = run("generate", PROMPT, stream, *where(server, protocol), "--model", "nowhere")
    assert_failed(done, 3, "nowhere", "not ready", "not found")


@every_way
def test_no_server(protocol: str, stream: str) -> None:
    url = f"127.0.0.1:{free_ports(1)[0]}"
    done = run("generate", PROMPT, stream, "--protocol", protocol, "--url", url)
    assert_failed(done, 3, f"no server at {protocol}://{url}", "--url")


def test_no_server_for_chat() -> None:
    url = f"127.0.0.1:{free_ports(1)[0]}"
    done = run("chat", "--url", url, stdin="hello\n")
    assert done.returncode in (2, 3)  # 2 where there is no demo checkpoint
    assert_failed(done, done.returncode)


def test_server_of_the_other_protocol(server: TritonServer) -> None:
    done = run("generate", PROMPT, "--protocol", "http", "--url", server.grpc_url)
    assert_failed(done, 3, "does not speak HTTP")
    assert_failed(run("generate", PROMPT, "--url", server.http_address), 3, "no server")


@every_way
def test_timeout(server: TritonServer, protocol: str, stream: str) -> None:
    arguments = [stream, *where(server, protocol), *ENDLESS, "--timeout", "0.3", "--json"]
    assert_failed(run("generate", PROMPT, *arguments), 4, "0.3 s", "--timeout")
    wait_idle(server)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", PROMPT, "--max-tokens", "few"],
        ["generate", PROMPT, "--timeout", "0"],
        ["generate", PROMPT, "--protocol", "ftp"],
        ["generate", PROMPT, "--url", "http://127.0.0.1:8000"],
        ["generate", PROMPT, "--url", "127.0.0.1:http"],
        ["generate", "-"],
        ["chat", "--top-p", "much"],
        ["chatter"],
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str]) -> None:
    done = run(*arguments, stdin=b"\xff")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr


def test_help_has_the_exit_codes() -> None:
    for command in ([], ["generate"], ["chat"]):
        done = run(*command, "--help")
        assert done.returncode == 0
        assert "130: interrupted" in done.stdout


# Leaving early


def start(*arguments: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*CLIENT, *arguments], cwd=ROOT, stdout=pipe, stderr=pipe)


@each_protocol
def test_health_asks_for_an_answer(server: TritonServer, protocol: str) -> None:
    done = run("health", *where(server, protocol))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("llm_unary at ")
    assert " answers: " in done.stderr


@each_protocol
def test_health_of_a_server_that_is_not_there_is_bad(protocol: str) -> None:
    [port] = free_ports(1)
    done = run("health", "--protocol", protocol, "--url", f"127.0.0.1:{port}")
    assert_failed(done, 1, "no server at")


@each_protocol
def test_interrupt_in_a_stream(server: TritonServer, protocol: str) -> None:
    arguments = ["generate", PROMPT, "--stream", *where(server, protocol), *ENDLESS]
    with start(*arguments) as process:
        assert process.stdout is not None
        assert process.stdout.read(8)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=HANG_S)
        assert time.monotonic() - begin < PROMPT_S
    assert process.returncode == 130
    assert err.decode() == "interrupted\n"
    wait_idle(server)


def test_interrupt_before_an_answer(server: TritonServer) -> None:
    (engine,) = engines(server)
    with start("generate", PROMPT, *where(server, "grpc"), *ENDLESS) as process:
        wait_until(lambda: not is_idle(engine), HANG_S, "the engine starts")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PROMPT_S)
    assert (process.returncode, out, err.decode()) == (130, b"", "interrupted\n")
    wait_idle(server)


@each_protocol
def test_reader_leaves(server: TritonServer, protocol: str) -> None:
    arguments = ["generate", PROMPT, "--stream", *where(server, protocol), *ENDLESS]
    with start(*arguments) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=PROMPT_S) == 141
        assert process.stderr.read() == b""
    wait_idle(server)


# chat


def replies(reference: Reference, turns: list[str]) -> list[str]:
    """What a conversation's turns are answered, each with all before it."""
    prompt, answers = "", []
    for turn in turns:
        prompt += f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
        answers.append(reference.text(prompt, TOKENS))
        prompt += f"{answers[-1]}<|im_end|>\n"
    return answers


@each_protocol
def test_chat_from_a_pipe(server: TritonServer, reference: Reference, protocol: str) -> None:
    arguments = [*where(server, protocol), *GREEDY, "--max-tokens", str(TOKENS)]
    done = run(
        *["chat", *arguments],
        stdin="one\ntwo\n\n/reset\none\n/quit\nnever said\n",
    )
    assert done.returncode == 0, done.stderr
    first, second = replies(reference, ["one", "two"])
    assert done.stdout.splitlines() == [first, second, first]
    assert done.stderr.count("tokens/s") == 3


def test_chat_from_a_pipe_ends_with_its_first_failure(server: TritonServer) -> None:
    arguments = [*where(server, "grpc"), "--top-p", "7"]
    assert_failed(run("chat", *arguments, stdin="one\ntwo\n"), 1, "top_p=7")


def test_chat_at_a_terminal(server: TritonServer, reference: Reference) -> None:
    """Ctrl-C ends an answer; the conversation goes on until its end."""
    ours, theirs = pty.openpty()
    arguments = ["chat", *where(server, "grpc"), *ENDLESS]
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 1024)
        seen = seen.partition(text)[2]

    with subprocess.Popen(
        [*CLIENT, *arguments, *GREEDY], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        wait_for(b"> ")
        os.write(ours, b"one\n")
        (reply,) = replies(reference, ["one"])
        wait_for(reply.encode())
        process.send_signal(signal.SIGINT)
        wait_for(b"interrupted")
        wait_for(b"> ")
        wait_idle(server)
        os.write(ours, b"\x04")
        with contextlib.suppress(OSError):  # how Linux says that the other side has closed
            while os.read(ours, 1024):
                pass
        assert process.wait(timeout=PROMPT_S) == 0
    os.close(ours)


# From Python


@each_protocol
@pytest.mark.parametrize("stream", [True, False])
def test_from_python(
    server: TritonServer, reference: Reference, protocol: str, stream: bool
) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    with connect("grpc" if protocol == "grpc" else "http", url) as connection:
        assert connection.is_ready("llm")
        assert not connection.is_ready("nowhere")
        bad = Request(PROMPT, stream=stream, max_tokens=0)
        with pytest.raises(Refused, match="max_tokens=0"):
            next(connection.generate(bad))
        # The connection is as good after an answer cut short as after an error.
        request = Request(PROMPT, stream=stream, max_tokens=TOKENS, temperature=0)
        next(connection.generate(request))
        answer = Answer()
        pieces = list(answer.follow(connection.generate(request)))
    assert answer.text == reference.text(PROMPT, TOKENS)
    assert (len(pieces) > 1) == stream
    assert [piece.finish_reason for piece in pieces[:-1]] == [""] * (len(pieces) - 1)


def test_imports_no_torch() -> None:
    code = "import sys, client.__main__; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b"set()\n"


def test_addresses() -> None:
    assert str(Address.parse("grpc", None)) == "grpc://127.0.0.1:8001"
    assert str(Address.parse("http", "box")) == "http://box:8000"
    assert str(Address.parse("http", "http://box:1/under/")) == "http://box:1/under"
    assert Address.parse("grpc", "[::1]:5").netloc == "[::1]:5"
    for url in ("", "https://box", "box:port", ":8000"):
        with pytest.raises(ValueError, match="expected HOST"):
            Address.parse("http", url)


# An HTTP server that is not Triton


@contextlib.contextmanager
def answering(response: bytes) -> Iterator[str]:
    """A server that says it is there, then gives this to whatever it is asked and hangs up."""
    live = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

    def serve() -> None:
        for reply in (live, response):
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield "{}:{}".format(*listener.getsockname())
        thread.join()


def test_server_lost_in_a_stream() -> None:
    event = b'data: {"text_output":"a","finish_reason":"None","num_input_tokens":1,'
    event += b'"num_output_tokens":1}\n\n'
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%s\r\n" % (len(event), event)
    for end in (b"", b"0\r\n\r\n"):  # cut off, and ended without a last piece
        with answering(head + chunk + end) as url, connect("http", url) as connection:
            pieces = connection.generate(Request(PROMPT, stream=True))
            assert next(pieces).text == "a"
            with pytest.raises(Unreachable, match="lost the connection"):
                next(pieces)


def test_error_page_of_a_proxy() -> None:
    page = b"<html>\n<body>no upstream</body></html>"
    head = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: %d\r\n\r\n" % len(page)
    with (
        answering(head + page) as url,
        connect("http", url) as connection,
        pytest.raises(Refused, match="HTTP 502: <html>"),
    ):
        next(connection.generate(Request(PROMPT, stream=True)))
