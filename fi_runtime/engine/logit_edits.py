"""What requests change of the model's logits before a token is chosen."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch

from fi_runtime.engine.sequence import Sequence
from fi_runtime.upload import upload

Int64s = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]
NEVER = float("-inf")


def edited(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """The logits with every sequence's biases, bans and penalties, in vLLM's order.

    First biases and what must not come now: tokens that would end a sequence before its
    ``min_tokens``, and those that would complete one of its ``bad_tokens``. Then the repetition
    penalty, on all tokens there are. Then frequency and presence penalties, on the output.

    Args:
        logits: (rows, vocab), floating point; stays as it is.
        sequences: of each row.

    Returns:
        (rows, vocab), float32; ``logits`` itself where nothing is asked for.
    """
    # Most ask for nothing, and every step comes by here.
    asking = [(row, one) for row, one in enumerate(sequences) if one.looks_back]
    if not asking:
        return logits
    edits = _Sparse(), _Sparse(), _Sparse()
    for row, sequence in asking:
        for edit, (tokens, values) in zip(edits, _edits_of(sequence), strict=True):
            edit.add(row, tokens, values)
    if not any(edits):
        return logits
    biases, repetition, output = edits
    result = logits.to(torch.float32, copy=True)
    device = logits.device
    if biases:
        result.index_put_(*biases.on(device), accumulate=True)
    if repetition:
        at, penalty = repetition.on(device)
        old = result[at]
        result[at] = torch.where(old > 0, old / penalty, old * penalty)
    if output:
        result.index_put_(*output.on(device), accumulate=True)
    return result


class _Sparse:
    """Values for some tokens of some rows."""

    def __init__(self) -> None:
        self._rows: list[Int64s] = []
        self._tokens: list[Int64s] = []
        self._values: list[Float32s] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, tokens: Int64s, values: Float32s) -> None:
        if len(tokens):
            self._rows.append(np.full(len(tokens), row, dtype=np.int64))
            self._tokens.append(tokens)
            self._values.append(values)

    def on(self, device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Rows and tokens, (edits,) int64 each, and values, (edits,) float32."""
        rows, tokens, values = (
            upload(np.concatenate(parts), device)
            for parts in (self._rows, self._tokens, self._values)
        )
        return (rows, tokens), values


def _edits_of(sequence: Sequence) -> Iterator[tuple[Int64s, Float32s]]:
    """Tokens and values of each kind of edit, no token twice in one kind."""
    params = sequence.params
    yield _biases(sequence)
    if params.repetition_penalty == 1.0:
        yield _nothing()
    else:
        seen = np.unique(np.array(sequence.tokens, dtype=np.int64))
        yield seen, np.full(len(seen), params.repetition_penalty, dtype=np.float32)
    if params.frequency_penalty == params.presence_penalty == 0.0:
        yield _nothing()
    else:
        output = np.array(sequence.tokens[sequence.prompt_length :], dtype=np.int64)
        seen, counts = np.unique(output, return_counts=True)
        values = -params.frequency_penalty * counts - params.presence_penalty
        yield seen, values.astype(np.float32)


def _biases(sequence: Sequence) -> tuple[Int64s, Float32s]:
    params = sequence.params
    biases = dict(params.logit_bias)
    early = sequence.num_generated < params.min_tokens
    if early:
        biases |= dict.fromkeys(sequence.end_ids, NEVER)
    if sequence.guide is not None and (early or params.ignore_eos or params.end_ids is not None):
        # Which the guide would take for its end, though the request does not.
        biases |= dict.fromkeys(sequence.guide.eos_ids - sequence.end_ids, NEVER)
    for *before, last in params.bad_tokens:
        # Only what was generated counts: the prompt may say what it likes.
        start = len(sequence.tokens) - len(before)
        if start >= sequence.prompt_length and sequence.tokens[start:] == before:
            biases[last] = NEVER
    if not biases:
        return _nothing()
    return (
        np.array(list(biases), dtype=np.int64),
        np.array(list(biases.values()), dtype=np.float32),
    )


def _nothing() -> tuple[Int64s, Float32s]:
    return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
