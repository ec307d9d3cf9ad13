"""What the engine gives a request, to the tensors that its client reads."""

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fi_runtime.frontend.requests import Request, RequestError
from fi_runtime.frontend.text import StopStrings, TextStream
from fi_runtime.messages import Output, TokenLogprob

Tensors = dict[str, npt.NDArray[Any]]


@dataclass
class _Group:
    """Tokens that no response has been sent for yet."""

    text: str = ""
    count: int = 0
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)


class Answer:
    """One request's answer while it grows: takes the engine's outputs, gives responses.

    Not safe for use by several threads.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self._flags = request.flags
        self._prompt_length = len(request.prompt)
        self._wants_logprobs = request.logprobs
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, request.prompt)
        self._stops = StopStrings(request.stop)
        self._group = _Group(text=request.echo)
        self._cumulative_logprob = 0.0
        self.finish = ""
        """why the answer is complete, once it is"""

    def take(self, output: Output) -> None:
        """Add an output of the engine. What comes after the answer's end is left out.

        Raises:
            RequestError: the engine could not go on with the request.
        """
        if output.finish == "refused":
            raise RequestError("INVALID_ARG", output.error)
        if output.finish == "failed":
            raise RequestError("INTERNAL", output.error)
        if output.finish == "cancelled":
            raise RequestError("CANCELLED", "the request was cancelled")
        for index, token in enumerate(output.tokens):
            if self.finish:
                return
            self._group.count += 1
            if output.logprobs is not None:
                self._group.logprobs.append(output.logprobs[index])
                self._cumulative_logprob += output.logprobs[index][0].logprob
            if output.finish == "stop" and index == len(output.tokens) - 1:
                continue  # the token that stopped it is counted, but no part of the text
            text, stopped = self._stops.feed(self._text.feed(token))
            self._group.text += text
            if stopped:
                self.finish = "stop"
        if output.finish is not None and not self.finish:
            text, stopped = self._stops.feed(self._text.flush())
            self._group.text += text + self._stops.flush()
            self.finish = "stop" if stopped else output.finish

    @property
    def has_response(self) -> bool:
        """Whether there is a response to send: when streaming for any token, else at the end."""
        return bool(self.finish) or (self._flags.stream and self._group.count > 0)

    def response(self) -> Tensors:
        """The output tensors, (1,) each, for all tokens since the last call."""
        group, self._group = self._group, _Group()
        flags = self._flags
        tensors = {"text_output": _strings(group.text)}
        if flags.return_finish_reason:
            tensors["finish_reason"] = _strings(self.finish or "None")
        if flags.return_cumulative_logprob:
            tensors["cumulative_logprob"] = np.array([self._cumulative_logprob], dtype=np.float32)
        if flags.return_logprobs:
            tensors["logprobs"] = _strings(self._logprobs_json(group.logprobs))
        if flags.return_num_input_tokens:
            tensors["num_input_tokens"] = np.array([self._prompt_length], dtype=np.uint32)
        if flags.return_num_output_tokens:
            tensors["num_output_tokens"] = np.array([group.count], dtype=np.uint32)
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


def _strings(*values: str) -> npt.NDArray[np.object_]:
    return np.array([value.encode() for value in values], dtype=np.object_)
