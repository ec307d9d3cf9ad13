"""What the engine gives a request, to the tensors that its client reads."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fi_runtime.config import MAX_INT32
from fi_runtime.frontend.errors import RequestError
from fi_runtime.frontend.requests import Request
from fi_runtime.frontend.text import StopStrings, TextStream
from fi_runtime.messages import Output, TokenLogprob

Tensors = dict[str, npt.NDArray[Any]]

REASONS: dict[str, str] = {"complete": "stop"}
"""What clients are told, where it is not the engine's own word."""


@dataclass(frozen=True)
class Grouping:
    """How many new tokens of an answer a streamed response has."""

    least: int = 1
    """all but the last response"""
    most: int = MAX_INT32


class _Piece(msgspec.Struct):
    """A token that no response has been sent for yet."""

    token: int
    logprobs: list[TokenLogprob]
    """its own first; empty where nobody asked"""
    is_text: bool
    """false if it ends the text without being part of it"""
    text: str = ""
    """that it completed, where stop strings are looked for"""


class _Group(msgspec.Struct, frozen=True):
    """What one response says of a sample."""

    text: str
    tokens: list[int]
    logprobs: list[list[TokenLogprob]]
    cumulative_logprob: float
    finish: str
    """empty before the sample's last token"""


class Answer:
    """One request's answer while it grows: takes the engine's outputs, gives responses.

    Has as many samples as the request asked for. Not safe for use by several threads.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, grouping: Grouping) -> None:
        self._flags = request.flags
        self._grouping = grouping
        self._prompt_length = len(request.prompt)
        self._wants_logprobs = request.logprobs
        self._tokenizer = tokenizer
        self._samples = [
            _Sample(request, params.min_tokens, tokenizer) for params in request.samples
        ]
        self.is_over = False
        """whether its last response has been taken"""

    def take(self, sample: int, output: Output) -> bool:
        """Add an output of the engine to a sample; whether that sample is complete.

        What comes after its end is left out.

        Raises:
            RequestError: the engine could not go on with the request.
        """
        if output.finish == "refused":
            raise RequestError("INVALID_ARG", output.error)
        if output.finish == "failed":
            raise RequestError("INTERNAL", output.error)
        if output.finish == "cancelled":
            raise RequestError("CANCELLED", "the request was cancelled")
        growing = self._samples[sample]
        growing.take(output)
        return bool(growing.finish)

    @property
    def has_response(self) -> bool:
        """Whether there is a response to send: when streaming for new tokens, else at the end."""
        if self.is_over:
            return False
        if self._flags.stream:
            for sample in self._samples:
                if len(sample.new) >= self._grouping.least:
                    return True
        return all(sample.finish for sample in self._samples)

    def response(self) -> Tensors:
        """The output tensors for the next group of tokens; (samples,) unless said."""
        flags = self._flags
        most = self._grouping.most if flags.stream else MAX_INT32
        groups = [sample.next_group(most) for sample in self._samples]
        self.is_over = all(group.finish for group in groups)
        tensors: Tensors = {"text_output": _strings([group.text for group in groups])}
        if flags.return_finish_reason:
            tensors["finish_reason"] = _strings([group.finish or "None" for group in groups])
        if flags.return_cumulative_logprob:
            tensors["cumulative_logprob"] = _cumulative(groups)
        if flags.return_logprobs:
            tensors["logprobs"] = _strings([self._logprobs_json(g.logprobs) for g in groups])
        if flags.return_log_probs:
            tensors["cum_log_probs"] = _cumulative(groups)
            # (samples, most new tokens of one); what a shorter one lacks is 0
            tensors["output_log_probs"] = _padded(
                [[row[0].logprob for row in group.logprobs] for group in groups]
            )
        if flags.return_num_input_tokens:
            tensors["num_input_tokens"] = np.array([self._prompt_length], dtype=np.uint32)  # (1,)
        if flags.return_num_output_tokens:
            counts = [len(group.tokens) for group in groups]
            tensors["num_output_tokens"] = np.array(counts, dtype=np.uint32)
        if flags.return_token_ids:
            # (new tokens of all samples,), one after another
            tensors["token_ids"] = np.array(
                [token for group in groups for token in group.tokens], dtype=np.int32
            )
        return tensors

    def _logprobs_json(self, rows: list[list[TokenLogprob]]) -> str:
        """In vLLM's form: for each token an object by token id; "null" where none was asked for."""
        if not self._wants_logprobs:
            return "null"
        return msgspec.json.encode(
            [
                {
                    str(one.token): {
                        "logprob": one.logprob,
                        "rank": one.rank,
                        "decoded_token": self._tokenizer.decode(
                            [one.token], skip_special_tokens=False
                        ),
                    }
                    for one in row
                }
                for row in rows
            ]
        ).decode()


class _Sample:
    """One of the answers to a prompt."""

    def __init__(self, request: Request, min_tokens: int, tokenizer: Tokenizer) -> None:
        self._text = TextStream(tokenizer, request.prompt, request.skip_special_tokens)
        self._stops = StopStrings(request.stop, request.include_stop)
        self._has_stops = bool(request.stop)
        self._include_stop = request.include_stop
        """whether the token or string that ends it is part of the text"""
        self._min_tokens = min_tokens
        self._count = 0
        self._before = request.echo
        """text to send before the first token's"""
        self._cumulative_logprob = 0.0
        self.new: deque[_Piece] = deque()
        self.finish = ""
        """why it is complete, once it is"""

    def take(self, output: Output) -> None:
        for index, token in enumerate(output.tokens):
            if self.finish:
                return
            logprobs = [] if output.logprobs is None else output.logprobs[index]
            finish = output.finish if index == len(output.tokens) - 1 else None
            piece = _Piece(token, logprobs, finish != "stop" or self._include_stop)
            self.new.append(piece)
            # Nobody else needs the text before it is sent, and it is cheaper for many tokens.
            if self._has_stops:
                self._search(piece, is_last=finish is not None)
            if finish is not None and not self.finish:
                self.finish = REASONS.get(finish, finish)

    def next_group(self, most: int) -> _Group:
        """The first tokens that are new, and no longer are."""
        pieces = [self.new.popleft() for _ in range(min(most, len(self.new)))]
        finish = "" if self.new else self.finish
        text, self._before = self._before, ""
        if self._has_stops:
            text += "".join([piece.text for piece in pieces])
        else:
            text += self._text.feed_all([piece.token for piece in pieces if piece.is_text])
            if finish:
                text += self._text.flush()
        logprobs = [piece.logprobs for piece in pieces if piece.logprobs]
        if logprobs:
            self._cumulative_logprob += sum(row[0].logprob for row in logprobs)
        return _Group(
            text=text,
            tokens=[piece.token for piece in pieces],
            logprobs=logprobs,
            cumulative_logprob=self._cumulative_logprob,
            finish=finish,
        )

    def _search(self, piece: _Piece, is_last: bool) -> None:
        """Give a piece its text, up to the stop string that ends it."""
        self._count += 1
        if piece.is_text:
            piece.text = self._cut(self._text.feed(piece.token))
        if is_last and not self.finish:
            piece.text += self._cut(self._text.flush()) + self._stops.flush()

    def _cut(self, text: str) -> str:
        """The text that may be sent, up to the stop string that ends it."""
        if self._count <= self._min_tokens:
            return self._stops.skip(text)
        text, stopped = self._stops.feed(text)
        if stopped:
            self.finish = "stop"
        return text


def _padded(rows: list[list[float]]) -> npt.NDArray[np.float32]:
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.float32)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def _cumulative(groups: list[_Group]) -> npt.NDArray[np.float32]:
    return np.array([group.cumulative_logprob for group in groups], dtype=np.float32)


def _strings(values: list[str]) -> npt.NDArray[np.object_]:
    return np.array([value.encode() for value in values], dtype=np.object_)
