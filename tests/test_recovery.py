"""The engine dies, in every way there is; the server stays, and all is as it was before."""

import contextlib
import itertools
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from fi_runtime import shared_memory
from fi_runtime.frontend.restarts import FIRST_PAUSE_S, MAX_PAUSE_S, Restarts
from fi_runtime.run_folder import private_base
from tests.hanging_engine import HANG
from tests.serving import (
    AGAIN_S,
    HANG_S,
    KNOBS,
    STREAMED,
    UNARY,
    Reference,
    Stream,
    assert_as_before,
    command_of,
    engines,
    error_of,
    grpc_client,
    infer_grpc,
    is_free,
    joined,
    metric,
    processes,
    stream,
    stubs,
    tensors_of,
    wait_until,
)
from tools.repository import write_repository
from tools.serve import ROOT, TritonServer

ENDED_S = 1.0
"""for the requests of an engine that died to be told so"""
LONG = {"max_tokens": 3500, "temperature": 0.0}
CLIENTS = 12
TOKENS = 24


@pytest.fixture(scope="module")
def mortal(
    reference: Reference, served_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server whose engine is killed. Tests leave it as they found it."""
    folder = tmp_path_factory.mktemp("mortal")
    repository = write_repository(folder / "repository", served_checkpoint, KNOBS)
    arguments = ["--model-control-mode=explicit", "--load-model=*"]
    with TritonServer(repository, arguments, log=folder / "log") as running:
        running.wait_ready()
        yield running


@dataclass(frozen=True)
class Belongings:
    """What a server's processes have, beside memory."""

    files: list[int]
    """open ones of each front end"""
    regions: int
    folders: list[str]

    @classmethod
    def of(cls, server: TritonServer) -> "Belongings":
        return cls(
            files=[process.num_fds() for process in stubs(server)],
            regions=len(list(shared_memory.FOLDER.glob(f"{server.mark}*"))),
            folders=[path.name for path in private_base().glob(f"{server.pid}-*")],
        )


@dataclass
class Load:
    """Clients that ask, whole and streamed, until told to stop; what they got."""

    server: TritonServer
    reference: Reference
    answered: int = 0
    ended: list[float] = field(default_factory=list)
    """when requests were told that their engine had died"""
    wrong: list[str] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def ask(self, number: int) -> None:
        """Be a client."""
        for turn in itertools.count():
            if self.stopping.is_set():
                return
            prompt = f"client {number % 4} turn {turn % 3}"
            inputs = {"text_input": prompt, "max_tokens": TOKENS, "temperature": 0.0}
            try:
                if number % 2:
                    text = joined(stream(self.server, **inputs))
                else:
                    text = infer_grpc(
                        self.server, **{**inputs, "exclude_input_in_output": True}
                    ).text
            except InferenceServerException as error:
                self.ended.append(time.monotonic())
                if "the engine died" not in error.message():
                    self.wrong.append(str(error))
                if number % 2 == 0 and error.status() != "StatusCode.UNAVAILABLE":
                    self.wrong.append(str(error))
            except Exception as error:
                self.wrong.append(repr(error))
            else:
                self.answered += 1
                if text != self.reference.text(prompt, TOKENS):
                    self.wrong.append(f"{prompt}: {text}")


@contextlib.contextmanager
def load(server: TritonServer, reference: Reference) -> Iterator[Load]:
    """Clients that ask, for as long as the block lasts; each gets an answer or a reason."""
    for number, turn in itertools.product(range(4), range(3)):
        reference.text(f"client {number} turn {turn}", TOKENS)
    asking = Load(server, reference)
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(asking.ask, number) for number in range(CLIENTS)]
        try:
            yield asking
        finally:
            asking.stopping.set()
            for client in clients:
                client.result(HANG_S)
    assert asking.wrong == []


def kill(server: TritonServer) -> float:
    """Kill the engine as the kernel does that has no memory left; when."""
    [engine] = engines(server)
    engine.kill()
    killed = time.monotonic()
    wait_until(lambda: engine not in engines(server), 5, "it is gone")
    return killed


def await_answers(asking: Load) -> None:
    """Wait until each client may have had an answer since."""
    enough = asking.answered + CLIENTS
    wait_until(lambda: asking.answered > enough, HANG_S, "answers come")


def test_an_engine_killed_at_random_moments_under_load_is_started_again(
    mortal: TritonServer, reference: Reference, request: pytest.FixtureRequest
) -> None:
    assert_as_before(mortal, reference)
    before = Belongings.of(mortal)
    starts = metric(mortal, "fi_runtime:engine_starts_total")
    kills = request.config.getoption("--kills")
    moments = random.Random(7)
    killed: list[float] = []
    served = 0
    with load(mortal, reference) as asking:
        for number in range(kills):
            if number % 2:  # while it loads
                wait_until(lambda: bool(engines(mortal)), AGAIN_S, "an engine is started")
                time.sleep(moments.uniform(0.0, 0.6))
            else:
                served += 1
                await_answers(asking)
                time.sleep(moments.uniform(0.0, 0.3))
            killed.append(kill(mortal))
        await_answers(asking)
    assert len(asking.ended) >= served, "some requests were in flight each time"
    late = [end - max(at for at in killed if at <= end) for end in asking.ended]
    assert max(late) < ENDED_S
    assert_as_before(mortal, reference)
    after = Belongings.of(mortal)
    assert after.regions == before.regions
    assert after.folders == before.folders
    assert max(after.files) <= max(before.files) + 5, "no socket is left behind"
    assert metric(mortal, "fi_runtime:engine_starts_total") == starts + served
    for process in stubs(mortal):
        assert [c for c in process.children() if c.status() == psutil.STATUS_ZOMBIE] == []


def test_an_engine_that_cannot_start_again_is_given_up(
    reference: Reference, served_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(served_checkpoint, checkpoint)
    repository = write_repository(
        tmp_path / "repository", checkpoint, {**KNOBS, "engine_restarts": "1"}, instances=1
    )
    arguments = ["--model-control-mode=explicit", "--load-model=*"]
    with TritonServer(repository, arguments, log=tmp_path / "log") as server:
        server.wait_ready()
        config = (checkpoint / "config.json").read_text()
        (checkpoint / "config.json").write_text("garbage")
        wait_until(lambda: is_free(server), 5, "its metrics are there")
        kill(server)
        # A request that comes before its death is noticed may be given to it.
        wait_until(lambda: metric(server, "fi_runtime:engine_up") == 0, 5, "its death is noticed")
        # One that comes now waits, while there is hope.
        status, message = error_of(infer_grpc, server, text_input="waits")
        assert status == "StatusCode.UNAVAILABLE"
        for part in ("2 in a row", "not started again", "config.json", "load this model again"):
            assert part in message
        asked = time.monotonic()
        assert "not started again" in error_of(until_final, server, text_input="late")[1]
        assert time.monotonic() - asked < 1
        # Whoever starts it then, all find it.
        (checkpoint / "config.json").write_text(config)
        with contextlib.closing(grpc_client(server)) as client:
            client.unload_model(UNARY)
            client.load_model(UNARY)
        inputs = {"text_input": "again", "max_tokens": 20, "temperature": 0.0}
        expected = reference.text("again", 20)
        assert infer_grpc(server, **inputs).text == "again" + expected
        time.sleep(1.0)
        assert joined(stream(server, **inputs)) == expected, "by the other door, too"
    assert not list(private_base().glob(f"{server.pid}-*"))


def until_final(server: TritonServer, **inputs: str) -> None:
    """Read a stream to its end."""
    with Stream(server, stream=True, **inputs) as opened:
        list(opened)


# Front ends that die


def test_a_front_end_that_is_killed_takes_only_its_own_requests(
    mortal: TritonServer, reference: Reference
) -> None:
    [engine] = engines(mortal)
    doomed = [p for p in stubs(mortal) if f"/{UNARY}/" in " ".join(command_of(p))]

    def ask() -> tuple[str, str]:
        inputs = tensors_of(tritonclient.grpc, {"text_input": "dies", **LONG})
        with contextlib.closing(grpc_client(mortal)) as client:
            return error_of(client.infer, UNARY, inputs, client_timeout=4.0)

    with (
        ThreadPoolExecutor(8) as pool,
        Stream(mortal, text_input="stays", stream=True, max_tokens=600, temperature=0.0) as stays,
    ):
        text = stays.next().text
        calls = [pool.submit(ask) for _ in range(8)]
        wait_until(lambda: metric(mortal, "vllm:num_requests_running") == 9, 3, "all run")
        for process in doomed:
            process.kill()
        assert text + joined(list(stays)) == reference.text("stays", 600)
        wait_until(lambda: is_free(mortal), 3, "their pages are free, while their clients wait")
        # tritonserver 2.51 answers nobody whom a dead front end has not answered; clients give up.
        assert {call.result()[0] for call in calls} == {"StatusCode.DEADLINE_EXCEEDED"}
    status, message = ask()
    assert (status, "is not healthy" in message) == ("StatusCode.INTERNAL", True)
    assert engines(mortal) == [engine]
    with contextlib.closing(grpc_client(mortal)) as client:
        client.unload_model(UNARY)
        client.load_model(UNARY)
    assert engines(mortal) == [engine]
    answer = infer_grpc(mortal, text_input="back", max_tokens=9, temperature=0.0).text
    assert answer == "back" + reference.text("back", 9)
    assert_as_before(mortal, reference)


# Engines that hang

STEP_TIMEOUT_S = 3.0
HEALTH = [sys.executable, "-m", "client", "health", "--url"]
HANGING_DOOR = """
from fi_runtime.frontend import engine_link

engine_link.ENGINE = "tests.hanging_engine"
from fi_runtime.frontend.triton import TritonPythonModel
"""


@pytest.fixture(scope="module")
def hanging(
    reference: Reference, served_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server whose steps may not take long, and whose engine hangs when it is asked to."""
    folder = tmp_path_factory.mktemp("hanging")
    knobs = {**KNOBS, "step_timeout_s": str(STEP_TIMEOUT_S)}
    repository = write_repository(folder / "repository", served_checkpoint, knobs, instances=1)
    for door in (STREAMED, UNARY):
        (repository / door / "1" / "model.py").write_text(HANGING_DOOR)
    arguments = ["--model-control-mode=explicit", "--load-model=*"]
    with TritonServer(repository, arguments, log=folder / "log") as running:
        running.wait_ready()
        yield running


def hanging_engine(server: TritonServer) -> psutil.Process:
    [engine] = [p for p in processes(server) if "tests.hanging_engine" in command_of(p)]
    return engine


def test_a_step_that_hangs_is_ended_with_stacks_in_the_log(
    hanging: TritonServer, reference: Reference
) -> None:
    before = hanging_engine(hanging)
    with Stream(hanging, text_input="beside", stream=True, **LONG) as beside:
        beside.next()
        asked = time.monotonic()
        status, message = error_of(infer_grpc, hanging, text_input=HANG)
        assert STEP_TIMEOUT_S - 1 < time.monotonic() - asked < STEP_TIMEOUT_S + 2
        assert status == "StatusCode.UNAVAILABLE"
        assert "no progress for 3 s" in message
        with pytest.raises(InferenceServerException, match="no progress for 3 s"):
            list(beside)
    assert hanging.log is not None
    assert "in a_step_that_never_ends" in hanging.log.read_text()
    assert_as_before(hanging, reference)
    assert hanging_engine(hanging) != before


def test_an_engine_that_is_stopped_is_ended(hanging: TritonServer, reference: Reference) -> None:
    with Stream(hanging, text_input="runs", stream=True, **LONG) as running:
        running.next()
        hanging_engine(hanging).suspend()
        stopped = time.monotonic()
        probe = subprocess.Popen([*HEALTH, hanging.grpc_url, "--timeout", "1"], cwd=ROOT)
        with contextlib.closing(grpc_client(hanging)) as client:
            assert client.is_model_ready(UNARY), "the server's own word"
        with pytest.raises(InferenceServerException, match="no progress for 3 s"):
            list(running)
        assert time.monotonic() - stopped < STEP_TIMEOUT_S + 2
    assert probe.wait(HANG_S) == 1
    assert_as_before(hanging, reference)
    assert subprocess.run([*HEALTH, hanging.grpc_url], cwd=ROOT, timeout=HANG_S).returncode == 0


def test_an_engine_that_hangs_is_ended_when_its_model_is_unloaded(
    hanging: TritonServer, reference: Reference
) -> None:
    """There is nobody left to notice it then, and it would be in the way of the next one."""
    assert_as_before(hanging, reference)
    engine = hanging_engine(hanging)
    engine.suspend()
    with contextlib.closing(grpc_client(hanging)) as client:
        for door in (STREAMED, UNARY):
            client.unload_model(door)
        only = [hanging.pid]
        wait_until(lambda: hanging.started() == only, STEP_TIMEOUT_S + 10, "all else has ended")
        assert not list(private_base().glob(f"{hanging.pid}-*"))
        for door in (STREAMED, UNARY):
            client.load_model(door)
    assert_as_before(hanging, reference)


def test_an_engine_that_is_held_for_less_goes_on(
    hanging: TritonServer, reference: Reference
) -> None:
    engine = hanging_engine(hanging)
    inputs = {"text_input": "held", "max_tokens": 300, "temperature": 0.0}
    with Stream(hanging, stream=True, **inputs) as opened:
        first = opened.next()
        engine.suspend()
        time.sleep(STEP_TIMEOUT_S / 3)
        engine.resume()
        assert first.text + joined(list(opened)) == reference.text("held", 300)
    assert hanging_engine(hanging) == engine


# When to start again


def test_the_pause_doubles_until_one_has_proved_itself_or_all_are_given_up() -> None:
    restarts = Restarts(9)
    pauses = [restarts.died(proven=False) for _ in range(10)]
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-2:] == [MAX_PAUSE_S, None]
    assert restarts.died(proven=True) == FIRST_PAUSE_S
    assert Restarts(0).died(proven=True) is None
