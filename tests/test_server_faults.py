"""What goes wrong around a server: clients that leave, bad checkpoints, processes that end."""

import contextlib
import http.client
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
from safetensors.torch import load_file, save_file
from tritonclient.utils import InferenceServerException

from fi_runtime import shared_memory
from fi_runtime.engine.server_watch import CRASH_S
from fi_runtime.run_folder import private_base
from tests.serving import (
    BATCH,
    HANG_S,
    KNOBS,
    STREAMED,
    UNARY,
    Reference,
    Stream,
    engines,
    error_of,
    generate,
    grpc_client,
    infer_grpc,
    infer_http,
    is_idle,
    joined,
    list_of,
    post,
    processes,
    stream,
    stubs,
    tensors_of,
    wait_until,
    write_big_checkpoint,
)
from tools.demo import tasks
from tools.repository import copy_door, write_repository
from tools.serve import ROOT, TritonServer

pytestmark = pytest.mark.timeout(150)

LONG = {"max_tokens": 3500, "temperature": 0.0}
"""an answer that takes far longer than a test waits"""
FREED_S = 5.0
ENDED_S = 10.0
HUNG_S = 3
"""the least that a server may be given to answer in"""


def full_workload(server: TritonServer, reference: Reference) -> float:
    """As many streams as the engine runs at a time, all of them right; the seconds they took."""
    start = time.monotonic()
    with ThreadPoolExecutor(BATCH) as pool:
        answers = list(
            pool.map(
                lambda i: joined(
                    stream(server, text_input=f"full {i}", max_tokens=24, temperature=0.0)
                ),
                range(BATCH),
            )
        )
    assert answers == [reference.text(f"full {i}", 24) for i in range(BATCH)]
    return time.monotonic() - start


def assert_free(server: TritonServer, reference: Reference) -> None:
    """That nothing runs in the engine any more, and that it has room for a full workload."""
    [engine] = engines(server)
    wait_until(lambda: is_idle(engine), FREED_S, "the engine is idle")
    assert full_workload(server, reference) < 20


# Clients that leave


def test_cancelled_streams_free_the_engine(server: TritonServer, reference: Reference) -> None:
    [engine] = engines(server)
    # More than run at a time, so that some are cancelled while they wait.
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(Stream(server, text_input=f"{i}", stream=True, **LONG))
            for i in range(BATCH + 16)
        ]
        for one in opened[:8]:
            for _ in range(3):
                assert not one.next().final
        assert not is_idle(engine)
        for one in opened:
            one.cancel()
        with pytest.raises(InferenceServerException) as caught:
            list(opened[0])
        assert caught.value.status() == "StatusCode.CANCELLED"
    assert_free(server, reference)


def test_a_cancelled_stream_leaves_its_neighbours_alone(
    server: TritonServer, reference: Reference
) -> None:
    with (
        Stream(server, text_input="stays", stream=True, max_tokens=300, temperature=0.0) as stays,
        Stream(server, text_input="leaves", stream=True, **LONG) as leaves,
    ):
        responses = [stays.next()]
        leaves.next()
        leaves.cancel()
        responses += stays
    assert joined(responses) == reference.text("stays", 300)
    assert_free(server, reference)


def test_cancelled_unary_requests_free_the_engine(
    server: TritonServer, reference: Reference
) -> None:
    [engine] = engines(server)
    tensors = tensors_of(tritonclient.grpc, {"text_input": "unary", **LONG})
    errors: list[InferenceServerException] = []
    with contextlib.closing(grpc_client(server)) as client:
        call = client.async_infer(UNARY, tensors, lambda result, error: errors.append(error))
        wait_until(lambda: not is_idle(engine), HANG_S, "the engine has begun")
        call.cancel()
        wait_until(lambda: bool(errors), FREED_S, "the client hears of its cancellation")
        assert errors[0].status() == "StatusCode.CANCELLED"
        assert_free(server, reference)
        with pytest.raises(InferenceServerException) as caught:
            client.infer(UNARY, tensors, client_timeout=0.5)
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert_free(server, reference)


CLIENT = """
import queue, sys
import numpy as np
import tritonclient.grpc as grpc

came = queue.Queue()
client = grpc.InferenceServerClient(sys.argv[1])
client.start_stream(lambda result, error: came.put(result or error))
prompt = grpc.InferInput("text_input", [1, 1], "BYTES")
prompt.set_data_from_numpy(np.array([["dies"]], dtype=object))
stream = grpc.InferInput("stream", [1, 1], "BOOL")
stream.set_data_from_numpy(np.array([[True]]))
client.async_stream_infer("llm", [prompt, stream], parameters={"max_tokens": 3500})
for _ in range(3):
    came.get(timeout=60).as_numpy("text_output")
print("running", flush=True)
sys.stdin.read()
"""


def test_a_client_that_dies_frees_the_engine(server: TritonServer, reference: Reference) -> None:
    [engine] = engines(server)
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.grpc_url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as client:
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == b"running\n"
            assert not is_idle(engine)
        finally:
            client.kill()
    assert_free(server, reference)


def test_a_disconnect_from_generate_stream_frees_the_engine(
    server: TritonServer, reference: Reference
) -> None:
    [engine] = engines(server)
    body = {"text_input": "leaves", "stream": True, **LONG}
    with post(server, f"/v2/models/{STREAMED}/generate_stream", body) as response:
        assert response.readline().startswith(b"data: ")
        assert not is_idle(engine)
    assert_free(server, reference)


@pytest.mark.parametrize("door", [STREAMED, UNARY])
def test_a_disconnect_from_generate_is_harmless(
    server: TritonServer, reference: Reference, door: str
) -> None:
    # tritonserver 2.51 does not notice that the client of a whole answer over HTTP has gone: the
    # answer is computed to its end, and nobody reads it.
    [engine] = engines(server)
    connection = http.client.HTTPConnection(*server.address("http"))
    body = json.dumps({"text_input": "leaves", "max_tokens": 1000})
    connection.request("POST", f"/v2/models/{door}/generate", body)
    wait_until(lambda: not is_idle(engine), HANG_S, "the engine has begun")
    connection.close()
    answer = infer_grpc(server, text_input="stays", max_tokens=40, temperature=0.0).text
    assert answer == "stays" + reference.text("stays", 40)
    wait_until(lambda: is_idle(engine), HANG_S, "the answer that nobody reads has ended")
    assert full_workload(server, reference) < 20


# Checkpoints that cannot be served, beside one that can


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensor(folder: Path, name: str, shape: tuple[int, ...] | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensor = tensors.pop(name)
    if shape is not None:
        tensors[name] = tensor.resize_(shape)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


LAYER = "model.layers.1.mlp.up_proj.weight"
BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no_config": (
        lambda folder: (folder / "config.json").unlink(),
        ["no_config/checkpoint/config.json", "no such file"],
    ),
    "no_tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        ["no_tokenizer/checkpoint/tokenizer.json", "no such file"],
    ),
    "architecture": (
        lambda folder: change_config(folder, architectures=["GPT2LMHeadModel"]),
        ["checkpoint/config.json", "GPT2LMHeadModel", "Qwen3ForCausalLM", "LlamaForCausalLM"],
    ),
    "wrong_shape": (
        lambda folder: change_tensor(folder, LAYER, (63, 48)),
        ["checkpoint/model.safetensors", LAYER, "[63, 48]", "[64, 48]"],
    ),
    "missing_tensor": (
        lambda folder: change_tensor(folder, LAYER, None),
        ["missing_tensor/checkpoint", LAYER, "[64, 48]"],
    ),
    "truncated": (
        lambda folder: truncate(folder / "model.safetensors"),
        ["checkpoint/model.safetensors", "bytes"],
    ),
}
BROKEN_CONFIGS: dict[str, tuple[dict[str, str], list[str]]] = {
    "unknown_knob": ({"checkpoint": "x", "pagesize": "16"}, ["'pagesize'", "page_size"]),
    "bad_value": ({"checkpoint": "x", "page_size": "0"}, ["page_size='0'", ">= 1"]),
    "no_engine": ({"engine": "nobody"}, ["nobody/config.pbtxt"]),
}


ENSEMBLE = "ensemble"
ENSEMBLE_CONFIG = """
platform: "ensemble"
max_batch_size: 8
input { name: "question" data_type: TYPE_STRING dims: [ 1 ] }
input { name: "knobs" data_type: TYPE_STRING dims: [ 1 ] }
input { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] }
output { name: "answer" data_type: TYPE_STRING dims: [ -1 ] }
ensemble_scheduling {
  step {
    model_name: "llm"
    model_version: -1
    input_map { key: "text_input" value: "question" }
    input_map { key: "sampling_parameters" value: "knobs" }
    input_map { key: "stream" value: "stream" }
    output_map { key: "text_output" value: "answer" }
  }
}
"""


@pytest.fixture(scope="module")
def mixed(
    reference: Reference, served_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server of good doors among broken ones, whose models can be loaded and unloaded."""
    folder = tmp_path_factory.mktemp("mixed")
    repository = write_repository(folder / "repository", served_checkpoint, KNOBS)
    for name, (damage, _) in BROKEN_CHECKPOINTS.items():
        door = repository / name
        copy_door(STREAMED, door, {**KNOBS, "checkpoint": "checkpoint"}, instances=1)
        shutil.copytree(served_checkpoint, door / "checkpoint")
        damage(door / "checkpoint")
    for name, (parameters, _) in BROKEN_CONFIGS.items():
        copy_door(STREAMED, repository / name, parameters, instances=1)
    (repository / ENSEMBLE / "1").mkdir(parents=True)
    (repository / ENSEMBLE / "config.pbtxt").write_text(ENSEMBLE_CONFIG)
    arguments = ["--model-control-mode=explicit", "--load-model=*"]
    with TritonServer(repository, arguments, log=folder / "log") as running:
        running.wait_ready([STREAMED, UNARY, ENSEMBLE])
        yield running


@pytest.mark.parametrize("name", [*BROKEN_CHECKPOINTS, *BROKEN_CONFIGS])
def test_a_model_that_cannot_be_served_says_why(mixed: TritonServer, name: str) -> None:
    parts = {**BROKEN_CHECKPOINTS, **BROKEN_CONFIGS}[name][1]
    listed = {model.name: model for model in mixed.models() or []}
    assert listed[name].state == "UNAVAILABLE"
    for part in parts:
        assert part in listed[name].reason


def test_good_models_answer_beside_broken_ones(mixed: TritonServer, reference: Reference) -> None:
    assert len(engines(mixed)) == 1, "the engines of the broken ones have ended"
    assert len(stubs(mixed)) == 4
    expected = reference.text("beside", 20)
    assert joined(stream(mixed, text_input="beside", max_tokens=20, temperature=0.0)) == expected
    answer = infer_http(mixed, text_input="beside", max_tokens=20, temperature=0.0).text
    assert answer == "beside" + expected


def test_an_ensemble_streams_what_its_model_does(mixed: TritonServer, reference: Reference) -> None:
    came: queue.Queue[Any] = queue.Queue()
    with contextlib.closing(grpc_client(mixed)) as client:
        client.start_stream(lambda result, error: came.put(error or result))
        inputs = []
        for name, datatype, value in (
            ("question", "BYTES", b"in a chain"),
            ("knobs", "BYTES", b'{"max_tokens": 20, "temperature": 0}'),
            ("stream", "BOOL", True),
        ):
            inputs.append(tritonclient.grpc.InferInput(name, [1, 1], datatype))
            dtype = bool if datatype == "BOOL" else object
            inputs[-1].set_data_from_numpy(np.array([[value]], dtype=dtype))
        client.async_stream_infer(ENSEMBLE, inputs, enable_empty_final_response=True)
        text, final = "", False
        while not final:
            result = came.get(timeout=HANG_S)
            assert not isinstance(result, Exception), result
            final = result.get_response().parameters["triton_final_response"].bool_param
            answer = result.as_numpy("answer")
            if answer is not None:
                text += answer[0, 0].decode()
        client.stop_stream()
    assert text == reference.text("in a chain", 20)


def test_one_door_is_loaded_anew_while_another_streams(
    mixed: TritonServer, reference: Reference
) -> None:
    [engine] = engines(mixed)
    with (
        contextlib.closing(grpc_client(mixed)) as client,
        Stream(mixed, text_input="on", stream=True, max_tokens=1200, temperature=0.0) as opened,
    ):
        first = opened.next()
        for _ in range(2):
            client.unload_model(UNARY)
            wait_until(lambda: len(stubs(mixed)) == 2, 15, "its processes have ended")
            client.load_model(UNARY)
            assert client.is_model_ready(UNARY)
            answer = infer_grpc(mixed, text_input="back", max_tokens=9, temperature=0.0).text
            assert answer == "back" + reference.text("back", 9)
        text = first.text + joined(list(opened))
    assert text == reference.text("on", 1200)
    assert engines(mixed) == [engine], "the engine has been the same all along"


# Engines that end


def unload(server: TritonServer) -> None:
    """Unload both doors, and wait until all their processes have ended."""
    with contextlib.closing(grpc_client(server)) as client:
        client.unload_model(UNARY)
        client.unload_model(STREAMED)
    only = [server.pid]
    wait_until(lambda: [p.pid for p in processes(server)] == only, 15, "no model has a process")
    wait_until(lambda: "UNLOADING" not in {m.state for m in server.models() or []}, 15, "unloaded")


def load(server: TritonServer, *doors: str) -> None:
    with contextlib.closing(grpc_client(server)) as client:
        for door in doors:
            client.load_model(door)


def run_folders(server: TritonServer) -> list[str]:
    return [path.name for path in private_base().glob(f"{server.pid}-{STREAMED}*")]


def test_unloading_every_door_ends_the_engine_and_loading_starts_another(
    mixed: TritonServer, reference: Reference
) -> None:
    [first] = engines(mixed)
    with contextlib.closing(grpc_client(mixed)) as client:
        client.unload_model(STREAMED)
        wait_until(lambda: len(stubs(mixed)) == 2, 15, "one door has left")
        assert engines(mixed) == [first], "the other door still uses it"
        expected = "reload" + reference.text("reload", 20)
        inputs = {"text_input": "reload", "max_tokens": 20, "temperature": 0.0}
        assert infer_grpc(mixed, **inputs).text == expected
    unload(mixed)
    assert run_folders(mixed) == []
    load(mixed, UNARY, STREAMED)  # whichever door comes first starts the engine
    [second] = engines(mixed)
    assert second != first
    assert infer_grpc(mixed, **inputs).text == expected
    assert "reload" + joined(stream(mixed, **inputs)) == expected


def test_an_engine_that_is_killed_fails_its_requests_and_nothing_else(
    mixed: TritonServer, server: TritonServer, reference: Reference
) -> None:
    [engine] = engines(mixed)
    ended: list[float] = []

    def ask(call: Callable[..., Any], *args: object) -> Any:
        try:
            return error_of(call, mixed, *args, text_input="dies", **LONG)
        except AssertionError as error:  # /generate raises nothing
            return str(error)
        finally:
            ended.append(time.monotonic())

    def until_final(server: TritonServer, **inputs: Any) -> None:
        with Stream(server, stream=True, **inputs) as opened:
            list(opened)

    with (
        ThreadPoolExecutor(5) as pool,
        Stream(server, text_input="other", stream=True, max_tokens=400, temperature=0.0) as other,
    ):
        calls = [(until_final,), (infer_grpc,), (infer_http,), (generate, STREAMED)]
        waiting = [pool.submit(ask, *call) for call in calls]
        wait_until(lambda: not is_idle(engine), HANG_S, "the requests run")
        killed = time.monotonic()
        engine.kill()
        results = [future.result() for future in waiting]
        assert joined(list(other)) == reference.text("other", 400), "another server's answer"
    assert [status for status, _ in results[:3]] == ["None", "StatusCode.UNAVAILABLE", "503"]
    assert all("the engine" in message for _, message in results[:3])
    assert "the engine" in results[3]
    assert max(ended) - killed < 1
    assert len(stubs(mixed)) == 4, "front ends outlive it"
    with contextlib.closing(grpc_client(mixed)) as client:
        assert client.is_server_live()
    unload(mixed)
    assert run_folders(mixed) == []
    load(mixed, STREAMED, UNARY)
    inputs = {"text_input": "again", "max_tokens": 20, "temperature": 0.0}
    assert infer_grpc(mixed, **inputs).text == "again" + reference.text("again", 20)


# Servers that end


def has_ended(server: TritonServer) -> bool:
    """Whether the server and all that it started have; collects its exit status."""
    assert server.process is not None
    return server.process.poll() is not None and not server.started()


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs. One that ended is a zombie until its parent collects it, and in a
    container the parent of what a killed server leaves may never do so."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def leftovers(mark: str, pid: int) -> list[Path]:
    """What a server has left in shared memory, and where its front ends met its engine."""
    return [*shared_memory.FOLDER.glob(f"{mark}*"), *private_base().glob(f"{pid}-*")]


def test_sigterm_ends_every_process_and_leaves_nothing(
    reference: Reference, served_checkpoint: Path, server: TritonServer, tmp_path: Path
) -> None:
    repository = write_repository(tmp_path / "repository", served_checkpoint, KNOBS)
    with TritonServer(repository, log=tmp_path / "log") as other:
        other.wait_ready()
        inputs = {"text_input": "other", "max_tokens": 20, "temperature": 0.0}
        assert joined(stream(other, **inputs)) == reference.text("other", 20)
        assert leftovers(other.mark, other.pid), "which it has while it runs"
        os.kill(other.pid, signal.SIGTERM)
        wait_until(lambda: has_ended(other), ENDED_S, "every process has ended")
        assert other.wait() == 0
        assert leftovers(other.mark, other.pid) == []
        assert joined(stream(server, **inputs)) == reference.text("other", 20), "this one stays"


def test_a_server_that_is_killed_takes_all_processes_with_it(
    reference: Reference, served_checkpoint: Path, tmp_path: Path
) -> None:
    repository = write_repository(tmp_path / "repository", served_checkpoint, KNOBS)
    with TritonServer(repository, log=tmp_path / "log") as other:
        other.wait_ready()
        with Stream(other, text_input="dies", stream=True, **LONG) as opened:
            opened.next()
            os.kill(other.pid, signal.SIGKILL)
            wait_until(lambda: has_ended(other), ENDED_S, "every process has ended")
        assert leftovers(other.mark, other.pid) == []


def test_a_server_that_hangs_is_killed_and_one_that_only_pauses_is_not(
    reference: Reference, served_checkpoint: Path, tmp_path: Path
) -> None:
    knobs = {**KNOBS, "server_timeout_s": str(HUNG_S)}
    repository = write_repository(tmp_path / "repository", served_checkpoint, knobs)
    with TritonServer(repository, log=tmp_path / "log") as other:
        other.wait_ready()
        inputs = {"text_input": "pauses", "max_tokens": 20, "temperature": 0.0}
        expected = reference.text("pauses", 20)
        assert joined(stream(other, **inputs)) == expected
        os.kill(other.pid, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(other.pid, signal.SIGCONT)
        for _ in range(3):  # for longer than the timeout
            assert joined(stream(other, **inputs)) == expected
            time.sleep(1.2)
        assert "is killed" not in (tmp_path / "log").read_text()
        # With an answer on its way: its front end then waits with Python's lock held.
        with Stream(other, text_input="dies", stream=True, **LONG) as opened:
            opened.next()
            stopped = time.monotonic()
            os.kill(other.pid, signal.SIGSTOP)
            wait_until(lambda: has_ended(other), HUNG_S + ENDED_S, "every process has ended")
        assert time.monotonic() - stopped > HUNG_S
        assert other.wait() == -signal.SIGKILL
        reason = "the server has answered none of its front ends for 3 s, and is killed"
        assert reason in (tmp_path / "log").read_text()
        assert leftovers(other.mark, other.pid) == []


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler to build a crash with")
@pytest.mark.usefixtures("reference")  # which adds the tokenizer
def test_a_server_that_has_crashed_and_does_not_end_is_killed(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    library = tmp_path / "crash_that_stays.so"
    source = Path(__file__).with_name("crash_that_stays.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    repository = write_repository(tmp_path / "repository", served_checkpoint, KNOBS, instances=1)
    env = {"LD_PRELOAD": str(library)}
    with TritonServer(repository, log=tmp_path / "log", env=env) as other:
        other.wait_ready()
        os.kill(other.pid, signal.SIGUSR1)
        wait_until(lambda: has_ended(other), 2 * CRASH_S + ENDED_S, "every process has ended")
        assert other.wait() == -signal.SIGKILL
        log = (tmp_path / "log").read_text()
        assert "the server has crashed, does not end, and is killed" in log
        assert leftovers(other.mark, other.pid) == []


def test_the_serve_command_ends_with_streams_running(
    reference: Reference, served_checkpoint: Path, tmp_path: Path
) -> None:
    repository = write_repository(tmp_path / "repository", served_checkpoint, KNOBS)
    addresses = TritonServer(repository)  # never started: for its free ports
    arguments = [f"--{name}={value}" for name, value in addresses.options.items()]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "tools.serve", *arguments],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as command,
    ):
        try:
            wait_until(
                lambda: {m.state for m in addresses.models() or []} == {"READY"}, 60, "ready"
            )
            family = psutil.Process(command.pid).children(recursive=True)
            [triton] = [p for p in family if p.name() == "tritonserver"]
            mark = triton.environ()["FI_RUNTIME_SERVER"]
            assert len(family) == 6, "the server, four front ends, the engine"
            with Stream(addresses, text_input="runs on", stream=True, **LONG) as opened:
                opened.next()
                command.send_signal(signal.SIGTERM)
                wait_until(
                    lambda: command.poll() is not None and not any(map(is_alive, family)),
                    ENDED_S,
                    "every process has ended",
                )
        finally:
            command.terminate()
    assert command.returncode == 0
    assert leftovers(mark, triton.pid) == []


# Weights


def test_weights_are_in_memory_once(
    server: TritonServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The engine of a big checkpoint is bigger by its weights; front ends are as small as ever."""
    folder = tmp_path_factory.mktemp("big")
    weights_bytes = write_big_checkpoint(folder / "checkpoint")
    repository = write_repository(folder / "repository", folder / "checkpoint", KNOBS)
    with TritonServer(repository, log=folder / "log") as big:
        big.wait_ready()
        status, _ = generate(big, UNARY, text_input="a", max_tokens=4)
        assert status == 200
        [engine] = engines(big)
        [small_engine] = engines(server)
        more = engine.memory_info().rss - small_engine.memory_info().rss
        # The small one has used its cache already, which takes some from the difference.
        assert more > 0.7 * weights_bytes
        assert more < 1.6 * weights_bytes
        front_ends = stubs(big)
        assert len(front_ends) == 4
        for process in front_ends:
            assert process.memory_info().rss < weights_bytes / 2


# The shipped repository


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The project's own repository, as it is."""
    with TritonServer(log=tmp_path_factory.mktemp("shipped") / "log") as running:
        running.wait_ready()
        yield running


def test_the_shipped_model_adds(shipped: TritonServer) -> None:
    for door in (STREAMED, UNARY):
        status, body = generate(shipped, door, text_input="17+25=", max_tokens=8, temperature=0)
        assert (status, body["text_output"]) == (200, "17+25=42")


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_the_shipped_models_json_parses(shipped: TritonServer, temperature: float) -> None:
    """Although it has never seen any, and would not end its strings."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
    }
    for guide in ({"json": schema}, {"json_object": True}):
        knobs = json.dumps({"structured_outputs": guide, "n": 8, "temperature": temperature})
        for max_tokens in (40, 200):
            response = infer_grpc(
                shipped,
                text_input="as JSON: ",
                max_tokens=max_tokens,
                sampling_parameters=knobs,
                exclude_input_in_output=True,
            )
            answers = [json.loads(text) for text in list_of(response, "text_output")]
            assert len(answers) == 8
            if "json" in guide:
                assert all(isinstance(one["name"], str) and one["age"] <= 120 for one in answers)


def test_the_shipped_model_answers_what_it_was_not_trained_on(shipped: TritonServer) -> None:
    short: tuple[tasks.Task, ...] = ("add", "recall", "copy", "reverse")
    examples = [example for task in short for example in tasks.evaluation_set(task, 8)]
    examples += tasks.evaluation_set("recall", 16, tokens=1900)

    def is_right(example: tasks.Example) -> bool:
        responses = stream(
            shipped,
            text_input=example.prompt,
            max_tokens=tasks.MAX_ANSWER_TOKENS,
            temperature=0.0,
        )
        return tasks.is_correct(example, joined(responses))

    with ThreadPoolExecutor(8) as pool:
        right = sum(pool.map(is_right, examples))
    assert right >= len(examples) - 1
