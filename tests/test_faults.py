"""Faults around a server that runs on: nothing is lost or stuck, and all is as it was before."""

import ast
import contextlib
import itertools
import random
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.serving import (
    AGAIN_S,
    BATCH,
    HANG_S,
    KNOBS,
    STREAMED,
    UNARY,
    Reference,
    Stream,
    assert_as_before,
    engines,
    error_of,
    grpc_client,
    infer_grpc,
    is_free,
    joined,
    metric,
    post,
    processes,
    stream,
    tensors_of,
    wait_until,
)
from tools import serve
from tools.repository import write_repository
from tools.serve import TritonServer

LONG = {"max_tokens": 600, "temperature": 0.0}
EXPLICIT = ["--model-control-mode=explicit", "--load-model=*"]


@pytest.fixture(scope="module")
def tight(
    reference: Reference, served_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server of a few pages, for far more than fits them. Tests leave it as they found it."""
    folder = tmp_path_factory.mktemp("tight")
    knobs = {**KNOBS, "page_size": "64", "cache_tokens": "1024", "max_context": "1024"}
    repository = write_repository(folder / "repository", served_checkpoint, knobs)
    with TritonServer(repository, EXPLICIT, log=folder / "log") as running:
        running.wait_ready()
        yield running


def memory_mb(server: TritonServer) -> float:
    """Of all processes of a server."""
    return sum(process.memory_info().rss for process in processes(server)) / 1e6


def files(server: TritonServer) -> int:
    """Open ones of the server's own process, its connections among them."""
    return next(p for p in processes(server) if p.pid == server.pid).num_fds()


# A few pages


def test_a_storm_of_preemptions_loses_nothing(tight: TritonServer, reference: Reference) -> None:
    """More than fits, with prompts that have much in common, some cancelled on their way."""
    prompts = [f"the same beginning for every one of them, {i % 6}" for i in range(BATCH)]
    expected = {prompt: reference.text(prompt, 150) for prompt in prompts}
    before = metric(tight, "vllm:num_preemptions_total")
    moments = random.Random(3)
    cancels = [moments.randrange(1, 40) if moments.random() < 0.3 else None for _ in prompts]

    def ask(prompt: str, leave_after: int | None) -> str | None:
        """The answer, or None where the client left before its end."""
        inputs = {"text_input": prompt, "max_tokens": 150, "temperature": 0.0}
        with Stream(tight, stream=True, **inputs) as opened:
            text = joined(list(itertools.islice(opened, leave_after)))
        return text if leave_after is None else None

    with ThreadPoolExecutor(BATCH) as pool:
        answers = list(pool.map(ask, prompts, cancels))
    for prompt, answer, left in zip(prompts, answers, cancels, strict=True):
        assert left is not None or answer == expected[prompt]
    wait_until(lambda: is_free(tight), 20, "every page is free")
    assert metric(tight, "vllm:num_preemptions_total") > before + 10
    assert_as_before(tight, reference)


# Clients that do not behave


def test_many_connects_and_disconnects_leave_nothing(
    tight: TritonServer, reference: Reference, request: pytest.FixtureRequest
) -> None:
    """Half of them mid-word: over HTTP, over gRPC, and with an answer on its way."""
    count = request.config.getoption("--connects")
    assert_as_before(tight, reference)
    files_before, memory_before = files(tight), memory_mb(tight)
    body = b'{"text_input": "leaves", "stream": true, "max_tokens": 600, "temperature": 0}'
    asks = (
        b"POST /v2/models/llm/generate_stream HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s"
    )
    words = {
        "http": [b"", b"POST /v2/models/llm/gen", asks % (len(body), body[:20]), b"\x00\xff" * 9],
        "grpc": [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"],
    }
    whole = asks % (len(body), body)
    for number in range(count):
        service = "http" if number % 2 else "grpc"
        with socket.create_connection(tight.address(service), timeout=10) as connection:
            if number % 40 == 1:
                connection.sendall(whole)
                connection.recv(1)
            else:
                connection.sendall(words[service][number // 2 % len(words[service])])
            if number % 3:  # a reset instead of a goodbye
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    wait_until(lambda: is_free(tight), 20, "nobody's answer is computed any more")
    wait_until(lambda: files(tight) <= files_before + 10, 20, "their connections are closed")
    assert memory_mb(tight) < memory_before + 60
    assert_as_before(tight, reference)


class Unread:
    """A gRPC stream of one request, of which nothing is read until ``text`` is asked for.

    What the client's transport takes by itself, a window of 64 KiB, is far less than the answer.
    """

    def __init__(self, server: TritonServer, prompt: str) -> None:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 1 << 10),
        ]
        self._channel = grpc.insecure_channel(server.grpc_url, options=options)
        inputs = {
            "text_input": prompt,
            "stream": True,
            "sampling_parameters": '{"logprobs": 20, "max_tokens": 600, "temperature": 0}',
            "return_logprobs": True,
        }
        message = service_pb2.ModelInferRequest(model_name=STREAMED)
        for tensor in tensors_of(tritonclient.grpc, inputs):
            message.inputs.append(tensor._get_tensor())
            message.raw_input_contents.append(tensor._get_content())
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._responses = stub.ModelStreamInfer(iter([message]))

    def text(self) -> str:
        text = ""
        for response in self._responses:
            assert not response.error_message
            result = tritonclient.grpc.InferResult(response.infer_response)
            text += result.as_numpy("text_output")[0, 0].decode()
        return text

    def close(self) -> None:
        self._channel.close()


def test_clients_that_stop_reading_hold_up_nobody_and_lose_nothing(
    tight: TritonServer, reference: Reference
) -> None:
    wait_until(lambda: is_free(tight), 20, "it has nothing to do")
    before = memory_mb(tight)
    prompts = [f"unread {i}" for i in range(4)]
    expected = [reference.text(prompt, 600) for prompt in prompts]
    unread = [Unread(tight, prompt) for prompt in prompts]
    body = {"text_input": "unread", "stream": True, **LONG}
    with contextlib.ExitStack() as stack:
        for one in unread:
            stack.callback(one.close)
        for _ in range(4):
            stack.enter_context(post(tight, f"/v2/models/{STREAMED}/generate_stream", body))
        wait_until(lambda: metric(tight, "vllm:num_requests_running") > 0, HANG_S, "they run")
        inputs = {"text_input": "reads", "max_tokens": 50, "temperature": 0.0}
        assert joined(stream(tight, **inputs)) == reference.text("reads", 50)
        # Nobody has read a word, and the engine is done with all of them.
        wait_until(lambda: is_free(tight), HANG_S, "the engine is free")
        # 600 tokens, each with the log-probabilities of 20, are a megabyte of responses.
        assert memory_mb(tight) < before + 8 * len(unread)
        assert [one.text() for one in unread] == expected
    assert_as_before(tight, reference)


def test_a_request_gets_no_longer_than_its_timeout(
    tight: TritonServer, reference: Reference
) -> None:
    inputs = tensors_of(tritonclient.grpc, {"text_input": "slow", **LONG})
    beside = [Stream(tight, text_input=f"beside {i}", stream=True, **LONG) for i in range(16)]
    try:
        for one in beside:
            one.next()
        with contextlib.closing(grpc_client(tight)) as client:
            begin = time.monotonic()
            status, message = error_of(client.infer, UNARY, inputs, timeout=300_000)
            assert 0.3 <= time.monotonic() - begin < 3
        assert status == "StatusCode.UNAVAILABLE"
        assert "not done within 0.3 s" in message
    finally:
        for one in beside:
            one.close()
    wait_until(lambda: is_free(tight), 20, "the engine is free")


def test_requests_of_a_batch_do_not_wait_for_each_other(
    tight: TritonServer, reference: Reference
) -> None:
    """Which Triton hands over together, while there is no engine to give them to."""
    expected = "patient" + reference.text("patient", 9)
    assert_as_before(tight, reference)
    [engine] = engines(tight)
    engine.kill()
    wait_until(lambda: metric(tight, "fi_runtime:engine_up") == 0, 5, "its death is noticed")

    def ask(timeout_s: float) -> tuple[str, float]:
        inputs = tensors_of(tritonclient.grpc, {"text_input": "hasty", "max_tokens": 9})
        begin = time.monotonic()
        with contextlib.closing(grpc_client(tight)) as client:
            status, _ = error_of(client.infer, UNARY, inputs, timeout=round(timeout_s * 1e6))
        return status, time.monotonic() - begin

    with ThreadPoolExecutor(10) as pool:
        # One for each front end, so that the others come together once these have ended.
        first = [pool.submit(ask, 0.4) for _ in range(2)]
        time.sleep(0.1)
        inputs = {"text_input": "patient", "max_tokens": 9, "temperature": 0.0}
        patient = pool.submit(infer_grpc, tight, **inputs)
        time.sleep(0.1)
        hasty = [pool.submit(ask, 0.3) for _ in range(7)]
        ends = [call.result() for call in (*first, *hasty)]
        assert not patient.done(), "there is still no engine"
        assert {status for status, _ in ends} == {"StatusCode.UNAVAILABLE"}
        assert max(seconds for _, seconds in ends) < 1.3
        assert patient.result().text == expected
    assert_as_before(tight, reference)


# Disks and memory


@pytest.fixture(scope="module")
def scratch(
    reference: Reference, served_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server of a checkpoint of its own, ``checkpoint`` in its repository, that cannot log."""
    repository = tmp_path_factory.mktemp("scratch")
    shutil.copytree(served_checkpoint, repository / "llm" / "checkpoint")
    write_repository(repository, Path("checkpoint"), KNOBS, instances=1)
    with TritonServer(repository, EXPLICIT, log=Path("/dev/full")) as running:
        running.wait_ready()
        yield running


def test_with_a_full_disk_for_its_log_a_server_serves(
    scratch: TritonServer, reference: Reference
) -> None:
    assert "Expected" in error_of(infer_grpc, scratch, text_input="a", max_tokens=0)[1]
    [engine] = engines(scratch)
    engine.kill()
    wait_until(lambda: metric(scratch, "fi_runtime:engine_up") == 0, 5, "its death is noticed")
    assert_as_before(scratch, reference)


def test_a_checkpoint_replaced_by_garbage_is_refused_and_mended(
    scratch: TritonServer, reference: Reference
) -> None:
    folder = Path(scratch.options["model-repository"]) / STREAMED / "checkpoint"
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    with contextlib.closing(grpc_client(scratch)) as client:
        # A new file: what is mapped into the running engine stays as it is.
        weights.unlink()
        weights.write_bytes(random.Random(1).randbytes(len(good)))
        inputs = {"text_input": "on", "max_tokens": 9, "temperature": 0.0}
        assert joined(stream(scratch, **inputs)) == reference.text("on", 9)
        for door in (UNARY, STREAMED):
            client.unload_model(door)
        wait_until(lambda: scratch.started() == [scratch.pid], 15, "both doors have ended")
        assert "model.safetensors" in error_of(client.load_model, UNARY)[1]
        assert client.is_server_live()
        assert scratch.started() == [scratch.pid], "nothing stays of what could not be loaded"
        weights.write_bytes(good)
        for door in (UNARY, STREAMED):
            client.load_model(door)
    assert_as_before(scratch, reference)


SMALL_MEMORY = """#!/bin/sh
exec unshare --mount sh -c 'mount -t tmpfs -o size=24m tmpfs /dev/shm && exec "$@"' - {program} "$@"
"""
"""tritonserver with a /dev/shm of its own"""


def may_mount() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_mount(), reason="may not mount a /dev/shm of its own")
def test_a_full_dev_shm_fails_what_needs_it_and_nothing_after(
    reference: Reference,
    served_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = tmp_path / "tritonserver"
    program.write_text(SMALL_MEMORY.format(program=serve.find_program("tritonserver")))
    program.chmod(0o755)
    monkeypatch.setattr(serve, "find_program", lambda name: str(program))
    repository = write_repository(tmp_path / "repository", served_checkpoint, KNOBS, instances=1)
    with TritonServer(repository, log=tmp_path / "log") as server:
        server.wait_ready()
        filler = Path(f"/proc/{server.pid}/root/dev/shm/filler")
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        # More than a front end's memory has room for, and what fits it.
        big = {"text_input": "x" * 3_000_000, "max_tokens": 3}
        ends = [error_of(infer_grpc, server, **big)[1] for _ in range(3)]
        assert all("shared memory" in end for end in ends)
        small = {"text_input": "small", "max_tokens": 9, "temperature": 0.0}
        # More than a megabyte, with the log-probabilities of 20 tokens for each.
        knobs = '{"n": 4, "max_tokens": 250, "temperature": 0, "logprobs": 20}'
        wide = {"text_input": "wide", "sampling_parameters": knobs, "return_logprobs": True}
        with ThreadPoolExecutor(BATCH) as pool:
            calls = [pool.submit(infer_grpc, server, **small) for _ in range(BATCH)]
            wides = [pool.submit(error_of, infer_grpc, server, **wide) for _ in range(2)]
            wides += [pool.submit(error_of, stream, server, **wide, stream=False) for _ in range(2)]
            for call in calls:
                with contextlib.suppress(InferenceServerException):
                    assert call.result().text == "small" + reference.text("small", 9)
            assert all("shared memory" in wide_call.result()[1] for wide_call in wides)
        filler.unlink()
        assert_as_before(server, reference)
        assert infer_grpc(server, **small).text == "small" + reference.text("small", 9)
        assert infer_grpc(server, **wide).outputs["text_output"].shape == (1, 4)


# Clocks


WALL_CLOCK = {"time.time", "time.time_ns", "time.localtime", "datetime.now", "datetime.utcnow"}


def test_no_code_of_a_server_asks_the_wall_clock() -> None:
    """The front ends' half of the next test: they run inside Triton's own process."""
    files = sorted((serve.ROOT / "fi_runtime").rglob("*.py"))
    asked = [
        f"{path.name}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL_CLOCK
    ]
    assert len(files) > 50
    assert asked == []


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler to build a clock that jumps with")
def test_an_engine_whose_clock_jumps_goes_on(
    reference: Reference, served_checkpoint: Path, tmp_path: Path
) -> None:
    """Days ahead and years back, under load, and while another engine is started."""
    library, offset = tmp_path / "clock_jumps.so", tmp_path / "offset"
    source = Path(__file__).with_name("clock_jumps.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    offset.write_bytes(bytes(8))

    def jump(days: int) -> None:
        with offset.open("r+b", buffering=0) as file:  # in place, since it is mapped
            file.write(struct.pack("l", days * 86_400))

    env = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}
    repository = write_repository(tmp_path / "repository", served_checkpoint, KNOBS, instances=1)
    prompts = [f"clock {i}" for i in range(4)]
    expected = [reference.text(prompt, 600) for prompt in prompts]
    with TritonServer(repository, log=tmp_path / "log", env=env) as server:
        server.wait_ready()
        [engine] = engines(server)
        with contextlib.ExitStack() as stack:
            opened = [
                stack.enter_context(Stream(server, text_input=prompt, stream=True, **LONG))
                for prompt in prompts
            ]
            texts = [one.next().text for one in opened]
            for days in (3, -700, 30_000, 0, -1):
                jump(days)
                time.sleep(0.1)
            answers = [text + joined(list(rest)) for text, rest in zip(texts, opened, strict=True)]
        assert answers == expected
        assert engines(server) == [engine], "nobody took it for one that hangs"
        jump(30_000)
        engine.kill()
        wait_until(lambda: metric(server, "fi_runtime:engine_up") == 0, 5, "its death is noticed")
        wait_until(lambda: is_free(server), AGAIN_S, "another one is there")
        jump(-30_000)
        assert_as_before(server, reference)
        there = time.gmtime(time.time() + 30_000 * 86_400).tm_year
        assert f"{there}-" in (tmp_path / "log").read_text(), "its clock did jump"
