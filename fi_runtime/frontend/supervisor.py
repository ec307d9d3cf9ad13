"""Keeps a front end attached to an engine: one after another, where they die."""

import logging
import threading
import time
from collections.abc import Callable

from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.frontend.engine_link import POLL_S, EngineLink
from fi_runtime.frontend.metrics import Metrics
from fi_runtime.frontend.restarts import PROVEN_S, Restarts
from fi_runtime.messages import Output, Step

log = logging.getLogger(__name__)

LOOK_S = 0.2
"""between two looks whether somebody else has started the next engine"""
ANSWERED = ("stop", "complete", "length")
"""how sequences finish that an engine has computed to their end"""


class Supervisor:
    """Hands on what an engine says until it dies, or is killed for its silence; then gets another.

    Args:
        link: to the first engine.
        connect: attaches to the engine, starting it if need be; raises ConfigError.
        config: that the engine runs with.
        metrics: told how the engine is.
        hand_out: takes what a step gave this front end's sequences.
        closing: set once no engine is needed any more.
    """

    def __init__(
        self,
        link: EngineLink,
        connect: Callable[[], EngineLink],
        config: EngineConfig,
        metrics: Metrics,
        hand_out: Callable[[list[Output]], None],
        closing: threading.Event,
    ) -> None:
        self.link = link
        """to the engine that there is, or that died last"""
        self.gave_up = ""
        """why nobody starts the engine again, while that is so"""
        self._connect = connect
        self._step_timeout_s = config.step_timeout_s
        self._restarts = Restarts(config.engine_restarts)
        self._metrics = metrics
        self._hand_out = hand_out
        self._closing = closing

    def run(self) -> None:
        """Hand on what one engine after another says, until ``closing`` is set."""
        self._metrics.engine_up(self.link.started_engine)
        while not self._closing.is_set():
            proven = self._listen(self.link)
            if not self._closing.is_set():
                self._find_engine(proven)

    def _listen(self, link: EngineLink) -> bool:
        """Hand on what an engine says until it is lost; whether it has proved that it works."""
        proven = False
        # Counted, since a clock would also run while this process was held.
        silent_polls = 0
        while not self._closing.is_set():
            try:
                messages = link.receive()
            except Exception as error:
                log.exception("the engine cannot be understood, and is killed")
                link.kill_engine(f"it could not be understood ({error}) and was killed")
                messages = []
            silent_polls = 0 if messages else silent_polls + 1
            if silent_polls * POLL_S > self._step_timeout_s:
                log.error(
                    "the engine has been silent for %g s, and is killed", self._step_timeout_s
                )
                link.kill_engine(
                    f"it made no progress for {self._step_timeout_s:g} s and was killed; the "
                    "server's log has what its threads did"
                )
            if not messages and not link.engine_lives():
                link.lose(link.last_words())
                log.error("the engine died: %s", link.lost)
                self._metrics.engine_died()
                break
            for step in messages:
                if isinstance(step, Step):
                    if step.credits:
                        link.grant(step.credits)
                    if step.stats is not None:
                        self._metrics.engine(step.stats)
                    self._hand_out(step.all_outputs())
                    proven = proven or any(one.finish in ANSWERED for one in step.outputs)
        return proven or time.monotonic() - link.since > PROVEN_S

    def _find_engine(self, proven: bool) -> None:
        """Start the engine again, or attach to the one that another front end has started."""
        died, reason = self.link, self.link.lost
        link = None
        while link is None:
            pause = self._restarts.died(proven)
            if pause is None and not self.gave_up:
                self.gave_up = (
                    f"the engine died ({self._restarts.deaths} in a row) and is not started again: "
                    f"{reason}. Mend that, then load this model again"
                )
                log.error(self.gave_up)
            if not self._await_start(died, pause):
                return
            try:
                link = self._attach()
            except Exception as error:  # a full disk, no process to be had: it may pass
                if str(error) != reason and not self._closing.is_set():
                    log.error("the engine could not be started again: %s", error)
                reason, proven = str(error), False
        self.link, self.gave_up = link, ""
        self._metrics.engine_up(link.started_engine)
        log.info("attached to engine process %d", link.info.pid)

    def _attach(self) -> EngineLink:
        """Attach to the engine, starting it if need be; it serves the model that it always did."""
        link, before = self._connect(), self.link.info
        if (link.info.vocab_size, link.info.max_context) != (before.vocab_size, before.max_context):
            link.close()
            raise ConfigError(
                f"the checkpoint has changed: vocabulary and context had {before.vocab_size} and "
                f"{before.max_context} tokens, now {link.info.vocab_size} and "
                f"{link.info.max_context}; load every model of that engine again"
            )
        return link

    def _await_start(self, died: EngineLink, pause: float | None) -> bool:
        """Wait until the engine is to be started; false if the model is closed first.

        RACE: one that another front end started may end before this one attaches, which then starts
        it once more, even if it had given up. That is harmless.
        """
        start = time.monotonic() + (float("inf") if pause is None else pause)
        while not self._closing.wait(LOOK_S):
            if time.monotonic() >= start or died.successor_lives():
                return True
        return False
