"""The engine without its sockets: sequences in, a step at a time, tokens out."""

import itertools
import logging
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fi_runtime.cache.pages import PagePool
from fi_runtime.cache.prefix_tree import PrefixTree
from fi_runtime.config import EngineConfig
from fi_runtime.engine.batches import Batches
from fi_runtime.engine.build import build
from fi_runtime.engine.guides import DeadEnd, Guide, Guides
from fi_runtime.engine.outputs import Outputs, Tokens
from fi_runtime.engine.phases import Phases
from fi_runtime.engine.runner import Launched
from fi_runtime.engine.scheduler import Scheduler
from fi_runtime.engine.sequence import Chunks, Sequence, SequenceKey
from fi_runtime.messages import FinishReason, Output, SamplingParams, Stats, TokenLogprob

log = logging.getLogger(__name__)

COMPILE_WAIT_S = 0.02
"""for a guide, while there is nothing else to do; messages wait as long at most"""


class BadRequest(ValueError):
    """A sequence that this engine cannot run."""


@dataclass(frozen=True)
class Generation:
    """A finished sequence's output."""

    tokens: list[int]
    logprobs: list[float]
    """of each token, where the parameters ask for them"""
    finish: FinishReason


class Engine:
    """Continuous batching over a paged cache.

    On a GPU a step is launched while the one before it is computed: the next one's tokens are
    chosen by then, but known only to the device. Sequences whose next token depends on the last
    one by more than that, through a guide or a penalty, make each step wait for the one before it.

    Args:
        config: all that it is to be.
        phases: told of each phase of the start.
        tokenizer: the checkpoint's tokenizer.json, for guided sequences; None refuses them.

    Raises:
        ConfigError: the checkpoint, a knob or the machine cannot be served; says why.
    """

    def __init__(
        self,
        config: EngineConfig,
        phases: Phases | None = None,
        tokenizer: Path | None = None,
    ) -> None:
        built = build(config, phases or Phases())
        self.model_config = built.model_config
        self.max_context = built.max_context
        self._adapters = {name: number for number, name in enumerate(built.adapters, 1)}
        self.tree = PrefixTree(PagePool(built.pages), config.page_size)
        self._runner = built.runner
        self.scheduler = Scheduler(
            self.tree,
            config.page_size,
            config.max_sequences,
            config.step_tokens,
            config.chunk_tokens,
        )
        self._batches = Batches(self.scheduler.slots, config.page_size)
        self._sequences: dict[SequenceKey, Sequence] = {}
        self._launched: Launched | None = None
        """the step whose tokens are not known here yet"""
        self._told = (0, 0, 0)
        model = self.model_config
        self._guides = Guides(tokenizer, model.vocab_size, model.eos_ids) if tokenizer else None
        # On a thread of their own, since one may take half a second and all others would wait.
        self._compiler = ThreadPoolExecutor(1, "guides")
        self._compiling: dict[SequenceKey, Future[Guide]] = {}
        """of sequences that no scheduler knows of yet"""

    @property
    def busy(self) -> bool:
        """Whether a step has anything to compute."""
        return bool(self._sequences) or self._launched is not None

    @property
    def runs_ahead(self) -> bool:
        """Whether a device computes steps while the host goes on."""
        return self._runner.runs_ahead

    def add(self, key: SequenceKey, prompt: list[int], params: SamplingParams) -> None:
        """Queue a new sequence.

        Raises:
            BadRequest: it cannot run; says what was given and what is allowed.
        """
        if key in self._sequences:
            raise BadRequest(f"request {key[1]} is already running")
        if not prompt:
            raise BadRequest("the prompt is empty; give at least one token")
        if len(prompt) + params.max_tokens > self.max_context:
            raise BadRequest(
                f"{len(prompt)} prompt tokens and max_tokens={params.max_tokens} are more than "
                f"the context of {self.max_context} tokens"
            )
        named = max(*prompt, *_tokens_named(params))
        if named >= self.model_config.vocab_size:
            raise BadRequest(
                f"token id {named} is outside the vocabulary of "
                f"{self.model_config.vocab_size} tokens"
            )
        end_ids = self.model_config.eos_ids if params.end_ids is None else params.end_ids
        ending = (*params.stop_token_ids, *(() if params.ignore_eos else end_ids))
        if params.guide and self._guides is None:
            raise BadRequest("guided decoding needs the checkpoint's tokenizer")
        # A checkpoint may name ends that its logits do not reach.
        reachable = frozenset(token for token in ending if token < self.model_config.vocab_size)
        adapter = self._adapter_of(params.lora_name)
        self._sequences[key] = Sequence(key, list(prompt), params, reachable, adapter=adapter)
        if params.guide and self._guides is not None:
            self._compiling[key] = self._compiler.submit(self._guides.start, params.guide)
        else:
            self.scheduler.add(self._sequences[key])

    def _adapter_of(self, name: str) -> int:
        if not name:
            return 0
        if name not in self._adapters:
            known = f"known are {', '.join(self._adapters)}" if self._adapters else "it has none"
            raise BadRequest(f"lora_name={name!r} is no adapter of this model; {known}")
        return self._adapters[name]

    def abort(self, key: SequenceKey) -> bool:
        """End a sequence and free its pages; false if there is no such sequence any more."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return False
        if (compiling := self._compiling.pop(key, None)) is not None:
            compiling.cancel()
        else:
            self.scheduler.remove(sequence)
        return True

    def keys_of(self, front_end: bytes) -> list[SequenceKey]:
        return [key for key in self._sequences if key[0] == front_end]

    def stats(self) -> Stats:
        """How it is, with what has been counted since the last call."""
        scheduler = self.scheduler
        counted = (
            scheduler.num_preemptions,
            scheduler.num_prompt_tokens,
            scheduler.num_reused_tokens,
        )
        new = [now - told for now, told in zip(counted, self._told, strict=True)]
        self._told = counted
        running = len(scheduler.running)
        return Stats(
            running=running,
            waiting=len(self._sequences) - running,
            cache_usage=1.0 - self.tree.free / self.tree.usable,
            preemptions=new[0],
            prompt_tokens=new[1],
            reused_tokens=new[2],
        )

    def step(self) -> Outputs:
        """Launch a step; what the one before it gave each sequence that has a new token."""
        outputs = Outputs(self.scheduler.slots.front_ends)
        outputs.others += self._take_guides()
        if self._launched is not None and self._launched.looks_back:
            self._collect(outputs)
        launched = None
        if chunks := self.scheduler.schedule():
            try:
                launched = self._launch(chunks)
            except torch.AcceleratorError:  # after which nothing on the device can be relied on
                raise
            except Exception as error:  # what one sequence did to a step must not end the engine
                self._runner.check_device()  # a library may have called such an error its own
                log.exception("a step of %d sequences failed", len(chunks))
                failed = [self.scheduler.slots.at(slot) for slot in chunks.slots.tolist()]
                outputs.others += [self._give_up(sequence, error) for sequence in failed]
                # Pages that the step was to fill, and that others would have read, among them.
                self.tree.forget()
        self._collect(outputs)
        self._launched = launched
        if not self._runner.runs_ahead:
            self._collect(outputs)
        return outputs

    def _launch(self, chunks: Chunks) -> Launched:
        launched = self._runner.launch(self._batches.of(chunks))
        slots = self.scheduler.slots
        slots.cached[chunks.slots] += chunks.counts
        slots.pending[launched.slots] += 1
        return launched

    def _collect(self, outputs: Outputs) -> None:
        """Add what the launched step gave, once it is computed; nothing if there is none."""
        launched, self._launched = self._launched, None
        if launched is None:
            return
        tokens, logprobs = launched.wait()
        slots = self.scheduler.slots
        # The others have stopped meanwhile, to go on later or for good.
        runs = slots.entries[launched.slots] == launched.entries
        own, new = launched.slots[runs], tokens[runs]
        slots.pending[own] -= 1
        slots.append(own, new)
        is_last = slots.known[own] == slots.limits[own]
        apart = is_last | slots.ended(own, new) | slots.apart[own]
        said, told = own[~apart], new[~apart]
        outputs.columns = Tokens(slots.owners[said], slots.requests[said], told)
        runs[runs] = ~apart
        for row in np.flatnonzero(~runs).tolist():
            sequence, token = launched.sequences[row], int(tokens[row])
            # It may have ended, and even another have come by its name.
            if not self._is_running(sequence):
                continue
            if sequence.slot < 0:
                sequence.take_late(token)
            dead_end = launched.dead_ends.get(row, "")
            outputs.others.append(self._tell(sequence, token, logprobs.get(row), dead_end))

    def _is_running(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.key) is sequence

    def _tell(
        self,
        sequence: Sequence,
        token: int,
        logprobs: list[TokenLogprob] | None,
        dead_end: str,
    ) -> tuple[SequenceKey, Output]:
        """What a sequence gets with its newest token, that may be its last."""
        key = sequence.key
        if sequence.guide is not None and (failed := self._follow_guide(sequence, token, dead_end)):
            return key, failed
        if (finish := _finish_reason(sequence, token)) is not None:
            self.abort(key)
        return key, Output(key[1], [token], None if logprobs is None else [logprobs], finish)

    def _take_guides(self) -> list[tuple[SequenceKey, Output]]:
        """Queue the sequences whose guides have been compiled; what those get that cannot be."""
        refused = []
        if self._compiling and len(self._compiling) == len(self._sequences):
            # Nothing else to do: wait, or else the loop would only ask again.
            wait(self._compiling.values(), timeout=COMPILE_WAIT_S, return_when=FIRST_COMPLETED)
        for key in [key for key, compiling in self._compiling.items() if compiling.done()]:
            try:
                self._sequences[key].guide = self._compiling[key].result()
            except Exception as error:
                self.abort(key)
                refused.append((key, Output(key[1], [], None, "refused", str(error))))
            else:
                del self._compiling[key]
                self.scheduler.add(self._sequences[key])
        return refused

    def generate(
        self, prompts: Iterable[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[Generation]:
        """Run prompts to their end, in one batch with whatever else is running."""
        prompts = list(prompts)
        each = params if isinstance(params, list) else [params] * len(prompts)
        outputs: dict[SequenceKey, list[Output]] = {(b"", i): [] for i in range(len(prompts))}
        for key, prompt, own in zip(outputs, prompts, each, strict=True):
            self.add(key, prompt, own)
        while self.busy:
            for key, output in self.step():
                outputs[key].append(output)
        return [
            Generation(
                tokens=[token for one in steps for token in one.tokens],
                logprobs=[row[0].logprob for one in steps for row in one.logprobs or ()],
                finish=steps[-1].finish or "failed",
            )
            for steps in outputs.values()
        ]

    def _give_up(self, sequence: Sequence, error: Exception) -> tuple[SequenceKey, Output]:
        self.abort(sequence.key)
        reason = f"the engine could not compute it: {error!r}; the server's log has more"
        return sequence.key, Output(sequence.key[1], [], None, "failed", reason)

    def _follow_guide(self, sequence: Sequence, token: int, dead_end: str) -> Output | None:
        """Have a sequence's guide take its next token; what it gets where that cannot be."""
        assert sequence.guide is not None
        try:
            if dead_end:
                raise DeadEnd(dead_end)
            sequence.guide.advance(token)
        except (DeadEnd, ValueError) as error:
            self.abort(sequence.key)
            reason = f"its guide cannot be followed any further: {error}"
            return Output(sequence.key[1], [], None, "failed", reason)
        return None


def _finish_reason(sequence: Sequence, token: int) -> FinishReason | None:
    """Why a sequence ends with this token, its last; None if it goes on."""
    if token in sequence.end_ids:
        return "stop"
    if sequence.guide is not None:
        if token in sequence.guide.eos_ids:
            return "stop"
        if sequence.guide.is_complete:
            return "complete"
    if len(sequence.tokens) == sequence.max_length:
        return "length"
    return None


def _tokens_named(params: SamplingParams) -> Iterable[int]:
    """Tokens that parameters name and that have a logit to change."""
    bad = itertools.chain(*params.bad_tokens)
    return (*params.logit_bias, *bad, *params.stop_token_ids, *(params.end_ids or ()), 0)
