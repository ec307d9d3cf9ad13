"""The engine, but a prompt of HANG makes its next step hang.

python -m tests.hanging_engine RUN_FOLDER SERVER_PID ALIVE_FD, as front ends start an engine.
"""

import sys
import time

from fi_runtime.engine import server
from fi_runtime.engine.core import Engine
from fi_runtime.engine.sequence import SequenceKey
from fi_runtime.messages import SamplingParams

HANG = "hang"


class HangingEngine(Engine):
    def add(self, key: SequenceKey, prompt: list[int], params: SamplingParams) -> None:
        if bytes(prompt).decode() == HANG:
            a_step_that_never_ends()
        super().add(key, prompt, params)


def a_step_that_never_ends() -> None:
    time.sleep(3600)


if __name__ == "__main__":
    server.Engine = HangingEngine  # type: ignore[misc]
    sys.exit(server.main(sys.argv[1:]))
