"""Guided decoding: which tokens a schema, a regex or a grammar lets follow."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLMatcher, LLTokenizer

from fi_runtime.guide_checker import LIMITS
from fi_runtime.tokenizer import load_tokenizer
from fi_runtime.upload import upload

Words = npt.NDArray[np.uint32]
"""A bit for each token, the lowest first"""

END = "<|end of the guide|>"
"""Stands for all of a model's end-of-sequence tokens, which may be none or unknown to its
tokenizer; llguidance needs one."""


CLOSING = '}],"1234567890:tnf[{'
"""What JSON is ended with soonest: the first that is allowed at each place"""
RESERVE = 16
"""tokens: JSON is ended that much sooner than it must be, since one token may begin what takes
several to end"""
MOST_TO_END = 256
"""tokens that an ending is looked for with: with a large vocabulary some milliseconds, for which
all sequences wait"""
LOOK_AGAIN = 64
"""tokens after which it is looked again where none was found"""
AN_END = -1
"""in a list of tokens: any that ends a sequence"""


class DeadEnd(Exception):
    """No token of the vocabulary may follow."""


def mask_words(vocab_size: int) -> int:
    """Length of a row of a mask."""
    return -(-vocab_size // 32)


@dataclass(frozen=True)
class _Vocabulary:
    tokenizer: LLTokenizer
    """with END as its last token"""
    end: int
    keep: Words
    """(mask_words,): tokens that may be text, which END and the ends of a sequence are not"""
    ends: Words
    """(mask_words,): those that end a sequence"""
    eos_ids: frozenset[int]
    closing: dict[str, int]
    """the tokens of ``CLOSING`` that there are"""

    def text_of(self, matcher: LLMatcher) -> tuple[Words, bool]:
        """Tokens of text that may follow, (mask_words,), and whether an end may."""
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)
        text = np.zeros_like(self.keep)
        shared = min(len(mask), len(text))
        text[:shared] = mask[:shared] & self.keep[:shared]
        return text, _holds(mask, self.end)

    def toward_end(self, allowed: Words) -> int | None:
        """The allowed token that JSON is probably ended with soonest; None: none is allowed."""
        there = [one for one, token in self.closing.items() if _holds(allowed, token)]
        if there[:2] == [*"}]"]:  # only within a string may both stand
            there = [one for one in there if one not in "}],"]
        if there:
            return self.closing[there[0]]
        [some] = np.nonzero(allowed)
        if not len(some):
            return None
        lowest = int(allowed[some[0]])
        return 32 * int(some[0]) + (lowest & -lowest).bit_length() - 1


class Guides:
    """What guides of one model share. Built at the first use: it takes up to a second.

    Args:
        tokenizer_file: its tokenizer.json.
        vocab_size: the width of the logits.
        eos_ids: tokens that end a sequence; any number of them.
    """

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self._file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)

    def start(self, guide: str) -> "Guide":
        """A guide at its beginning.

        Args:
            guide: llguidance's serialised grammar, which ``fi_runtime.frontend.guides`` makes and
                has checked: one that was not can take minutes, or end the process.

        Raises:
            ValueError: it does not compile, no token of this vocabulary begins it, or llguidance
                cannot read the tokenizer; says why.
        """
        matcher = LLMatcher(self._vocabulary.tokenizer, guide, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise ValueError(f"the guide does not compile: {_first_line(matcher)}")
        made = Guide(matcher, self._vocabulary, _is_json(guide))
        try:
            made.fill(np.empty(mask_words(self._vocab_size), dtype=np.int32))
        except DeadEnd as error:
            raise ValueError(f"the guide cannot begin: {error}") from None
        return made

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        tokenizer = load_tokenizer(self._file)
        tokenizer.add_special_tokens([END])
        end = tokenizer.token_to_id(END)
        assert end is not None
        try:
            made = LLTokenizer(tokenizer.to_str(), eos_token=end)
        except ValueError as error:
            raise ValueError(f"guides cannot be used with {self._file}: {error}") from error
        keep = np.arange(32 * mask_words(self._vocab_size)) < self._vocab_size
        ends = np.zeros_like(keep)
        ends[[token for token in self._eos_ids if token < self._vocab_size]] = True
        keep &= ~ends
        keep[end : end + 1] = False
        reachable = frozenset(token for token in self._eos_ids if token < self._vocab_size)
        closing = {}
        for character in CLOSING:
            whole = tokenizer.token_to_id(character)
            parts = made.greedy_tokenize(character) if whole is None else [whole]
            if len(parts) == 1:
                closing[character] = parts[0]
        return _Vocabulary(made, end, _packed(keep), _packed(ends), reachable, closing)


class Guide:
    """What has been generated of a guided sequence, and what may follow.

    Where the text that follows is settled, only the tokens that the tokenizer writes it with are
    allowed. Not for two threads at once.

    Args:
        is_json: it is of a schema, and worth nothing unless it is whole.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary, is_json: bool) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._is_json = is_json
        self._ended = False
        self._next: tuple[Words, bool] | None = None
        """tokens of text that may follow, and whether an end may; None until asked for"""
        self._ending: list[int] | None = None
        """tokens that would end it from here, AN_END for the last; None: not known"""
        self._reserve: int | None = None
        """``RESERVE``, or less where there are few tokens from the beginning"""
        self._look_at = math.inf
        """tokens left at which an ending is to be looked for"""

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """Write the mask of the tokens that may come next.

        Args:
            row: (mask_words(vocab_size),); its bits are set for tokens that are allowed. Those of
                end-of-sequence tokens are set exactly where the guide may end, whatever text such
                a token stands for; those beyond the vocabulary never.

        Raises:
            DeadEnd: nothing may follow, so that the sequence has to be given up: the grammar leads
                nowhere, its text cannot be written with the vocabulary, or it became too complex;
                or the guide is complete and there is no end-of-sequence token. The row is zero.
        """
        row[:] = 0
        text, may_end = self._allowed()
        allowed = text | self._vocabulary.ends if may_end else text
        if not allowed.any():
            raise DeadEnd(
                "it is complete, and the model has no end-of-sequence token"
                if may_end
                else "its text cannot be written with the tokens of the model"
            )
        row[:] = allowed.view(np.int32)

    def advance(self, token: int) -> None:
        """Take the token that was chosen.

        Raises:
            ValueError: it was not allowed.
        """
        if self._ended:
            taken = False
        elif token in self._vocabulary.eos_ids:
            taken = self._ended = self._matcher.is_accepting()
        else:
            taken = token != self._vocabulary.end and self._matcher.consume_token(token)
        if not taken:
            raise ValueError(f"token {token} is not allowed by the guide")
        self._next = None
        self._ending = self._ending[1:] if self._ending and self._ending[0] == token else None

    @property
    def eos_ids(self) -> frozenset[int]:
        """The model's end-of-sequence tokens, of which each ends it."""
        return self._vocabulary.eos_ids

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can follow: the sequence has to finish."""
        if self._ended:
            return True
        if self._matcher.is_error() or not self._matcher.is_accepting():
            return False
        try:
            text, may_end = self._allowed()
        except DeadEnd:  # for fill to tell
            return False
        return may_end and not text.any()

    def narrow(self, row: npt.NDArray[np.int32], left: int) -> bool:
        """Leave only what ends JSON in time, where few tokens are left; whether that is so now.

        Where there is no such end nothing is left out.

        Args:
            row: of ``fill``.
            left: tokens that may come, this one among them.
        """
        if not self._is_json or self._ended:
            return False
        if self._ending is None and left <= self._look_at:
            self._ending = self._soonest_end(min(left, MOST_TO_END))
            if self._ending is None:
                self._look_at = left - LOOK_AGAIN
        if not self._ending:
            return False
        if self._reserve is None:
            self._reserve = min(RESERVE, (left - len(self._ending)) // 2)
        spare = left - len(self._ending) - self._reserve
        # Most tokens add one to an ending at most.
        self._look_at = left - max(1, spare // 2)
        if spare > 0:
            return False
        token, ends = self._ending[0], self._vocabulary.ends
        row[:] = (ends if token == AN_END else _only(token, len(row))).view(np.int32)
        return True

    def _soonest_end(self, most: int) -> list[int] | None:
        """Tokens that end the guide from here, few if not the fewest; None: not within ``most``."""
        matcher, vocabulary = self._matcher.deep_copy(), self._vocabulary
        tokens: list[int] = []
        while not matcher.is_accepting():
            text, _ = vocabulary.text_of(matcher)
            token = vocabulary.toward_end(text)
            if token is None or len(tokens) == most or not matcher.consume_token(token):
                return None
            tokens.append(token)
        if vocabulary.eos_ids:
            tokens.append(AN_END)
        return tokens if len(tokens) <= most else None

    def _allowed(self) -> tuple[Words, bool]:
        if self._ended:
            return np.zeros_like(self._vocabulary.keep), True
        if self._next is None:
            allowed = self._vocabulary.text_of(self._matcher)
            if self._matcher.is_error():
                raise DeadEnd(_first_line(self._matcher))
            self._next = allowed
        return self._next


def apply(logits: torch.Tensor, rows: list[int], masks: npt.NDArray[np.int32]) -> None:
    """Set the logits of tokens that are not allowed to -inf, in place.

    Args:
        logits: (sequences, vocab), floating point, on any device.
        rows: (guided,), those of the logits that have masks, each once.
        masks: (guided, mask_words(vocab)), of ``Guide.fill``. The logits of an empty one are left
            as they are: nothing could be drawn from a row without a finite value. Its sequence has
            met a dead end, and whatever is drawn for it has to be thrown away.
    """
    filled = np.where(masks.any(axis=1, keepdims=True), masks, np.int32(-1))
    octets = upload(filled.view(np.uint8), logits.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (octets[:, :, None] >> shifts & 1).flatten(1)[:, : logits.shape[1]]
    at = upload(np.array(rows, dtype=np.int64), logits.device)
    masked = logits.index_select(0, at).masked_fill_(allowed == 0, float("-inf"))
    logits.index_copy_(0, at, masked)


def guided(
    logits: torch.Tensor,
    edited: torch.Tensor,
    guides: Sequence[Guide | None],
    left: Sequence[int],
) -> tuple[torch.Tensor, dict[int, str]]:
    """The edited logits of tokens that each row's guide allows, if it has one.

    Where what a request bans beside leaves nothing that its guide allows, the guide alone counts.
    Where few tokens are left for JSON, only those that end it in time are, unless it bans them.
    The masks are made while the device still computes the logits.

    Args:
        logits: (rows, vocab), as the model gave them; stay as they are.
        edited: (rows, vocab), with biases, bans and penalties; stay as they are, too.
        guides: of each row.
        left: tokens that each row may still get, this one among them.

    Returns:
        (rows, vocab), and why there is a dead end for rows that have met one.
    """
    dead_ends = {}
    rows = [row for row, guide in enumerate(guides) if guide is not None]
    masks = np.zeros((len(rows), mask_words(logits.shape[1])), dtype=np.int32)
    narrowed = masks.copy()
    narrow = False
    for place, row in enumerate(rows):
        guide = guides[row]
        assert guide is not None
        try:
            guide.fill(masks[place])
        except DeadEnd as error:
            dead_ends[row] = str(error)
        narrowed[place] = masks[place]
        narrow |= row not in dead_ends and guide.narrow(narrowed[place], left[row])
    result = edited.clone()
    apply(result, rows, masks)
    if edited is not logits:
        alone = logits.clone()
        apply(alone, rows, masks)
        result = _unless_empty(result, alone)
    if narrow:
        ending = result.clone()
        apply(ending, rows, narrowed)
        result = _unless_empty(ending, result)
    return result, dead_ends


def _unless_empty(logits: torch.Tensor, instead: torch.Tensor) -> torch.Tensor:
    """The logits, but others in rows of which nothing is left: (rows, vocab) each."""
    empty = logits.amax(dim=-1, keepdim=True) == float("-inf")
    return torch.where(empty, instead, logits)


def _is_json(grammar: str) -> bool:
    """Whether a serialised grammar is of a JSON schema; others may be Lark's text."""
    try:
        found = json.loads(grammar)
    except ValueError:
        return False
    return any(one.get("json_schema") is not None for one in found["grammars"])


def _only(token: int, words: int) -> Words:
    mask = np.zeros(words, dtype=np.uint32)
    mask[token // 32] = np.uint32(1 << token % 32)
    return mask


def _holds(mask: Words, token: int) -> bool:
    return token // 32 < len(mask) and bool(int(mask[token // 32]) >> token % 32 & 1)


def _packed(bits: npt.NDArray[np.bool_]) -> Words:
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _first_line(matcher: LLMatcher) -> str:
    return matcher.get_error().partition("\n")[0]
