"""An engine that does not come up says why, at once, and leaves no process."""

import os
import sys
from pathlib import Path

import pytest

from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.frontend.engine_link import EngineLink
from fi_runtime.run_folder import MAX_SOCKET_PATH, RunFolder

CONFIG = EngineConfig(checkpoint="/nowhere")


def stand_in_for_python(folder: Path, script: str) -> None:
    (folder / "python3").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "python3").chmod(0o755)


def link(name: str, timeout_s: float = 20.0) -> EngineLink:
    return EngineLink(CONFIG, name, None, os.getpid(), timeout_s)


def test_a_checkpoint_that_is_not_there_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="/nowhere: no such folder"):
        link("missing", 60.0)
    RunFolder.of(os.getpid(), "missing").remove()


def test_an_engine_that_is_killed_while_it_loads_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_python(tmp_path, f"echo started >> {tmp_path}/count; kill -9 $$")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="ended with status -9 before it was ready"):
        link("killed")
    assert (tmp_path / "count").read_text() == "started\n"
    RunFolder.of(os.getpid(), "killed").remove()


def test_an_engine_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_python(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 100")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="not ready after 2 s"):
        link("slow", 2.0)
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()
    assert not RunFolder.of(os.getpid(), "slow").engine_lives()
    RunFolder.of(os.getpid(), "slow").remove()


def test_a_name_too_long_for_a_socket_is_told() -> None:
    with pytest.raises(ConfigError, match=f"of at most {MAX_SOCKET_PATH}"):
        RunFolder.of(os.getpid(), "m" * 100)
