"""The set-up and the server runner: what they refuse, what they pick, what they leave behind."""

import ast
import contextlib
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from fi_runtime import shared_memory
from tools import audit, perf, serve, setup
from tools.serve import Model, ServerError, TritonServer

# Set-up


def test_old_pythons_can_read_the_refusal_of_old_pythons() -> None:
    ast.parse(Path(setup.__file__).read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 13), (3, 13, 0)])
def test_an_unsupported_python_is_refused(
    version: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setenv("PYTHON", "chosen")  # so that no other one is looked for
    with pytest.raises(SystemExit, match=r"found Python 3\.\d+ \(.*3\.11 or 3\.12 is needed"):
        setup.use_supported_python()


@pytest.mark.parametrize("machine", ["aarch64", "ppc64le"])
def test_an_unsupported_machine_is_refused(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(setup.SetupError, match=f"found Linux {machine}"):
        setup.check_platform()


@pytest.mark.parametrize("library", [("glibc", "2.31"), ("", "")])
def test_an_old_or_other_c_library_is_refused(
    library: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: library)
    with pytest.raises(setup.SetupError, match=r"needs glibc 2\.35 or newer"):
        setup.check_platform()


def test_a_missing_shared_library_is_named(tmp_path: Path) -> None:
    perf_analyzer = setup.TRITON / "perf" / "bin" / "perf_analyzer"
    if not perf_analyzer.exists():
        pytest.skip("perf_analyzer is not set up")
    setup.check_libraries(perf_analyzer, perf_analyzer.parent.parent / "lib")
    with pytest.raises(setup.SetupError, match=r"perf_analyzer needs .*libb64\.so\.0d"):
        setup.check_libraries(perf_analyzer)


def test_a_missing_libpython_without_apt_is_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "libpython_name", lambda: "libpython3.99.so.1.0")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(setup.SetupError, match=r"needs libpython3\.99\.so\.1\.0: install it"):
        setup.find_libpython()


def test_a_stamp_is_done_only_for_its_inputs_and_keeps_its_note(tmp_path: Path) -> None:
    stamp = setup.Stamp(tmp_path / "stamp", "inputs 1")
    assert not stamp.is_done()
    assert stamp.note == ""
    stamp.write("gpu test")
    assert stamp.is_done()
    changed = setup.Stamp(tmp_path / "stamp", "inputs 2")
    assert not changed.is_done()
    assert changed.note == "gpu test"


def test_the_wrapper_prefers_the_containers_server_and_puts_our_python_first(
    tmp_path: Path,
) -> None:
    container, ours = tmp_path / "opt" / "tritonserver", tmp_path / ".venv" / "bin" / "tritonserver"
    carried = tmp_path / ".triton" / "server" / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    for program in (container, ours, carried):
        program.parent.mkdir(parents=True)
    report = '#!/bin/sh\necho "{}|$PATH|$*"\n'
    setup.write_script(ours, setup.SERVER_WRAPPER.format(container=container))
    setup.write_script(carried, report.format("carried"))

    def call() -> list[str]:
        command = [ours, "--http-port", "1 2"]
        return subprocess.check_output(command, text=True).strip().split("|")

    name, path, arguments = call()
    assert name == "carried"
    assert path.startswith(f"{ours.parent}:")
    assert re.fullmatch(r"--backend-directory=\S+/tritonserver/backends --http-port 1 2", arguments)
    setup.write_script(container, report.format("container"))
    assert call() == ["container", path, "--http-port 1 2"]


# The lock


def locked() -> dict[str, str]:
    return {name: version for name, (version, _) in setup.read_lock().items()}


def test_the_lock_holds_exact_versions_with_hashes_and_nothing_else() -> None:
    pin = r"[a-z0-9-]+==[0-9][a-z0-9.]*( --hash=sha256:[0-9a-f]{64})+"
    for line in setup.LOCK.read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(pin, line), line
    for wheel in (setup.SERVER_WHEEL, setup.PERF_WHEEL):
        assert re.fullmatch(pin, wheel)


def report_of(name: str, version: str, sha256: str) -> dict[str, Any]:
    """A package as pip's installation report has it."""
    return {
        "metadata": {"name": name, "version": version},
        "download_info": {
            "url": "https://index/file.whl",
            "archive_info": {"hashes": {"sha256": sha256}},
        },
    }


def test_a_package_with_another_hash_is_refused() -> None:
    pins = {"one-two": ("1.0", {"a" * 64, "b" * 64})}
    setup.check_hash(report_of("One.Two", "1.0", "b" * 64), pins)
    setup.check_hash(report_of("one_two", "1.0+cpu", "c" * 64), pins)
    setup.check_hash(report_of("not-locked", "1.0", "c" * 64), pins)
    with pytest.raises(
        setup.SetupError, match=r"index/file\.whl has the sha256 cccc.* one-two 1\.0"
    ):
        setup.check_hash(report_of("one_two", "1.0", "c" * 64), pins)


def test_the_audit_finds_what_is_wrong() -> None:
    good = {"one": ("1.0", {"a" * 64}), "two": ("2.0", {"b" * 64, "c" * 64})}
    assert list(audit.lock_problems(good)) == []
    assert list(audit.installed_problems(good, {"one": "1.0", "two": "2.0+cpu", "x": "3"})) == []
    bad = {"one": ("1.*", {"a" * 64}), "two": ("2.0", set()), "three": ("3.0", {"a" * 63})}
    found = "\n".join(audit.lock_problems(bad))
    for part in ("one: '1.*'", "two==2.0: has no sha256", "three==3.0"):
        assert part in found
    assert "one: 1.1 is installed" in "\n".join(audit.installed_problems(good, {"one": "1.1"}))


def test_what_is_installed_passes_the_audit() -> None:
    """By the command itself, without pip-audit, which would ask the network."""
    if not setup.VENV_PYTHON.exists() or sys.prefix != str(setup.VENV):
        pytest.skip("not in the virtual environment that the lock is for")
    command = [sys.executable, "-m", "tools.audit"]
    path = {**os.environ, "PATH": "/nowhere"}
    output = subprocess.run(command, env=path, cwd=setup.ROOT, capture_output=True, text=True)
    assert output.returncode == 0, output.stdout
    assert re.search(r"audit: \d{3} pins, \d{2,3} of them installed, 0 problems", output.stdout)


def test_the_lock_pins_all_that_is_installed_for_the_project() -> None:
    """Walks what the project and its test extra require here; torch's own packages aside."""
    if not setup.VENV_PYTHON.exists() or sys.prefix != str(setup.VENV):
        pytest.skip("not in the virtual environment that the lock is for")
    pins, seen, wanted = locked(), set(), [Requirement("fi-runtime[test]")]
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        key = (name, *sorted(requirement.extras))
        project = name == "fi-runtime"
        if key in seen or (setup.NOT_LOCKED.fullmatch(name) and not project):
            continue
        seen.add(key)
        if not project:
            installed = Version(importlib.metadata.version(name)).public
            assert pins.get(name) == installed, f"{name} {installed} is installed"
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
                wanted.append(needed)


# The server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TritonServer]:
    """A program in tritonserver's place that ends on nothing but SIGKILL, with a child like it."""
    program = tmp_path / "tritonserver"
    setup.write_script(
        program,
        "#!/bin/sh\ntrap '' TERM INT\nsetsid sleep 1000 &\ntouch ready\n"
        "while :; do sleep 1; done\n",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve, "find_program", lambda name: str(program))
    monkeypatch.setattr(serve, "EXIT_TIMEOUT_SECONDS", 0)
    monkeypatch.setattr(serve, "OVERTIME_SECONDS", 0.2)
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    with contextlib.closing(Stopped(tmp_path, log=tmp_path / "log")) as stub:
        yield stub


class Stopped(TritonServer):
    """One that a failing test does not leave running."""

    def close(self) -> None:
        self.stop()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


def test_stop_leaves_no_process_no_shared_memory_and_no_socket(
    server: TritonServer, tmp_path: Path
) -> None:
    server.start()
    wait_for(tmp_path / "ready")
    meeting = Path(f"/tmp/fi_runtime-{os.getuid()}/{server.pid}-test")
    meeting.mkdir(parents=True)
    region = tmp_path / f"{server.mark}1234"
    region.write_bytes(b"")
    other = tmp_path / "another_server_1234"
    other.write_bytes(b"")
    assert len(server.started()) >= 2
    assert server.stop() == -9
    assert server.started() == []
    assert not region.exists()
    assert not meeting.exists()
    assert other.exists()


def test_a_server_that_ends_while_loading_is_reported_with_its_log(
    server: TritonServer, tmp_path: Path
) -> None:
    setup.write_script(tmp_path / "tritonserver", "#!/bin/sh\necho bad option; exit 3\n")
    server.start()
    with pytest.raises(ServerError, match=r"(?s)ended with code 3.*bad option"):
        server.wait_ready(timeout=30)


def test_a_server_that_never_answers_times_out(server: TritonServer) -> None:
    server.start()
    with pytest.raises(ServerError, match="not loaded in 0 s"):
        server.wait_ready(timeout=0.3)


def test_our_options_give_way_to_the_callers() -> None:
    server = TritonServer("/models", ["--http-port", "9000", "--grpc-address=0.0.0.0"])
    assert server.http_url == "http://127.0.0.1:9000"
    assert server.http_address == "127.0.0.1:9000"
    assert server.grpc_url.startswith("127.0.0.1:")
    assert server.options["grpc-address"] == "0.0.0.0"
    assert server.options["metrics-address"] == "127.0.0.1"
    assert server.options["model-repository"] == "/models"


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--http-port=1"], "1"),
        (["--http-port", "1"], "1"),
        (["--http-port=1", "--http-port=2"], "2"),
        (["--http-port-other=1", "--other", "http-port"], None),
        (["--http-port"], ""),
    ],
)
def test_option_reads_tritonservers_arguments(arguments: list[str], value: str | None) -> None:
    assert serve.option(arguments, "http-port") == value


def test_free_ports_are_different_and_free() -> None:
    ports = serve.free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.socket() as probe:
            probe.bind((serve.LOOPBACK, port))


def test_nothing_keeps_a_server_from_starting_here(tmp_path: Path) -> None:
    assert list(serve.find_problems(TritonServer(tmp_path))) == []


def test_a_port_in_use_is_one_clear_message(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((serve.LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = TritonServer(tmp_path, [f"--grpc-port={port}"])
        [problem] = serve.find_problems(server)
        assert f"cannot listen on 127.0.0.1:{port} for grpc: Address already in use" in problem
        assert "ARGS=--grpc-port=" in problem
        unused = TritonServer(tmp_path, [f"--grpc-port={port}", "--allow-grpc=false"])
        assert list(serve.find_problems(unused)) == []


@pytest.mark.parametrize("port", ["http", "70000"])
def test_a_port_that_is_none_is_one_clear_message(port: str, tmp_path: Path) -> None:
    [problem] = serve.find_problems(TritonServer(tmp_path, [f"--http-port={port}"]))
    assert f":{port} for http: no port number" in problem


def test_too_little_shared_memory_is_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "MIN_BYTES", 1 << 60)
    [problem] = serve.find_problems(TritonServer(tmp_path))
    assert re.search(r"/dev/shm has \d+ MiB free; the Python backend needs", problem)


def test_no_model_repository_is_one_clear_message(tmp_path: Path) -> None:
    [problem] = serve.find_problems(TritonServer(tmp_path / "none"))
    assert f"no model repository {tmp_path}/none" in problem


def test_the_block_lists_doors_that_failed_with_tritons_reason() -> None:
    server = TritonServer(ports=serve.DEFAULT_PORTS)
    models = [
        Model("llm", "1", "READY", ""),
        Model("other", "1", "UNAVAILABLE", "Internal: no such checkpoint: /x\n\nAt:\n  model.py"),
    ]
    block = serve.describe(server, models)
    assert "not every door is ready" in block
    assert "other: UNAVAILABLE Internal: no such checkpoint: /x\n" in block
    assert "curl -s http://127.0.0.1:8000/v2/models/llm/generate -d '{" in block
    assert "127.0.0.1:8001" in block
    assert "http://127.0.0.1:8002/metrics" in block
    assert "\n  ready\n" in serve.describe(server, models[:1])


def test_a_real_server_keeps_its_doors_when_one_fails_and_goes_away_whole(tmp_path: Path) -> None:
    for door, body in {"good": "pass", "bad": "raise ValueError('no such checkpoint')"}.items():
        (tmp_path / door / "1").mkdir(parents=True)
        (tmp_path / door / "config.pbtxt").write_text(
            'backend: "python"\ninstance_group [{ kind: KIND_CPU }]\n'
            'input [{ name: "in" data_type: TYPE_INT32 dims: [1] }]\n'
            'output [{ name: "out" data_type: TYPE_INT32 dims: [1] }]\n'
        )
        (tmp_path / door / "1" / "model.py").write_text(
            f"class TritonPythonModel:\n    def initialize(self, args):\n        {body}\n"
            "    def execute(self, requests):\n        return []\n"
        )
    with TritonServer(tmp_path, log=tmp_path / "log") as server:
        server.wait_ready(["good"], timeout=60)
        with pytest.raises(ServerError, match=r"bad: .*no such checkpoint"):
            server.wait_ready()
        assert list(shared_memory.FOLDER.glob(f"{server.mark}*"))
    assert server.started() == []
    assert not list(shared_memory.FOLDER.glob(f"{server.mark}*"))


# perf_analyzer


def test_perf_analyzer_gets_inputs_that_the_door_declares() -> None:
    [streamed] = perf.input_data(perf.EXAMPLE, streaming=True)["data"]
    [unary] = perf.input_data(perf.EXAMPLE, streaming=False)["data"]
    assert streamed["stream"] == {"content": [True], "shape": [1]}
    assert unary == {key: value for key, value in streamed.items() if key != "stream"}


def test_perf_analyzers_defaults_give_way() -> None:
    assert perf.replaced("--max-trials=3", ["--max-trials", "5"])
    assert not perf.replaced("--max-trials=3", ["--max-threads=5"])
