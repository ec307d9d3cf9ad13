"""Where an engine and its front ends meet: a private folder of sockets, one for each engine.

``/tmp/fi_runtime-<uid>/<server pid>-<engine>/`` is readable by its user alone. The engine holds a
lock on ``alive`` for as long as it lives, which the kernel releases however it dies; no process id
is trusted to say whether it still runs.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fi_runtime.config import ConfigError

MAX_SOCKET_PATH = 107
"""bytes, of the system's 108 with their end; zmq refuses longer ones"""


def private_base() -> Path:
    """This user's folder of run folders, made if missing.

    Raises:
        ConfigError: the name is taken by something that others could write to.
    """
    base = Path(tempfile.gettempdir()) / f"fi_runtime-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    info = base.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(
            f"{base}: is not a folder that only user {os.getuid()} can use; remove it"
        )
    return base


@contextlib.contextmanager
def starting_lock() -> Iterator[None]:
    """Held by whoever makes or removes a run folder, so that one at a time does."""
    with (private_base() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @classmethod
    def of(cls, server_pid: int, engine: str) -> "RunFolder":
        folder = cls(private_base() / f"{server_pid}-{engine}")
        longest = len(os.fsencode(folder.path / "requests.sock"))
        if longest > MAX_SOCKET_PATH:
            raise ConfigError(
                f"{folder.path}: a socket's path there has {longest} bytes, of at most "
                f"{MAX_SOCKET_PATH}; give the model a shorter name, or TMPDIR a shorter path"
            )
        return folder

    @property
    def requests(self) -> str:
        """Address of the socket that front ends push to."""
        return f"ipc://{self.path}/requests.sock"

    @property
    def outputs(self) -> str:
        """Address of the socket that answers each front end."""
        return f"ipc://{self.path}/outputs.sock"

    @property
    def config(self) -> Path:
        """The engine's knobs, as JSON."""
        return self.path / "engine.json"

    @property
    def failure(self) -> Path:
        """Why the engine could not start, or go on, where it could say so."""
        return self.path / "failure"

    @property
    def pid_file(self) -> Path:
        """The engine's process id, for whoever looks after the machine."""
        return self.path / "engine.pid"

    def hold_alive(self) -> IO[bytes]:
        """Take the lock that means a living engine; call under ``starting_lock``, with none alive.

        It may have to wait for somebody who is just asking whether one lives.
        """
        file = (self.path / "alive").open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def open_alive(self) -> IO[bytes]:
        """That engine's file, to ask ``is_held`` about also when another has taken its place."""
        return (self.path / "alive").open("rb")

    def engine_lives(self) -> bool:
        try:
            file = self.open_alive()
        except FileNotFoundError:
            return False
        with file:
            return is_held(file)

    def make(self) -> None:
        """Make the folder anew, whatever an engine that died left there."""
        self.remove()
        self.path.mkdir(mode=0o700)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def is_held(alive: IO[bytes]) -> bool:
    """Whether the engine that took this file's lock lives."""
    try:
        # Shared, so that two who ask at once do not take each other for an engine.
        fcntl.flock(alive, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(alive, fcntl.LOCK_UN)
    return False


def remove_stale() -> None:
    """Remove the run folders of servers that are gone. Call under ``starting_lock``."""
    for path in private_base().iterdir():
        pid = path.name.partition("-")[0]
        folder = RunFolder(path)
        gone = pid.isdigit() and not Path(f"/proc/{pid}").exists()
        # The server may be in another container, where its process id means another process.
        if path.is_dir() and gone and not folder.engine_lives():
            folder.remove()
