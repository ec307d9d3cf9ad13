"""An engine that computes nothing: each sequence gets one token a step, as fast as it is asked.

python -m bench.echo_engine RUN_FOLDER SERVER_PID ALIVE_FD, as front ends start an engine. What is
measured with it is all the rest: front ends, tritonserver, clients.
"""

import logging
import os
import sys
from pathlib import Path

import msgspec
import numpy as np

from fi_runtime.config import EngineConfig
from fi_runtime.engine.credits import Credits
from fi_runtime.engine.outputs import Outputs, Tokens
from fi_runtime.engine.sequence import SequenceKey
from fi_runtime.engine.server import EngineServer
from fi_runtime.messages import EngineInfo, Output, SamplingParams, Stats
from fi_runtime.run_folder import RunFolder, starting_lock

TOKEN = 64
"""a letter in the vocabulary of ``bench.shapes``"""


class EchoEngine:
    """What an engine's process needs of an engine."""

    runs_ahead = False

    def __init__(self) -> None:
        self._left: dict[SequenceKey, int] = {}
        self._front_ends: list[bytes] = []

    @property
    def busy(self) -> bool:
        return bool(self._left)

    def add(self, key: SequenceKey, prompt: list[int], params: SamplingParams) -> None:
        self._left[key] = params.max_tokens
        if key[0] not in self._front_ends:
            self._front_ends.append(key[0])

    def abort(self, key: SequenceKey) -> bool:
        return self._left.pop(key, None) is not None

    def keys_of(self, front_end: bytes) -> list[SequenceKey]:
        return [key for key in self._left if key[0] == front_end]

    def stats(self) -> Stats:
        return Stats(
            running=len(self._left),
            waiting=0,
            cache_usage=0.0,
            preemptions=0,
            prompt_tokens=0,
            reused_tokens=0,
        )

    def step(self) -> Outputs:
        """One token for each sequence."""
        outputs = Outputs(self._front_ends)
        going_on = [key for key, left in self._left.items() if left > 1]
        for key in self._left.keys() - going_on:
            outputs.others.append((key, Output(key[1], [TOKEN], finish="length")))
        self._left = {key: self._left[key] - 1 for key in going_on}
        if going_on:
            owners = [self._front_ends.index(front_end) for front_end, _ in going_on]
            columns = (owners, [request for _, request in going_on], [TOKEN] * len(going_on))
            outputs.columns = Tokens(*(np.array(one, dtype=np.int64) for one in columns))
        return outputs


def main(argv: list[str]) -> int:
    folder, server_pid, alive_fd = RunFolder(Path(argv[0])), int(argv[1]), int(argv[2])
    os.set_inheritable(alive_fd, False)
    logging.basicConfig(level=logging.INFO)
    config = msgspec.json.decode(folder.config.read_bytes(), type=EngineConfig)
    info = EngineInfo(
        pid=os.getpid(),
        vocab_size=1 << 30,
        max_context=1 << 20,
        tokenizer=str(Path(config.checkpoint) / "tokenizer.json"),
    )
    engine, credits = EchoEngine(), Credits(config.max_sequences)
    server = EngineServer(engine, info, credits, server_pid, config.server_timeout_s)  # type: ignore[arg-type]
    server.bind(folder)
    server.run()
    with starting_lock():
        folder.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
