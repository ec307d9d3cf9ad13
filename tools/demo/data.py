"""Training data as token tensors.

Two kinds of rows. *Short* rows pack whole examples of every task one after another, plain or as the
turns of a chat. *Recall* rows are one list that may fill the context, followed by many questions:
an answer is three tokens, so that one question per list would teach almost nothing per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from tools.demo import tasks
from tools.demo.tokenizer import END_OF_TEXT, TURN_END, TURN_START

IGNORE = -100
"""The label of a token that is not to be learnt (torch's cross entropy skips it)."""

CHAT_SHARE = 0.3
"""The share of rows that are chats."""

ROWS_PER_SHARD = 2048
"""Rows that one worker makes from one seed: the data do not depend on the number of workers."""


@dataclass(frozen=True)
class Batch:
    """Token ids and labels, both (rows, length) int64; labels are aligned with ids, not shifted."""

    ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        return Batch(self.ids.to(device), self.labels.to(device))


# --- examples to rows -------------------------------------------------------------------------


def encode_examples(
    tokenizer: Tokenizer, examples: Sequence[tasks.Example], *, chat: bool
) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each example; the labels cover the answer and its end token."""
    prompts = [tasks.chat_text(e.prompt) if chat else e.prompt for e in examples]
    [end] = _encode(tokenizer, TURN_END if chat else END_OF_TEXT)
    tail = _encode(tokenizer, "\n") if chat else []
    encoded_prompts = tokenizer.encode_batch(prompts)
    encoded_answers = tokenizer.encode_batch([e.answer for e in examples])
    rows = []
    for prompt, answer in zip(encoded_prompts, encoded_answers, strict=True):
        learnt = [*answer.ids, end]
        ids = [*prompt.ids, *learnt, *tail]
        labels = [IGNORE] * len(prompt.ids) + learnt + [IGNORE] * len(tail)
        rows.append((ids, labels))
    return rows


def pad(rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """One row per example, padded on the right, where causal attention never looks."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORE)
    for row, (row_ids, row_labels) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, : len(row_labels)] = torch.tensor(row_labels)
    return Batch(ids, labels)


# --- short rows -------------------------------------------------------------------------------


class ShortRows:
    """A pool of packed short rows that lives on the device and is sampled with replacement."""

    def __init__(
        self, tokenizer: Tokenizer, rows: int, length: int, seed: int, device: torch.device
    ) -> None:
        shards = -(-rows // ROWS_PER_SHARD)
        make = partial(_make_shard, tokenizer.to_str(), length, seed)
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
            parts = list(workers.map(make, range(shards)))
        # Both (rows, length): 16 bits hold any id of the small vocabulary.
        self._ids = torch.from_numpy(np.concatenate([ids for ids, _ in parts])).to(device)
        self._labels = torch.from_numpy(np.concatenate([labels for _, labels in parts])).to(device)

    def sample(self, rows: int, generator: torch.Generator) -> Batch:
        """Draw `rows` random rows."""
        device = self._ids.device
        chosen = torch.randint(len(self._ids), (rows,), generator=generator, device=device)
        return Batch(self._ids[chosen].long(), self._labels[chosen].long())


def _make_shard(
    tokenizer_json: str, length: int, seed: int, shard: int
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Ids and labels, both (ROWS_PER_SHARD, length)."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rng = Random(f"train/{seed}/{shard}")
    plain = _encoded_stream(tokenizer, rng, chat=False)
    chats = _encoded_stream(tokenizer, rng, chat=True)
    ids = np.zeros((ROWS_PER_SHARD, length), np.int16)
    labels = np.full((ROWS_PER_SHARD, length), IGNORE, np.int16)
    for row in range(ROWS_PER_SHARD):
        stream = chats if rng.random() < CHAT_SHARE else plain
        filled = 0
        while filled < length:
            example_ids, example_labels = next(stream)
            end = min(filled + len(example_ids), length)
            ids[row, filled:end] = example_ids[: end - filled]
            labels[row, filled:end] = example_labels[: end - filled]
            filled = end
    return ids, labels


def _encoded_stream(
    tokenizer: Tokenizer, rng: Random, *, chat: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """Endless encoded training examples; encoding many at a time is what makes it fast."""
    sums = tasks.addition_pairs(held_out=False)
    while True:
        examples = [_training_example(rng, sums, chat=chat) for _ in range(1024)]
        yield from encode_examples(tokenizer, examples, chat=chat)


def _training_example(rng: Random, sums: Sequence[tuple[int, int]], *, chat: bool) -> tasks.Example:
    draw = rng.random()
    if draw < 0.5:
        return tasks.addition(*rng.choice(sums))
    if draw < 0.67:
        return tasks.copy(rng, rng.randint(1, tasks.MAX_WORDS))
    if draw < 0.84:
        return tasks.reverse(rng, rng.randint(1, tasks.MAX_WORDS))
    if draw < 0.9:
        return tasks.recall(rng, rng.randint(10, 60))
    # A plain story is learnt from its first word on; in a chat the user begins it.
    return tasks.split_story(tasks.story(rng), rng.randint(1, 3) if chat else 0)


# --- recall rows ------------------------------------------------------------------------------


class RecallRows:
    """Recall lists with many questions, made on the device with random numbers of its own."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        self._device = device
        self._words = self._tensor([tokenizer.encode(f" {word}").ids[0] for word in tasks.WORDS])
        self._digits = self._tensor([tokenizer.encode(digit).ids[0] for digit in "0123456789"])
        encode = partial(_encode, tokenizer)
        self._entry = encode(" apple=000,")
        self._separator = encode(";")[0]
        # What surrounds the list and each question; the value's place is after the question's tail.
        self._start = {False: encode("recall:"), True: encode(f"{TURN_START}user\nrecall:")}
        self._tail = {False: [], True: encode(f"{TURN_END}\n{TURN_START}assistant\n")}
        self._end = {False: encode(END_OF_TEXT), True: encode(TURN_END)}
        self._next = {False: encode(";"), True: encode(f"\n{TURN_START}user\n;")}

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, device=self._device)

    def question_tokens(self, *, chat: bool) -> int:
        """Tokens of one question with its answer and what leads to the next question."""
        return 2 + len(self._tail[chat]) + 3 + len(self._end[chat]) + len(self._next[chat])

    def sample(
        self, rows: int, entries: int, questions: int, *, chat: bool, generator: torch.Generator
    ) -> Batch:
        """Draw rows of one list of `entries` entries, asked for `questions` distinct keys."""
        device = self._device
        shuffled = torch.rand(rows, len(self._words), generator=generator, device=device).argsort(1)
        keys = self._words[shuffled[:, :entries]]  # (rows, entries)
        drawn = torch.randint(10, (rows, entries, 3), generator=generator, device=device)
        values = self._digits[drawn]  # (rows, entries, 3)
        asked = torch.rand(rows, entries, generator=generator, device=device).argsort(1)
        asked = asked[:, :questions]  # (rows, questions)

        start = self._tensor(self._start[chat]).expand(rows, -1)
        listed = self._tensor(self._entry).repeat(rows, entries, 1)  # (rows, entries, 6)
        listed[:, :, 0] = keys
        listed[:, :, 2:5] = values
        listed[:, -1, 5] = self._separator

        template = [*self._entry[:2], *self._tail[chat], *self._entry[2:5], *self._end[chat]]
        value_at = 2 + len(self._tail[chat])
        turns = self._tensor([*template, *self._next[chat]]).repeat(rows, questions, 1)
        turns[:, :, 0] = keys.gather(1, asked)
        turns[:, :, value_at : value_at + 3] = values.gather(1, asked[:, :, None].expand(-1, -1, 3))
        learnt = torch.full_like(turns, IGNORE)
        learnt[:, :, value_at : value_at + 4] = turns[:, :, value_at : value_at + 4]

        ids = torch.cat([start, listed.flatten(1), turns.flatten(1)], dim=1)
        labels = torch.full_like(ids, IGNORE)
        labels[:, -learnt[0].numel() :] = learnt.flatten(1)
        return Batch(ids, labels)

    def sample_length(
        self, rows: int, length: int, padded: int, rng: Random, generator: torch.Generator
    ) -> Batch:
        """Draw rows of about `length` tokens, a random part questions, padded to `padded`."""
        chat = rng.random() < CHAT_SHARE
        room = length - len(self._start[chat])
        each = self.question_tokens(chat=chat)
        questions = max(1, int(room * rng.uniform(0.02, 0.5)) // each)
        entries = min(max(1, (room - questions * each) // len(self._entry)), len(self._words))
        batch = self.sample(rows, entries, min(questions, entries), chat=chat, generator=generator)
        missing = (0, padded - batch.ids.shape[1])
        return Batch(
            torch.nn.functional.pad(batch.ids, missing),
            torch.nn.functional.pad(batch.labels, missing, value=IGNORE),
        )


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text).ids)
