"""The checks of docs/SECURITY.md that no other test makes."""

import ast
import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
import tritonclient.grpc
import zmq
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from fi_runtime.config import ConfigError
from fi_runtime.messages import (
    NOT_A_MESSAGE,
    Abort,
    AsksServer,
    Attach,
    Attached,
    Detach,
    EngineInfo,
    Generate,
    Output,
    SamplingParams,
    Step,
    decode_from_engine,
    decode_from_front_end,
    encode,
)
from fi_runtime.run_folder import RunFolder, private_base
from tests.serving import (
    HANG_S,
    KNOBS,
    STREAMED,
    Reference,
    engines,
    error_of,
    generate,
    grpc_client,
    infer_grpc,
    joined,
    processes,
    stream,
    wait_until,
)
from tools.repository import write_repository
from tools.serve import ROOT, TritonServer

# Who can reach an engine


def test_only_its_user_reaches_an_engine(server: TritonServer) -> None:
    folder = RunFolder.of(server.pid, STREAMED).path
    for path in (private_base(), folder):
        info = path.lstat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o700, os.getuid())
    assert sum(path.is_socket() for path in folder.iterdir()) == 2
    listening = {
        (one.laddr.ip.removeprefix("::ffff:"), one.laddr.port)
        for process in processes(server)
        for one in process.net_connections()
        if one.status == psutil.CONN_LISTEN
    }
    assert listening == {server.address(name) for name in ("http", "grpc", "metrics")}


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o707])
def test_a_folder_that_others_can_use_is_refused(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    base = private_base()
    base.chmod(mode)
    with pytest.raises(ConfigError, match="only user"):
        private_base()
    base.rmdir()
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    base.symlink_to(other)
    with pytest.raises(ConfigError, match="only user"):
        private_base()


# What they say to each other

PARAMS = SamplingParams(max_tokens=1, seed=1)
FROM_FRONT_END = [
    Attach(b"a", 1),
    Detach(b"a"),
    Abort(b"a", 1),
    Generate(b"a", 1, [5], PARAMS),
    AsksServer(b"a"),
]
FROM_ENGINE = [
    Attached(EngineInfo(1, 10, 10, "t")),
    Step([Output(1, [2], None, "stop")], 1),
    Step([], requests=b"\1" + bytes(7), tokens=b"\2" + bytes(7)),
]
BREAKS: list[Callable[[dict[str, object]], dict[str, object]]] = [
    lambda message: {**message, "type": "Exec"},
    lambda message: {key: value for key, value in message.items() if key == "type"},
    lambda message: {key: "x" if key != "type" else value for key, value in message.items()},
    lambda message: {key: -1 if key != "type" else value for key, value in message.items()},
]


@pytest.mark.parametrize("change", BREAKS, ids=["kind", "nothing else", "texts", "negative"])
def test_each_side_refuses_what_is_no_message(
    change: Callable[[dict[str, object]], dict[str, object]],
) -> None:
    for messages, decode in (
        (FROM_FRONT_END, decode_from_front_end),
        (FROM_ENGINE, decode_from_engine),
    ):
        for message in messages:
            assert decode(encode(message)) == message
            broken = change(msgspec.msgpack.decode(encode(message)))
            with pytest.raises(msgspec.MsgspecError):
                decode(encode(broken))


@pytest.mark.parametrize(
    ("requests", "tokens"),
    [
        (bytes(8), b""),
        (bytes(7), bytes(7)),
        (bytes(8), b"\xff" * 8),
        (b"\xff" * 8, bytes(8)),
        (bytes(8), bytes(4) + b"\1" + bytes(3)),
    ],
    ids=["one missing", "half a number", "negative token", "negative request", "no token"],
)
def test_columns_of_a_step_have_to_be_some(requests: bytes, tokens: bytes) -> None:
    empty = msgspec.msgpack.decode(encode(Step([])))
    assert decode_from_engine(encode({**empty, "requests": bytes(8), "tokens": bytes(8)}))
    with pytest.raises(msgspec.ValidationError, match=r"requests|tokens"):
        decode_from_engine(encode({**empty, "requests": requests, "tokens": tokens}))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for decode in (decode_from_front_end, decode_from_engine):
        with contextlib.suppress(*NOT_A_MESSAGE):
            decode(data)


def test_an_engine_ignores_what_is_no_message(server: TritonServer, reference: Reference) -> None:
    """Nor does it do anything for a front end that it does not know."""
    [engine] = engines(server)
    long = SamplingParams(max_tokens=3000, seed=1, guide="a text")
    from_nobody = encode(Generate(b"nobody", 0, [1], long))
    abort = encode(Abort(b"nobody", 0))
    messages = [
        b"",
        b"garbage",
        encode(7),
        from_nobody,
        from_nobody.replace(b"a text", b"\xff" * 6),
        # With one more key, whose value is nested far too deeply.
        bytes([abort[0] + 1]) + abort[1:] + b"\xa1x" + b"\x91" * 100_000,
        *(encode(Attach(b"nobody", pid)) for pid in (-1, 0, 1 << 40)),
    ]
    with zmq.Context() as context, context.socket(zmq.PUSH) as pushed:
        pushed.connect(RunFolder.of(server.pid, STREAMED).requests)
        for message in messages:
            pushed.send(message)
        pushed.send_multipart([b"two", b"frames"])
        answer = stream(server, text_input="after", max_tokens=9, temperature=0.0)
        assert joined(answer) == reference.text("after", 9)
    assert engines(server) == [engine], "it did not die of any"


# What a request can make a server do

FORBIDDEN_IMPORTS = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "importlib.util",
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "torch.load", "yaml.load", "np.load", "numpy.load"),
    *("recv_pyobj", "send_pyobj"),
}


def calls_and_imports(source: str) -> set[str]:
    """Names that a module imports and calls; methods by their own name, too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found |= {name, name.rpartition(".")[2]} if name.endswith("_pyobj") else {name}
            if any(one.arg == "shell" for one in node.keywords):
                found.add("shell=")
    return found


def test_nothing_that_serves_unpickles_or_evaluates() -> None:
    forbidden = FORBIDDEN_IMPORTS | FORBIDDEN_CALLS | {"shell="}
    files = [
        path
        for folder in ("fi_runtime", "client", "model_repository")
        for path in (ROOT / folder).rglob("*.py")
    ]
    found = {path.name: calls_and_imports(path.read_text()) & forbidden for path in files}
    assert {name: bad for name, bad in found.items() if bad} == {}
    assert len(files) > 50
    bad = "import pickle\nx = eval('1')\nsocket.recv_pyobj()\nrun('a', shell=True)"
    assert calls_and_imports(bad) & forbidden == {"pickle", "eval", "recv_pyobj", "shell="}


@pytest.mark.parametrize("name", ["../llm", "/etc/passwd", "demo_checkpoint", "a\x00b"])
def test_a_request_names_no_file(server: TritonServer, name: str) -> None:
    knobs = json.dumps({"lora_name": name})
    status, message = error_of(infer_grpc, server, text_input="a", sampling_parameters=knobs)
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "lora_name" in message


@pytest.mark.parametrize("key", ["checkpoint", "chat_template", "logits_processor", "engine"])
def test_a_request_brings_no_code_or_configuration(server: TritonServer, key: str) -> None:
    knobs = json.dumps({key: "{{ 1 }}"})
    status, message = error_of(infer_grpc, server, text_input="a", sampling_parameters=knobs)
    assert status in ("StatusCode.INVALID_ARGUMENT", "StatusCode.UNIMPLEMENTED")
    assert key in message


def test_a_schema_fetches_nothing(server: TritonServer, tmp_path: Path) -> None:
    secret = tmp_path / "schema.json"
    secret.write_text('{"const": "secret"}')
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        port = listener.getsockname()[1]
        for target in (f"http://127.0.0.1:{port}/schema.json", secret.as_uri()):
            knobs = json.dumps({"structured_outputs": {"json": {"$ref": target}}})
            status, answer = generate(
                server, "llm_unary", text_input="a", sampling_parameters=knobs, max_tokens=30
            )
            assert (status, "secret" in str(answer)) == (400, False)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_guide_is_bounded_in_time(server: TritonServer, reference: Reference) -> None:
    """A small one that would take for ever is refused, and the server goes on."""
    rules = "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60))
    knobs = json.dumps({"structured_outputs": {"grammar": f'start: A0\n{rules}A60: "x"'}})
    begin = time.monotonic()
    status, _ = error_of(infer_grpc, server, text_input="a", sampling_parameters=knobs)
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert time.monotonic() - begin < 10
    answer = stream(server, text_input="goes on", max_tokens=9, temperature=0.0)
    assert joined(answer) == reference.text("goes on", 9)


# Triton's own endpoints

CLOSED = [
    ("GET", "/v2/systemsharedmemory/status"),
    ("GET", "/v2/cudasharedmemory/status"),
    ("POST", "/v2/systemsharedmemory/region/mine/register"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
    ("GET", "/v2/trace/setting"),
    ("POST", f"/v2/models/{STREAMED}/trace/setting"),
]


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_admin_endpoints_are_closed_over_http(
    server: TritonServer, method: str, path: str, tmp_path: Path
) -> None:
    body = json.dumps({"log_file": str(tmp_path / "log"), "key": "/x", "byte_size": 8}).encode()
    request = urllib.request.Request(
        server.http_url + path, data=body if method == "POST" else None, method=method
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert caught.value.code == 403
    assert list(tmp_path.iterdir()) == []


def test_admin_endpoints_are_closed_over_grpc(server: TritonServer) -> None:
    with contextlib.closing(grpc_client(server)) as client:
        calls: list[Callable[[tritonclient.grpc.InferenceServerClient], object]] = [
            lambda c: c.get_system_shared_memory_status(),
            lambda c: c.get_cuda_shared_memory_status(),
            lambda c: c.register_system_shared_memory("mine", "/x", 8),
            lambda c: c.get_log_settings(),
            lambda c: c.get_trace_settings(),
        ]
        for call in calls:
            with pytest.raises(InferenceServerException, match="restricted"):
                call(client)
        # Unless asked for by --model-control-mode.
        for change in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="not allowed"):
                change(STREAMED)
        assert client.is_model_ready(STREAMED)


# Files and the container


def test_a_server_writes_to_temporary_folders_alone(server: TritonServer) -> None:
    assert server.log is not None
    allowed = (tempfile.gettempdir(), "/dev/", str(server.log))
    # Of the library that reads NVIDIA's metrics, where it may: not for an unprivileged user.
    known = {"/var/log/nv-hostengine.log"}
    written = set()
    for process in processes(server):
        for file in process.open_files():
            if file.mode != "r" and not file.path.startswith(allowed):
                written.add(file.path)
    assert written <= known


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and their arguments, of the stage that is run."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pairs = [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]
    last = max(i for i, (word, _) in enumerate(pairs) if word == "FROM")
    return pairs[last:]


def test_the_container_runs_as_a_user_who_owns_nothing_in_it() -> None:
    stage = dockerfile()
    words = [word for word, _ in stage]
    user = words.index("USER")
    assert words.count("USER") == 1
    assert stage[user][1] not in ("root", "0")
    assert words.index("ENTRYPOINT") > user
    assert not {"COPY", "ADD", "RUN"} & set(words[user:]), "what is there was root's work"
    assert not any("chown" in rest for _, rest in stage)
    assert "--read-only --tmpfs /tmp" in (ROOT / "Dockerfile").read_text()


def test_the_container_serves_as_make_serve_does(
    reference: Reference, served_checkpoint: Path, tmp_path: Path
) -> None:
    """Its entry point is run, with this machine's Python, ports and addresses."""
    [entry] = [json.loads(rest) for word, rest in dockerfile() if word == "ENTRYPOINT"]
    assert entry[:3] == ["/opt/fi_runtime/.venv/bin/python", "-m", "tools.serve"]
    for service in ("http", "grpc", "metrics"):
        assert f"--{service}-address=0.0.0.0" in entry, "a container's loopback is its own"
    repository = write_repository(tmp_path / "repository", served_checkpoint, KNOBS)
    here = TritonServer(repository)  # never started: for its free ports
    options = [f"--{name}={value}" for name, value in here.options.items()]
    command = [sys.executable, *entry[1:], *options]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) as container,
    ):
        try:
            wait_until(
                lambda: {model.state for model in here.models() or []} == {"READY"}, HANG_S, "ready"
            )
            for method, path in CLOSED:
                refused = urllib.request.Request(here.http_url + path, method=method)
                with pytest.raises(urllib.error.HTTPError, match="403"):
                    urllib.request.urlopen(refused, timeout=10)
        finally:
            container.terminate()
        assert container.wait(HANG_S) == 0
