"""Requests as clients send them, to prompts and parameters as the engine takes them."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta
from tokenizers import Tokenizer

from fi_runtime.messages import MAX_INT32, MAX_LOGPROBS, EngineInfo, SamplingParams, TokenId

Code = Literal["INVALID_ARG", "UNSUPPORTED", "UNAVAILABLE", "CANCELLED", "INTERNAL"]
"""Names of TritonError's codes."""

MAX_SEED = (1 << 64) - 1


class RequestError(Exception):
    """Why a request gets no answer, and the code to say it with."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class Knobs(msgspec.Struct, kw_only=True):
    """Sampling parameters under vLLM's names, with the ranges that clients are held to."""

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_INT32)] = 16
    temperature: Annotated[float, Meta(ge=0.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INT32)] = 0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    seed: int | None = None
    stop: list[str] | str = []
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


class Flags(msgspec.Struct, kw_only=True):
    """What the answer is to look like."""

    stream: bool = False
    exclude_input_in_output: bool | None = None
    return_finish_reason: bool = False
    return_cumulative_logprob: bool = False
    return_logprobs: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False


KNOBS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Knobs)}
FLAGS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Flags)}

# What both dialects know and this build does not serve, and the value that asks for nothing.
NEUTRAL: dict[str, object] = {
    "n": 1.0,
    "best_of": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0.0,
    "min_length": 0.0,
    "bad_words": [],
    "logit_bias": {},
    "allowed_token_ids": None,
    "prompt_logprobs": None,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "detokenize": True,
    "truncate_prompt_tokens": None,
    "guided_decoding": None,
    "guided_decoding_guide_type": None,
    "guided_decoding_guide": None,
    "structured_outputs": None,
    "logits_processors": None,
    "random_seed": None,
    "end_id": None,
    "pad_id": None,
    "return_log_probs": False,
    "return_token_ids": False,
}

LISTS = {"input_ids", "stop_words"}
"""Inputs of any length; all others hold one element."""


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    echo: str
    """text to send before the output"""
    params: SamplingParams
    stop: list[str]
    flags: Flags
    logprobs: bool
    """whether the client asked for them; the cumulative one needs the engine's all the same"""


def parse_request(
    tensors: Mapping[str, npt.NDArray[Any]],
    parameters: Mapping[str, object],
    tokenizer: Tokenizer,
    info: EngineInfo,
) -> Request:
    """Check a request and make it ready for the engine.

    Args:
        tensors: by name, with or without a batch dimension of 1; strings as bytes objects.
        parameters: the request's own; names that are no input of ours are left alone.

    Raises:
        RequestError: says what was given and what is allowed.
    """
    inputs = {name: _values(name, tensor) for name, tensor in tensors.items()}
    given = {**parameters, **inputs}
    flags = Flags(**_convert({k: v for k, v in given.items() if k in FLAGS}, FLAGS))
    if flags.stream and flags.exclude_input_in_output is False:
        raise RequestError(
            "INVALID_ARG",
            "exclude_input_in_output=false with stream=true: a stream never repeats the prompt; "
            "leave exclude_input_in_output out or set it to true",
        )
    knobs = _knobs(inputs, parameters)
    prompt, text = _prompt(given, tokenizer, info)
    room = info.max_context - len(prompt)
    if room < 1:
        raise RequestError(
            "INVALID_ARG",
            f"the prompt has {len(prompt)} tokens; at most {info.max_context - 1} leave room for "
            f"an answer in the context of {info.max_context}",
        )
    echo = not (flags.stream or flags.exclude_input_in_output)
    return Request(
        prompt=prompt,
        echo=text if echo else "",
        params=SamplingParams(
            max_tokens=min(knobs.max_tokens, room),
            temperature=knobs.temperature,
            top_k=max(knobs.top_k, 0),
            top_p=knobs.top_p,
            min_p=knobs.min_p,
            # Half of the range that clients may give; the engine's is that of a signed integer.
            seed=secrets.randbits(63) if knobs.seed is None else knobs.seed % (1 << 63),
            stop_token_ids=tuple(knobs.stop_token_ids),
            ignore_eos=knobs.ignore_eos,
            logprobs=0
            if knobs.logprobs is None and flags.return_cumulative_logprob
            else knobs.logprobs,
        ),
        stop=[stop for stop in knobs.stop if stop],
        flags=flags,
        logprobs=knobs.logprobs is not None,
    )


def _values(name: str, tensor: npt.NDArray[Any]) -> object:
    """A tensor's one element, or the list of them where the input is a list."""
    if tensor.ndim > 1 and tensor.shape[0] != 1:
        raise RequestError(
            "INVALID_ARG",
            f"{name} has shape {list(tensor.shape)}: a request holds one prompt; "
            "send each prompt of a batch as a request of its own",
        )
    values = tensor.reshape(-1).tolist()
    if tensor.dtype == np.object_:
        values = [_text(name, value) for value in values]
    if name in LISTS:
        return values
    if len(values) != 1:
        raise RequestError(
            "INVALID_ARG", f"{name} has {len(values)} elements (shape {list(tensor.shape)}); give 1"
        )
    return values[0]


def _text(name: str, value: object) -> str:
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RequestError("INVALID_ARG", f"{name} is not UTF-8: {error}") from None


def _convert(given: Mapping[str, object], types: Mapping[str, Any], of: str = "") -> dict[str, Any]:
    """Values as their types, from numbers and truth values or strings that spell them."""
    converted = {}
    for name, value in given.items():
        try:
            converted[name] = msgspec.convert(value, types[name], strict=False)
        except msgspec.ValidationError as error:
            raise RequestError("INVALID_ARG", f"{of}{name}={_short(value)}: {error}") from None
        number = converted[name]
        if isinstance(number, float) and not math.isfinite(number):
            raise RequestError(
                "INVALID_ARG", f"{of}{name}={_short(value)}: Expected a finite number"
            )
    return converted


def _knobs(inputs: Mapping[str, object], parameters: Mapping[str, object]) -> Knobs:
    """Sampling parameters: of the JSON, else of tensors, else of the request's parameters."""
    of = ""
    given = {**parameters, **inputs}
    if "sampling_parameters" in given:
        of = "sampling_parameters: "
        json = _json_object(given["sampling_parameters"])
        unknown = sorted(json.keys() - KNOBS.keys() - NEUTRAL.keys())
        if unknown:
            raise RequestError(
                "INVALID_ARG",
                f"{of}unknown key {_short(unknown[0])}; known are {', '.join(sorted(KNOBS))}",
            )
        given = {**inputs, **json}
    for name, neutral in NEUTRAL.items():
        if name in given and not _asks_for_nothing(given[name], neutral):
            raise RequestError(
                "UNSUPPORTED", f"{of}{name}={_short(given[name])} is not supported; leave it out"
            )
    values = {name: value for name, value in given.items() if name in KNOBS and value is not None}
    knobs = Knobs(**_convert(values, KNOBS, of))
    words = _convert({"stop_words": given.get("stop_words", [])}, {"stop_words": KNOBS["stop"]})
    knobs.stop = _as_list(knobs.stop) + _as_list(words["stop_words"])
    if knobs.seed is not None and not 0 <= knobs.seed <= MAX_SEED:
        raise RequestError("INVALID_ARG", f"{of}seed={knobs.seed}: Expected `int` in 0 to 2^64 - 1")
    return knobs


def _as_list(value: list[str] | str) -> list[str]:
    return [value] if isinstance(value, str) else value


def _asks_for_nothing(value: object, neutral: object) -> bool:
    if value is None or neutral is None:
        return value is None
    try:
        return bool(msgspec.convert(value, type(neutral), strict=False) == neutral)
    except msgspec.ValidationError:
        return False


def _json_object(text: object) -> dict[str, object]:
    try:
        return msgspec.json.decode(str(text), type=dict[str, object])
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(
            "INVALID_ARG",
            f"sampling_parameters={_short(text)}: expected a JSON object of vLLM's sampling "
            f"parameters: {error}",
        ) from None


def _prompt(
    given: Mapping[str, object], tokenizer: Tokenizer, info: EngineInfo
) -> tuple[list[int], str]:
    """The prompt as tokens and as text."""
    if ("text_input" in given) == ("input_ids" in given):
        found = "both" if "text_input" in given else "neither"
        raise RequestError(
            "INVALID_ARG", f"give one of text_input and input_ids; {found} was given"
        )
    if "text_input" in given:
        text = str(given["text_input"])
        prompt = list(tokenizer.encode(text).ids)
    else:
        prompt = _convert({"input_ids": given["input_ids"]}, {"input_ids": list[int]})["input_ids"]
        outside = [token for token in prompt if not 0 <= token < info.vocab_size]
        if outside:
            raise RequestError(
                "INVALID_ARG",
                f"input_ids: token id {outside[0]} is outside the vocabulary; "
                f"allowed are 0 to {info.vocab_size - 1}",
            )
        text = str(tokenizer.decode(prompt))
    if not prompt:
        raise RequestError("INVALID_ARG", "the prompt is empty; give at least one token")
    return prompt, text


def _short(value: object) -> str:
    """A value as it was given, cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
