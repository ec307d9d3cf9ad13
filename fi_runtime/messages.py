"""What front ends and engine say to each other: msgpack over a private ipc socket.

A front end pushes ``FromFrontEnd`` messages; the engine answers each front end on a channel of its
own with ``FromEngine`` messages, at most one a step, and at least one every ``HEARTBEAT_S`` unless
a step takes longer. Both sides decode with full validation.
"""

import signal
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from fi_runtime.config import MAX_INT32

TokenId = Annotated[int, Meta(ge=0, le=MAX_INT32)]
MAX_REQUEST = (1 << 63) - 1
RequestId = Annotated[int, Meta(ge=0, le=MAX_REQUEST)]
FinishReason = Literal["stop", "complete", "length", "cancelled", "refused", "failed"]
"""stop: by its last token, which is no part of the text; complete: all that its guide allows is
said; refused: the engine does not run such a sequence; failed: it could not go on with it"""

MAX_LOGPROBS = 20

INT64 = "<i8"
"""how numpy calls the elements of columns"""

HEARTBEAT_S = 1.0
SHOW_STACKS = signal.SIGUSR1
"""has the engine write what each of its threads does to its log, in whatever state it is"""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one sequence are chosen. Names and meanings are vLLM's."""

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_INT32)]
    temperature: Annotated[float, Meta(ge=0.0)] = 1.0
    """0 chooses the likeliest token."""
    top_k: Annotated[int, Meta(ge=0, le=MAX_INT32)] = 0
    """0 keeps all tokens."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Share of the likeliest token's probability that a token needs; 0 keeps all tokens."""
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    repetition_penalty: Annotated[float, Meta(gt=0.0)] = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in prompt or output."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output, as often as they are there."""
    logit_bias: dict[TokenId, float] = {}
    """Added to the logits of tokens."""
    bad_tokens: tuple[tuple[TokenId, ...], ...] = ()
    """Runs of tokens that are never completed."""
    guide: str = ""
    """What the text has to match: llguidance's serialised grammar, checked; empty for nothing."""
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_INT32)] = 0
    """Output tokens before which no token may end the sequence."""
    stop_token_ids: tuple[TokenId, ...] = ()
    """Tokens that end the sequence, beside its end-of-sequence tokens."""
    end_ids: tuple[TokenId, ...] | None = None
    """End-of-sequence tokens; None: the checkpoint's own, (): no token is one."""
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """Likeliest tokens to report beside the chosen one; None reports nothing."""
    lora_name: str = ""
    """The adapter that it is computed with; empty for none."""


class Attach(msgspec.Struct, tag=True, frozen=True):
    """A front end arrives. ``front_end`` is the address of its channel; answered by Attached."""

    front_end: bytes
    pid: Annotated[int, Meta(ge=1, le=MAX_INT32)]


class Detach(msgspec.Struct, tag=True, frozen=True):
    """A front end leaves; what it still has running is cancelled. Answered by Detached."""

    front_end: bytes


class Generate(msgspec.Struct, tag=True, frozen=True):
    """A new sequence. Uses one credit, which comes back when the sequence has ended."""

    front_end: bytes
    request: RequestId
    prompt: list[TokenId]
    params: SamplingParams


class Abort(msgspec.Struct, tag=True, frozen=True):
    """End a sequence. One that has already ended, or never began, is no error: they cross."""

    front_end: bytes
    request: RequestId


class AsksServer(msgspec.Struct, tag=True, frozen=True):
    """A front end asks its server something, and had an answer to what it asked before."""

    front_end: bytes
    ends: bool = False
    """It asks no more."""


FromFrontEnd = Attach | Detach | Generate | Abort | AsksServer


class TokenLogprob(msgspec.Struct, array_like=True, frozen=True):
    """Natural log of a token's probability before temperature, and its rank, 1 the likeliest."""

    token: TokenId
    logprob: float
    rank: int


class Output(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What one step gave one sequence."""

    request: RequestId
    tokens: list[TokenId]
    logprobs: list[list[TokenLogprob]] | None = None
    """For each token: the chosen one first, then the likeliest; None where not asked for."""
    finish: FinishReason | None = None
    error: str = ""


class EngineInfo(msgspec.Struct, frozen=True):
    """What a front end must know of the engine."""

    pid: int
    vocab_size: int
    max_context: int
    """Tokens that prompt and output of one sequence may have together."""
    tokenizer: str
    """Path of a tokenizer.json."""


class Attached(msgspec.Struct, tag=True, frozen=True):
    info: EngineInfo


class Detached(msgspec.Struct, tag=True, frozen=True):
    """The last message on a front end's channel."""


class Stats(msgspec.Struct, array_like=True, frozen=True):
    """How the engine is, for whoever watches."""

    running: int
    """sequences"""
    waiting: int
    """sequences"""
    cache_usage: float
    """share of the pages that are taken, 0 to 1"""
    preemptions: int
    """since the last time it said so"""
    prompt_tokens: int
    """of the sequences that began to run, since then"""
    reused_tokens: int
    """of them, those that were in the cache"""


class Step(msgspec.Struct, tag=True, frozen=True):
    """Results of a step for one front end, and the credits it is granted for new sequences."""

    outputs: list[Output]
    credits: int = 0
    stats: Stats | None = None
    """to one front end at a time, about once a second"""
    requests: bytes = b""
    """INT64s: requests that got a token each and nothing else, beside those of ``outputs``"""
    tokens: bytes = b""
    """INT64s: those tokens"""

    def all_outputs(self) -> list[Output]:
        """Also those that are columns."""
        requests, tokens = np.frombuffer(self.requests, INT64), np.frombuffer(self.tokens, INT64)
        pairs = zip(requests.tolist(), tokens.tolist(), strict=True)
        return [*self.outputs, *(Output(request, [token]) for request, token in pairs)]


FromEngine = Attached | Detached | Step

encode = msgspec.msgpack.Encoder().encode
decode_from_front_end = msgspec.msgpack.Decoder(FromFrontEnd).decode
_decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
NOT_A_MESSAGE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""what decoding raises: of the wrong kind, or with text that is none, or nested too deeply"""


def decode_from_engine(message: bytes) -> FromEngine:
    """What the engine says.

    Raises:
        One of ``NOT_A_MESSAGE``: it is none.
    """
    decoded: FromEngine = _decode_from_engine(message)
    if isinstance(decoded, Step):
        _check_columns(decoded)
    return decoded


def _check_columns(step: Step) -> None:
    size = np.dtype(INT64).itemsize
    if len(step.requests) != len(step.tokens) or len(step.tokens) % size:
        raise msgspec.ValidationError(
            f"requests has {len(step.requests)} bytes and tokens {len(step.tokens)}; expected "
            f"as many, {size} for each"
        )
    for name, most in (("requests", MAX_REQUEST), ("tokens", MAX_INT32)):
        column = np.frombuffer(getattr(step, name), INT64)
        if column.min(initial=0) < 0 or column.max(initial=0) > most:
            raise msgspec.ValidationError(f"{name} has a number that is none; expected 0 to {most}")
