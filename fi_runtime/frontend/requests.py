"""Requests as clients send them, to prompts and parameters as the engine takes them."""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fi_runtime.config import RequestLimits
from fi_runtime.frontend.chat import ChatTemplate, read_messages
from fi_runtime.frontend.errors import RequestError
from fi_runtime.frontend.guides import Guide, guide_of_tensorrt, guide_of_vllm
from fi_runtime.frontend.knobs import Knobs, as_list, checkpoint_defaults, convert, read_knobs
from fi_runtime.messages import EngineInfo, SamplingParams


class Flags(msgspec.Struct, kw_only=True):
    """What the answer is to look like."""

    stream: bool = False
    exclude_input_in_output: bool | None = None
    return_finish_reason: bool = False
    return_cumulative_logprob: bool = False
    return_logprobs: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    return_log_probs: bool = False
    return_token_ids: bool = False


FLAGS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Flags)}

SEEDS = 1 << 63
"""Half of the range that clients may give; the engine's seed is a signed integer."""
SEED_STEP = 0x9E3779B97F4A7C15
"""between the answers to one prompt, so that neighbouring seeds share none"""

LISTS = {"input_ids", "stop_words", "bad_words"}
"""Inputs of any length; all others hold one element."""


MAX_STOP_CHARS = 256
"""of a stop string: any of its beginnings may end the text, at every token"""

PROMPTS = ("text_input", "input_ids", "messages")
"""Inputs of which a request gives one."""

KEPT, KEPT_BYTES = 256, 4096
"""wishes that are remembered, and how large each may be"""

Key = tuple[tuple[str, str, tuple[int, ...], bytes | tuple[object, ...]], ...]
"""Inputs as they came: name, dtype, shape and contents of each."""


@dataclass(frozen=True)
class Wishes:
    """What a request asks for, whatever its prompt."""

    flags: Flags
    knobs: Knobs
    params: SamplingParams
    """of as many tokens as were asked for, before there is a seed or a guide"""
    guide: Guide | None
    stop: list[str]


@dataclass(frozen=True)
class Served:
    """What of the checkpoint and its engine requests are read with."""

    tokenizer: Tokenizer
    info: EngineInfo
    limits: RequestLimits
    chat: ChatTemplate
    max_prompt_bytes: int
    """of text, beyond which no prompt can be short enough, whatever its tokens"""
    defaults: Mapping[str, Any]
    """sampling parameters of requests that leave them out"""
    known: dict[Key, Wishes] = field(default_factory=dict)
    """of requests before, since most clients ask for the same again and again"""

    @classmethod
    def of(
        cls, checkpoint: Path, tokenizer: Tokenizer, info: EngineInfo, limits: RequestLimits
    ) -> "Served":
        """The checkpoint of that folder, whose tokenizer and engine are given.

        Raises:
            ConfigError: its generation_config.json has something that cannot be.
        """
        longest = max(len(token.encode()) for token in tokenizer.get_vocab())
        return cls(
            tokenizer,
            info,
            limits,
            ChatTemplate(checkpoint, tokenizer),
            max_prompt_bytes=(limits.max_prompt_tokens or info.max_context) * longest,
            defaults=checkpoint_defaults(checkpoint),
        )


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    echo: str
    """text to send before the output"""
    samples: list[SamplingParams]
    """of each answer that was asked for; with no guide yet"""
    guide: Guide | None
    """what each of them has to match"""
    stop: list[str]
    include_stop: bool
    """whether the stop string that ends an answer is part of it"""
    skip_special_tokens: bool
    flags: Flags
    logprobs: bool
    """whether the client asked for them; the cumulative one needs the engine's all the same"""


def parse_request(
    tensors: Mapping[str, npt.NDArray[Any]],
    parameters: Mapping[str, object],
    served: Served,
) -> Request:
    """Check a request and make it ready for the engine.

    Args:
        tensors: by name, with or without a batch dimension of 1; strings as bytes objects.
        parameters: the request's own; names that are no input of ours are left alone.

    Raises:
        RequestError: says what was given and what is allowed.
    """
    limits = served.limits
    size = _size(tensors, parameters)
    if size > limits.max_request_bytes:  # before time is spent on it
        raise RequestError(
            "INVALID_ARG",
            f"the request has {size} bytes; at most {limits.max_request_bytes} are taken",
        )
    wishes = _wishes(tensors, parameters, served)
    flags, knobs = wishes.flags, wishes.knobs
    counting = _counting(tensors, parameters)
    prompts = {name: _values(name, tensors[name]) for name in PROMPTS if name in tensors}
    prompt, text = _prompt({**counting, **prompts}, served)
    most = limits.max_prompt_tokens
    if 0 < most < len(prompt):
        raise RequestError(
            "INVALID_ARG", f"the prompt has {len(prompt)} tokens; at most {most} are taken"
        )
    max_context = served.info.max_context
    room = max_context - len(prompt)
    if room < 1:
        raise RequestError(
            "INVALID_ARG",
            f"the prompt has {len(prompt)} tokens; at most {max_context - 1} leave room for "
            f"an answer in the context of {max_context}",
        )
    if limits.max_output_tokens:
        room = min(room, limits.max_output_tokens)
    max_tokens = min(wishes.params.max_tokens, room)
    seed = secrets.randbelow(SEEDS) if knobs.seed is None else knobs.seed
    repeats = not (flags.stream or flags.exclude_input_in_output)
    return Request(
        prompt=prompt,
        echo=_echo(prompt, text, served) if repeats else "",
        samples=[
            msgspec.structs.replace(
                wishes.params,
                max_tokens=max_tokens,
                min_tokens=min(wishes.params.min_tokens, max_tokens),
                seed=(seed + number * SEED_STEP) % SEEDS,
            )
            for number in range(knobs.n)
        ],
        guide=wishes.guide,
        stop=wishes.stop,
        include_stop=knobs.include_stop_str_in_output,
        skip_special_tokens=knobs.skip_special_tokens,
        flags=flags,
        logprobs=knobs.logprobs is not None,
    )


def _size(tensors: Mapping[str, npt.NDArray[Any]], parameters: Mapping[str, object]) -> int:
    """Bytes."""
    size = sum(len(name) + len(str(value)) for name, value in parameters.items())
    for tensor in tensors.values():
        strings = tensor.dtype == np.object_
        size += sum(map(len, tensor.reshape(-1))) if strings else tensor.nbytes
    return size


def _counting(
    tensors: Mapping[str, npt.NDArray[Any]], parameters: Mapping[str, object]
) -> Mapping[str, object]:
    """The parameters of a request that count beside its sampling_parameters: all or none."""
    return {} if "sampling_parameters" in {*tensors, *parameters} else parameters


def _wishes(
    tensors: Mapping[str, npt.NDArray[Any]],
    parameters: Mapping[str, object],
    served: Served,
) -> Wishes:
    """What is asked for; remembered if it is small, and of tensors alone. One thread only."""
    inputs = {name: tensor for name, tensor in tensors.items() if name not in PROMPTS}
    if parameters or _size(inputs, {}) > KEPT_BYTES:
        return _read_wishes(inputs, parameters, served)
    key = tuple(
        (name, one.dtype.str, one.shape, tuple(one.flat) if one.dtype.hasobject else one.tobytes())
        for name, one in inputs.items()
    )
    wishes = served.known.get(key)
    if wishes is None:
        if len(served.known) >= KEPT:
            served.known.clear()
        wishes = served.known[key] = _read_wishes(inputs, parameters, served)
    return wishes


def _read_wishes(
    tensors: Mapping[str, npt.NDArray[Any]],
    parameters: Mapping[str, object],
    served: Served,
) -> Wishes:
    limits = served.limits
    inputs = {name: _values(name, tensor) for name, tensor in tensors.items()}
    given = {**_counting(tensors, parameters), **inputs}
    flags = Flags(**convert({k: v for k, v in given.items() if k in FLAGS}, FLAGS))
    if flags.stream and flags.exclude_input_in_output is False:
        raise RequestError(
            "INVALID_ARG",
            "exclude_input_in_output=false with stream=true: a stream never repeats the prompt; "
            "leave exclude_input_in_output out or set it to true",
        )
    knobs = read_knobs(inputs, parameters, served.defaults)
    if knobs.n > limits.max_n:
        raise RequestError("INVALID_ARG", f"n={knobs.n}: at most {limits.max_n} answers are given")
    stop = _stop_strings(knobs, limits.max_stop_strings)
    _check_vocabulary(knobs, served.info)
    params = _params(knobs, flags, served)
    return Wishes(flags, knobs, params, _guide(knobs, limits.max_guide_bytes), stop)


def _stop_strings(knobs: Knobs, most: int) -> list[str]:
    strings = [one for one in as_list(knobs.stop) if one]
    longest = max(map(len, strings), default=0)
    if len(strings) > most or longest > MAX_STOP_CHARS:
        raise RequestError(
            "INVALID_ARG",
            f"stop has {len(strings)} strings, the longest of {longest} characters; at most "
            f"{most} strings of {MAX_STOP_CHARS} characters are taken",
        )
    return strings


def _check_vocabulary(knobs: Knobs, info: EngineInfo) -> None:
    for name, tokens, lowest in (
        ("logit_bias", knobs.logit_bias, 0),
        ("stop_token_ids", knobs.stop_token_ids, 0),
        ("end_id", [] if knobs.end_id is None else [knobs.end_id], -1),
    ):
        _check_tokens(name, tokens, info, lowest)


def _params(knobs: Knobs, flags: Flags, served: Served) -> SamplingParams:
    """Sampling parameters as the engine takes them."""
    needs_logprobs = flags.return_cumulative_logprob or flags.return_log_probs
    return SamplingParams(
        max_tokens=knobs.max_tokens,
        min_tokens=knobs.min_tokens,
        temperature=knobs.temperature,
        top_k=max(knobs.top_k, 0),
        top_p=knobs.top_p,
        min_p=knobs.min_p,
        seed=0,
        repetition_penalty=knobs.repetition_penalty,
        presence_penalty=knobs.presence_penalty,
        frequency_penalty=knobs.frequency_penalty,
        logit_bias=knobs.logit_bias,
        bad_tokens=_bad_tokens(as_list(knobs.bad_words), served.tokenizer),
        stop_token_ids=tuple(knobs.stop_token_ids),
        end_ids=_end_ids(knobs.end_id),
        ignore_eos=knobs.ignore_eos,
        logprobs=0 if knobs.logprobs is None and needs_logprobs else knobs.logprobs,
        lora_name=knobs.lora_name,
    )


def _end_ids(end_id: int | None) -> tuple[int, ...] | None:
    """What ends the answer instead of the checkpoint's own tokens; None: they do."""
    if end_id is None:
        return None
    return () if end_id == -1 else (end_id,)


def _guide(knobs: Knobs, most_bytes: int) -> Guide | None:
    guides = {
        "structured_outputs": guide_of_vllm(
            knobs.structured_outputs, "structured_outputs", most_bytes
        ),
        "guided_decoding": guide_of_vllm(knobs.guided_decoding, "guided_decoding", most_bytes),
        "guided_decoding_guide": guide_of_tensorrt(
            knobs.guided_decoding_guide_type, knobs.guided_decoding_guide, most_bytes
        ),
    }
    given = [name for name, guide in guides.items() if guide is not None]
    if len(given) > 1:
        raise RequestError("INVALID_ARG", f"{' and '.join(given)} are given; give one")
    return guides[given[0]] if given else None


def _bad_tokens(words: list[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, alone and after a blank: many vocabularies have both."""
    spelled = [text for word in words if word for text in (word, f" {word}")]
    tokens = (tokenizer.encode(text, add_special_tokens=False).ids for text in spelled)
    return tuple(dict.fromkeys(tuple(ids) for ids in tokens if ids))


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


def _echo(prompt: list[int], text: str | None, served: Served) -> str:
    return str(served.tokenizer.decode(prompt)) if text is None else text


def _prompt(given: Mapping[str, object], served: Served) -> tuple[list[int], str | None]:
    """The prompt as tokens, and the text that they were made of; None if they were given."""
    names = [name for name in PROMPTS if name in given]
    if len(names) != 1:
        found = " and ".join(names) or "none of them"
        raise RequestError("INVALID_ARG", f"give one of {', '.join(PROMPTS)}; found {found}")
    most = served.max_prompt_bytes
    if "input_ids" in given:
        prompt, text = _token_ids(given["input_ids"], served.info), None
    elif "messages" in given:
        messages = read_messages(str(given["messages"]), most, served.info.max_context)
        text = served.chat.render(messages)
        _check_length("the text of messages", text, most)
        # A template writes all special tokens itself; the tokenizer's would come twice.
        prompt = list(served.tokenizer.encode(text, add_special_tokens=False).ids)
    else:
        text = str(given["text_input"])
        _check_length("text_input", text, most)
        prompt = list(served.tokenizer.encode(text).ids)
    if not prompt:
        raise RequestError("INVALID_ARG", "the prompt is empty; give at least one token")
    return prompt, text


def _check_length(name: str, text: str, most: int) -> None:
    """Refuse what is too long anyway before time is spent on its tokens, which others wait for."""
    size = len(text.encode())
    if size > most:
        raise RequestError(
            "INVALID_ARG",
            f"{name} has {size} bytes; more than {most} do not fit the context, or "
            "max_prompt_tokens, whatever their tokens",
        )


def _token_ids(value: object, info: EngineInfo) -> list[int]:
    ids: list[int] = convert({"input_ids": value}, {"input_ids": list[int]})["input_ids"]
    _check_tokens("input_ids", ids, info)
    return ids


def _check_tokens(name: str, tokens: Iterable[int], info: EngineInfo, lowest: int = 0) -> None:
    outside = [token for token in tokens if not lowest <= token < info.vocab_size]
    if outside:
        raise RequestError(
            "INVALID_ARG",
            f"{name}: token id {outside[0]} is outside the vocabulary; "
            f"allowed are {lowest} to {info.vocab_size - 1}",
        )
