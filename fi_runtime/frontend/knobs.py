"""Sampling parameters: both dialects' names, their ranges, and where they may be given."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fi_runtime.config import MAX_INT32, MAX_N, ConfigError
from fi_runtime.frontend.errors import RequestError, short
from fi_runtime.messages import MAX_LOGPROBS, TokenId

MAX_SEED = (1 << 64) - 1
MAX_LIST = 1024
"""strings or tokens in one parameter, since each costs time at every token"""


class Knobs(msgspec.Struct, kw_only=True):
    """Sampling parameters under vLLM's names, with the ranges that clients are held to."""

    n: Annotated[int, Meta(ge=1, le=MAX_N)] = 1
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_INT32)] = 16
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_INT32)] = 0
    temperature: Annotated[float, Meta(ge=0.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INT32)] = 0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    seed: int | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=MAX_LIST)
    ] = {}
    stop: Annotated[list[str], Meta(max_length=MAX_LIST)] | str = []
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_LIST)] = []
    bad_words: Annotated[list[str], Meta(max_length=MAX_LIST)] | str = []
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    end_id: Annotated[int, Meta(ge=-1, le=MAX_INT32)] | None = None
    """-1: no token ends the answer"""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    lora_name: Annotated[str, Meta(max_length=256)] = ""
    """of an adapter, which the engine knows"""
    structured_outputs: Any = None
    guided_decoding: Any = None
    """an older name of the same"""
    guided_decoding_guide_type: str = ""
    guided_decoding_guide: str = ""
    """TensorRT-LLM's names"""


ALIASES = {"min_length": "min_tokens", "random_seed": "seed"}
"""TensorRT-LLM's names for the same."""


KNOBS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Knobs)}

# What the dialects know and this build does not serve, and the value that asks for nothing.
NEUTRAL: dict[str, object] = {
    "best_of": 1.0,
    "use_beam_search": False,
    "allowed_token_ids": None,
    "prompt_logprobs": None,
    "spaces_between_special_tokens": True,
    "detokenize": True,
    "truncate_prompt_tokens": None,
    "logits_processors": None,
    "flat_logprobs": False,
    "extra_args": None,
    "image": None,
    # TensorRT-LLM's
    "beam_width": 1,
    "num_return_sequences": 1,
    "return_context_logits": False,
    "return_generation_logits": False,
    "return_perf_metrics": False,
    "embedding_bias_words": None,
    "embedding_bias_weights": None,
    "num_draft_tokens": 0,
    "use_draft_logits": False,
    "prompt_vocab_size": None,
    "decoder_text_input": None,
    "image_url_input": None,
    "lora_task_id": None,
}


SAMPLING = ("temperature", "top_k", "top_p", "min_p")
"""What generation_config.json says of how to sample."""


def checkpoint_defaults(checkpoint: Path) -> dict[str, Any]:
    """What generation_config.json gives for requests that leave it out; nothing without that file.

    As transformers reads it, how to sample counts with ``do_sample`` only. Lengths do not count:
    ``max_tokens`` has the default that clients of both dialects know.

    Raises:
        ConfigError: it cannot be read, or a value is out of its range.
    """
    path = checkpoint / "generation_config.json"
    try:
        given = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a JSON object: {error}") from None
    names = ("repetition_penalty", *(SAMPLING if given.get("do_sample") else ()))
    values = {name: given[name] for name in names if given.get(name) is not None}
    try:
        return convert(values, KNOBS, f"{path}: ")
    except RequestError as error:
        raise ConfigError(str(error)) from None


def read_knobs(
    inputs: Mapping[str, object],
    parameters: Mapping[str, object],
    defaults: Mapping[str, Any],
) -> Knobs:
    """Sampling parameters: of the JSON, else of tensors, else of the request's parameters.

    Args:
        defaults: of ``checkpoint_defaults``, for what none of them gives.

    Raises:
        RequestError: names what was given and what is allowed.
    """
    of = ""
    inputs = _renamed(inputs)
    given = {**_renamed(parameters), **inputs}
    if "sampling_parameters" in given:
        of = "sampling_parameters: "
        json = _renamed(_json_object(given["sampling_parameters"]), of)
        unknown = sorted(json.keys() - KNOBS.keys() - NEUTRAL.keys())
        if unknown:
            raise RequestError(
                "INVALID_ARG",
                f"{of}unknown key {short(unknown[0])}; known are {', '.join(sorted(KNOBS))}",
            )
        given = {**inputs, **json}
    if isinstance(given.get("logprobs"), bool):  # OpenAI's form, which vLLM takes as well
        given["logprobs"] = 1 if given["logprobs"] else None
    for name, neutral in NEUTRAL.items():
        if name in given and not _asks_for_nothing(given[name], neutral):
            raise RequestError(
                "UNSUPPORTED", f"{of}{name}={short(given[name])} is not supported; leave it out"
            )
    values = {name: value for name, value in given.items() if name in KNOBS and value is not None}
    knobs = Knobs(**{**defaults, **convert(values, KNOBS, of)})
    words = convert({"stop_words": given.get("stop_words", [])}, {"stop_words": KNOBS["stop"]})
    knobs.stop = as_list(knobs.stop) + as_list(words["stop_words"])
    if knobs.min_tokens > knobs.max_tokens:
        raise RequestError(
            "INVALID_ARG",
            f"{of}min_tokens={knobs.min_tokens} is more than max_tokens={knobs.max_tokens}",
        )
    if knobs.seed == -1:  # how vLLM's clients ask for any
        knobs.seed = None
    if knobs.seed is not None and not 0 <= knobs.seed <= MAX_SEED:
        raise RequestError(
            "INVALID_ARG", f"{of}seed={knobs.seed}: Expected `int` in 0 to 2^64 - 1, or -1 for any"
        )
    return knobs


def _renamed(given: Mapping[str, object], of: str = "") -> dict[str, object]:
    """What one place gave, under our names."""
    renamed = {name: value for name, value in given.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        value = given.get(alias)
        if value is None:
            continue
        if str(renamed.setdefault(name, value)) != str(value):
            raise RequestError(
                "INVALID_ARG",
                f"{of}{alias}={short(value)} and {name}={short(renamed[name])} mean the same; "
                "give one of them",
            )
    return renamed


def as_list(value: list[str] | str) -> list[str]:
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
            f"sampling_parameters={short(text)}: expected a JSON object of vLLM's sampling "
            f"parameters: {error}",
        ) from None


def convert(given: Mapping[str, object], types: Mapping[str, Any], of: str = "") -> dict[str, Any]:
    """Values as their types, from numbers and truth values or strings that spell them.

    Args:
        of: where they were given, to begin messages with.

    Raises:
        RequestError: names the value and what was expected.
    """
    converted = {}
    for name, value in given.items():
        try:
            converted[name] = msgspec.convert(value, types[name], strict=False, str_keys=True)
        except msgspec.ValidationError as error:
            raise RequestError("INVALID_ARG", f"{of}{name}={short(value)}: {error}") from None
        number = converted[name]
        if isinstance(number, float) and not math.isfinite(number):
            raise RequestError(
                "INVALID_ARG", f"{of}{name}={short(value)}: Expected a finite number"
            )
    return converted
