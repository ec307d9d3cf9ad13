"""What the engine gives a request, to the tensors that its client reads."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fi_runtime.frontend.errors import RequestError
from fi_runtime.frontend.requests import Request
from fi_runtime.frontend.text import StopStrings, TextStream
from fi_runtime.messages import Output, TokenLogprob

Tensors = dict[str, npt.NDArray[Any]]

REASONS = {"complete": "stop"}
"""What clients are told, where it is not the engine's own word."""


@dataclass
class _Group:
    """Tokens that no response has been sent for yet."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)


class Answer:
    """One request's answer while it grows: takes the engine's outputs, gives responses.

    Has as many samples as the request asked for. Not safe for use by several threads.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self._flags = request.flags
        self._prompt_length = len(request.prompt)
        self._wants_logprobs = request.logprobs
        self._tokenizer = tokenizer
        self._samples = [
            _Sample(request, params.min_tokens, tokenizer) for params in request.samples
        ]

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
        self._samples[sample].take(output)
        return bool(self._samples[sample].finish)

    @property
    def is_complete(self) -> bool:
        return all(sample.finish for sample in self._samples)

    @property
    def has_response(self) -> bool:
        """Whether there is a response to send: when streaming for any token, else at the end."""
        new = any(sample.group.tokens for sample in self._samples)
        return self.is_complete or (self._flags.stream and new)

    def response(self) -> Tensors:
        """The output tensors for all tokens since the last call; (samples,) unless said."""
        flags, samples = self._flags, self._samples
        groups = [sample.take_group() for sample in samples]
        tensors: Tensors = {"text_output": _strings(group.text for group in groups)}
        if flags.return_finish_reason:
            tensors["finish_reason"] = _strings(sample.finish or "None" for sample in samples)
        cumulative = np.array([s.cumulative_logprob for s in samples], dtype=np.float32)
        if flags.return_cumulative_logprob:
            tensors["cumulative_logprob"] = cumulative
        if flags.return_logprobs:
            tensors["logprobs"] = _strings(self._logprobs_json(g.logprobs) for g in groups)
        if flags.return_log_probs:
            tensors["cum_log_probs"] = cumulative
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
        self._min_tokens = min_tokens
        self._count = 0
        self.group = _Group(text=request.echo)
        self.cumulative_logprob = 0.0
        self.finish = ""
        """why it is complete, once it is"""

    def take(self, output: Output) -> None:
        for index, token in enumerate(output.tokens):
            if self.finish:
                return
            self._count += 1
            self.group.tokens.append(token)
            if output.logprobs is not None:
                self.group.logprobs.append(output.logprobs[index])
                self.cumulative_logprob += output.logprobs[index][0].logprob
            if output.finish == "stop" and index == len(output.tokens) - 1:
                continue  # the token that stopped it is counted, but no part of the text
            text = self._text.feed(token)
            if self._count <= self._min_tokens:
                self.group.text += text
            else:
                self._search(text)
        if output.finish is not None and not self.finish:
            self._search(self._text.flush())
            self.group.text += self._stops.flush()
            self.finish = self.finish or REASONS.get(output.finish, output.finish)

    def take_group(self) -> _Group:
        """What is new since the last call."""
        group, self.group = self.group, _Group()
        return group

    def _search(self, text: str) -> None:
        found, stopped = self._stops.feed(text)
        self.group.text += found
        if stopped:
            self.finish = "stop"


def _padded(rows: list[list[float]]) -> npt.NDArray[np.float32]:
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.float32)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def _strings(values: Iterable[str]) -> npt.NDArray[np.object_]:
    return np.array([value.encode() for value in values], dtype=np.object_)
