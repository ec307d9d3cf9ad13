"""What is asked of the server and what comes back, whatever carries it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

DEFAULT_TIMEOUT_S = 300.0
STREAMING_MODEL = "llm"
UNARY_MODEL = "llm_unary"


SAMPLING = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "stop",
    "lora_name",
)
"""what of a request is a sampling parameter"""


class Message(TypedDict):
    """One turn of one side of a conversation."""

    role: str
    """user, assistant, or what else the checkpoint's chat template knows, such as system"""
    content: str


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it. A sampling parameter of None is left to the server."""

    prompt: str = ""
    """the text to go on from, where there are no messages"""
    stream: bool = False
    """whether pieces come as they are made, instead of one when all is made"""
    model: str | None = None
    """default: llm when streaming, which llm_unary cannot do, else llm_unary"""
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    """strings that end the answer and are no part of it"""
    lora_name: str | None = None
    """of the adapter to answer with"""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """for the whole answer"""
    messages: tuple[Message, ...] = ()
    """a conversation to answer; the served checkpoint's chat template makes it a prompt"""

    @property
    def door(self) -> str:
        """The name of the model to ask."""
        return self.model or (STREAMING_MODEL if self.stream else UNARY_MODEL)

    def inputs(self) -> dict[str, str | bool]:
        """The model's inputs by name, one element each."""
        sampling = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        prompt = (
            {"messages": json.dumps(self.messages)}
            if self.messages
            else {"text_input": self.prompt}
        )
        return {
            **prompt,
            "stream": self.stream,
            "sampling_parameters": json.dumps(sampling),
            "exclude_input_in_output": True,
            "return_finish_reason": True,
            "return_num_input_tokens": True,
            "return_num_output_tokens": True,
        }


OUTPUTS = ("text_output", "finish_reason", "num_input_tokens", "num_output_tokens")
"""The model's outputs that these inputs ask for."""


@dataclass(frozen=True)
class Piece:
    """What one response adds to an answer."""

    text: str
    tokens: int
    """how many are new; their text may come with a later piece"""
    prompt_tokens: int
    finish_reason: str
    """stop or length on the last piece, empty before"""

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, Any]) -> "Piece":
        """From the model's outputs by name, one element each."""
        finish_reason = str(outputs["finish_reason"])
        return cls(
            text=str(outputs["text_output"]),
            tokens=int(outputs["num_output_tokens"]),
            prompt_tokens=int(outputs["num_input_tokens"]),
            finish_reason="" if finish_reason == "None" else finish_reason,
        )
