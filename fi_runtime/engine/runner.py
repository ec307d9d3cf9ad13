"""Computes steps: fills their tensors, runs the model and chooses the tokens that follow."""

import itertools
from dataclasses import dataclass

import torch

from fi_runtime.attention.base import Attention, Int64s
from fi_runtime.engine import sampler
from fi_runtime.engine.batches import Batch
from fi_runtime.engine.download import TokenDownload, token_downloads
from fi_runtime.engine.guides import guided
from fi_runtime.engine.logit_edits import edited
from fi_runtime.engine.sequence import Sequence
from fi_runtime.engine.step_graphs import StepGraphs
from fi_runtime.kernels import sampling
from fi_runtime.messages import TokenLogprob
from fi_runtime.models import Decoder
from fi_runtime.upload import upload


@dataclass(frozen=True)
class Launched:
    """A step that the device computes, or has computed."""

    slots: Int64s
    """(sequences,), of those that get a token"""
    entries: Int64s
    """(sequences,): see ``Slots``"""
    sequences: list[Sequence]
    looks_back: bool
    """whether the next one of any is chosen by its tokens, this one among them"""
    dead_ends: dict[int, str]
    """of rows whose guides let no token follow, and why; their tokens mean nothing"""
    _tokens: TokenDownload
    _logprobs: sampler.Logprobs | None

    def wait(self) -> tuple[Int64s, dict[int, list[TokenLogprob]]]:
        """Each sequence's token, (sequences,), and the logprobs of rows that asked for them.

        Once they are here; the tokens until the next step is launched.
        """
        tokens: Int64s = self._tokens.wait().numpy()
        return tokens, {} if self._logprobs is None else self._logprobs.wait(tokens)


class Runner:
    """Launches steps, each of which may count on tokens that those before it choose.

    Args:
        last_tokens: (slots + 1,), int64: where the token chosen last in each slot is kept.
        graphs: that steps are replayed from.
    """

    def __init__(
        self,
        model: Decoder,
        attention: Attention,
        last_tokens: torch.Tensor,
        graphs: StepGraphs | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._device = model.embedding.device
        self._graphs = graphs or StepGraphs()
        self._last_tokens = last_tokens
        self._downloads = itertools.cycle(token_downloads(len(last_tokens) - 1, self._device))

    @property
    def runs_ahead(self) -> bool:
        """Whether a step is computed while the host goes on."""
        return self._device.type == "cuda"

    def check_device(self) -> None:
        """See that the device can still be relied on.

        Raises:
            torch.AcceleratorError: an error of the device has come to light.
        """
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).query()

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Have a batch computed, and a token chosen for each sequence that is to get one."""
        sequences = batch.sequences
        if not sequences:
            self._forward(batch)
            return Launched(batch.slots, batch.entries, [], False, {}, TokenDownload(), None)
        graphs = self._graphs.decode if batch.decodes else None
        if graphs is not None and graphs.fits(len(sequences)):
            logits = graphs.forward(
                batch.layout, batch.tokens, batch.slots, batch.draws, batch.adapters
            )
        else:
            graphs = None
            hidden = self._forward(batch)
            logits = self._model.logits(hidden[upload(batch.last_rows, self._device)])
        wanted, dead_ends = logits, dict[int, str]()
        if batch.looks_back:
            wanted = edited(logits, sequences)
            guides = [sequence.guide for sequence in sequences]
            if any(guides):
                left = [sequence.max_length - sequence.length for sequence in sequences]
                wanted, dead_ends = guided(logits, wanted, guides, left)
        if graphs is not None and wanted is logits:
            chosen = graphs.choose(batch.filtered, len(sequences))
        else:
            there = sampling.TokenSlots(self._last_tokens, upload(batch.slots, self._device))
            chosen = sampler.choose(wanted, batch.draws, there)
        return Launched(
            batch.slots,
            batch.entries,
            sequences,
            batch.looks_back,
            dead_ends,
            next(self._downloads).start(chosen),
            sampler.logprobs(logits, chosen, batch.logprobs),
        )

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states of all the step's tokens: (tokens, hidden)."""
        graphs, layout, tokens = self._graphs, batch.layout, batch.tokens
        if graphs.tokens is not None and graphs.tokens.fits(layout):
            return graphs.tokens.forward(layout, tokens, batch.adapters)
        if graphs.pieces is not None and graphs.pieces.fits(len(tokens)):
            return graphs.pieces.forward(layout, tokens, batch.adapters)
        self._attention.plan(layout)
        there = None if batch.adapters is None else upload(batch.adapters, self._device)
        uploaded = upload(tokens, self._device)
        return self._model(uploaded, self._last_tokens, self._attention, there)
