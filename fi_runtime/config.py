"""Every knob, once: its name, default, range and what it does.

Knobs are the ``parameters`` of a model's ``config.pbtxt``. A model that holds the engine's knobs
starts that engine; a model whose ``engine`` parameter names another model attaches to that one's.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
CacheDTypeName = Literal["auto", "fp8"]
Device = Literal["cpu", "cuda"]
Backend = Literal["fa2", "fa3", "auto"]
LoadFormat = Literal["safetensors", "dummy"]

Config = TypeVar("Config", bound=msgspec.Struct)


MAX_INT32 = (1 << 31) - 1
MAX_N = 128
"""answers to one prompt"""
GUIDE_BYTES = 64 << 10
"""of a guide, where nothing else is said"""


class ConfigError(ValueError):
    """A knob, a checkpoint or a machine that cannot be served, with what to do about it."""


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a request may ask for, whatever door of an engine it comes by."""

    max_prompt_tokens: Annotated[
        int, Meta(ge=0, description="of a prompt; 0: what the context has room for")
    ] = 0
    max_output_tokens: Annotated[
        int,
        Meta(ge=0, description="of each answer, more are cut; 0: what the context has room for"),
    ] = 0
    max_n: Annotated[int, Meta(ge=1, le=MAX_N, description="answers to one prompt")] = MAX_N
    max_stop_strings: Annotated[
        int, Meta(ge=0, le=1024, description="of a request, each is looked for at every token")
    ] = 64
    max_guide_bytes: Annotated[
        int,
        Meta(ge=0, le=1 << 20, description="of a schema, regex, grammar or list of choices"),
    ] = GUIDE_BYTES
    max_request_bytes: Annotated[
        int, Meta(ge=1, description="of all its tensors and parameters together")
    ] = 8 << 20
    request_timeout_s: Annotated[
        float,
        Meta(
            gt=0.0,
            description="seconds from a front end to the last response; a request may ask for "
            "less by Triton's own timeout",
        ),
    ] = 3600.0


class EngineConfig(RequestLimits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine is started with. Token counts are in tokens, sizes of pages too.

    ``device`` is no knob: the kind of the model's instance group says it.
    """

    device: Device = "cpu"

    checkpoint: Annotated[
        str, Meta(min_length=1, description="Hugging Face folder; relative to the model's folder")
    ]
    dtype: Annotated[
        DTypeName,
        Meta(description="of weights and cache; auto: float32 on the CPU, bfloat16 on a GPU"),
    ] = "auto"
    cache_dtype: Annotated[
        CacheDTypeName,
        Meta(
            description="of the cache alone; auto: as dtype; fp8: e4m3, which holds twice the "
            "tokens of bfloat16"
        ),
    ] = "auto"
    load_format: Annotated[
        LoadFormat,
        Meta(description="dummy: random weights of the shape in config.json, for measurements"),
    ] = "safetensors"
    adapters: Annotated[
        dict[Annotated[str, Meta(min_length=1)], Annotated[str, Meta(min_length=1)]],
        Meta(
            description="LoRA adapters: a JSON object of names, which requests choose by, and "
            "folders as PEFT writes them, relative to the model's folder"
        ),
    ] = {}
    attention_backend: Annotated[
        Backend, Meta(description="FlashInfer's kernels on a GPU; fa2 is what is meant to be used")
    ] = "fa2"
    kernels: Annotated[
        str,
        Meta(
            description="folder of prebuilt GPU kernels, relative to the model's folder; where it "
            "is missing they compile at first use"
        ),
    ] = "kernels"
    decode_graphs: Annotated[
        int,
        Meta(
            ge=0,
            le=4096,
            description="sequences up to which a GPU's decode steps are captured, and half the "
            "tokens up to which steps with short prompts are",
        ),
    ] = 256
    piece_graphs: Annotated[
        int,
        Meta(
            ge=0,
            le=65_536,
            description="tokens up to which a GPU's other steps are captured, all but attention",
        ),
    ] = 1024
    page_size: Annotated[int, Meta(ge=1, le=256, description="tokens in a page of the cache")] = 16
    cache_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 30,
            description="tokens the paged cache holds, all sequences; 0: 65536 on the CPU, on a "
            "GPU as many as gpu_memory_fraction leaves room for",
        ),
    ] = 0
    gpu_memory_fraction: Annotated[
        float,
        Meta(
            gt=0.0,
            le=1.0,
            description="share of the GPU's memory that may be in use once the engine has started",
        ),
    ] = 0.9
    max_context: Annotated[
        int,
        Meta(ge=0, le=1 << 24, description="prompt and output of one sequence; 0: the model's own"),
    ] = 0
    max_sequences: Annotated[
        int,
        Meta(
            ge=0,
            le=4096,
            description="sequences that run at the same time; 0: 64 on the CPU, 256 on a GPU",
        ),
    ] = 0
    step_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 20,
            description="tokens one step computes, prompts are cut to fit; 0: 512 on the CPU, "
            "8192 on a GPU",
        ),
    ] = 0
    chunk_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=1 << 20,
            description="prompt tokens that a step computes beside decoding sequences, for each "
            "prompt that waits, fewer at long contexts",
        ),
    ] = 512
    cpu_threads: Annotated[
        int,
        Meta(
            ge=0,
            le=1024,
            description="threads of a CPU engine; 0: half of the cores, since the server, its "
            "front ends and clients need some, and threads that wait for a core stall all others",
        ),
    ] = 0

    step_timeout_s: Annotated[
        float,
        Meta(
            ge=3.0,
            description="seconds that a step may take; an engine that takes longer is killed",
        ),
    ] = 300.0
    server_timeout_s: Annotated[
        float,
        Meta(
            ge=3.0,
            description="seconds for which the server may answer no front end that asks it; one "
            "that hangs longer is killed",
        ),
    ] = 120.0
    engine_restarts: Annotated[
        int,
        Meta(
            ge=0,
            le=1000,
            description="engines that may die in a row, each before it has answered a request, and "
            "be started again",
        ),
    ] = 6

    def __post_init__(self) -> None:
        """Put in what depends on the device where a knob was left at 0."""
        for name, value in _DEVICE_DEFAULTS[self.device].items():
            if getattr(self, name) == 0:
                msgspec.structs.force_setattr(self, name, value)


_DEVICE_DEFAULTS: dict[Device, dict[str, int]] = {
    "cpu": {"cache_tokens": 65_536, "max_sequences": 64, "step_tokens": 512},
    "cuda": {"max_sequences": 256, "step_tokens": 8192},
}


class DoorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a door, an entry in the model repository, is told beside the engine's knobs."""

    engine: Annotated[
        str, Meta(pattern=r"^[A-Za-z0-9_.-]*$", description="model whose engine to use; '': own")
    ] = ""
    stream_interval: Annotated[
        int,
        Meta(ge=1, le=MAX_INT32, description="tokens that a streamed response waits for"),
    ] = 1
    max_group_tokens: Annotated[
        int,
        Meta(ge=0, le=MAX_INT32, description="tokens a streamed response has at most; 0: any"),
    ] = 0
    engine_start_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds to wait for the engine to load its checkpoint")
    ] = 600.0
    log_requests: Annotated[
        bool, Meta(description="a line in the log for each request, when it has ended")
    ] = False


def split_parameters(parameters: dict[str, str], model: str) -> tuple[DoorConfig, dict[str, str]]:
    """Part a model's ``config.pbtxt`` parameters into the door's own and the engine's.

    Keys in upper case belong to Triton's Python backend (``EXECUTION_ENV_PATH`` and the like) and
    are left to it.

    Raises:
        ConfigError: a key that is no knob, or a door's value out of its range.
    """
    ours = {key: value for key, value in parameters.items() if not key.isupper()}
    door_keys, engine_keys = _knobs(DoorConfig), _knobs(EngineConfig)
    unknown = sorted(ours.keys() - door_keys.keys() - engine_keys.keys())
    if unknown:
        allowed = ", ".join(sorted(door_keys | engine_keys))
        raise ConfigError(
            f"{model}/config.pbtxt: unknown parameter {unknown[0]!r}; known: {allowed}"
        )
    door = _convert(DoorConfig, {k: v for k, v in ours.items() if k in door_keys}, model)
    engine = {k: v for k, v in ours.items() if k in engine_keys}
    if door.engine and engine:
        raise ConfigError(
            f"{model}/config.pbtxt: parameter {min(engine)!r} is a knob of the engine, which "
            f"{door.engine}/config.pbtxt holds because this model says engine: {door.engine!r}; "
            "set it there"
        )
    return door, engine


def engine_config(
    parameters: dict[str, str], model_folder: Path, device: Device = "cpu"
) -> EngineConfig:
    """Build the engine's knobs; a relative folder is taken from ``model_folder``.

    Raises:
        ConfigError: a value missing, of the wrong kind or out of its range.
    """
    model = model_folder.name
    if "checkpoint" not in parameters:
        raise ConfigError(
            f"{model}/config.pbtxt: parameter 'checkpoint' is missing; "
            "give the folder of a Hugging Face checkpoint"
        )
    config = _convert(EngineConfig, parameters, model, device=device)
    if config.step_tokens < config.max_sequences:
        raise ConfigError(
            f"{model}/config.pbtxt: parameter step_tokens={config.step_tokens} is less than "
            f"max_sequences={config.max_sequences}; every running sequence needs one token a step"
        )
    if 0 < config.cache_tokens < config.page_size:
        raise ConfigError(
            f"{model}/config.pbtxt: parameter cache_tokens={config.cache_tokens} is less than one "
            f"page of page_size={config.page_size}"
        )
    if config.cache_dtype == "fp8" and config.attention_backend == "fa3":
        raise ConfigError(
            f"{model}/config.pbtxt: parameter cache_dtype='fp8' is for attention_backend 'fa2'; "
            "FA3 reads such a cache with queries in fp8 only"
        )
    return msgspec.structs.replace(
        config,
        checkpoint=str(model_folder / config.checkpoint),
        kernels=str(model_folder / config.kernels),
        adapters={name: str(model_folder / path) for name, path in config.adapters.items()},
    )


def _knobs(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Names and annotated types of a configuration's knobs."""
    return {f.name: f.type for f in msgspec.structs.fields(kind) if f.name != "device"}


def _convert(kind: type[Config], given: dict[str, str], model: str, **fixed: str) -> Config:
    values: dict[str, Any] = dict(fixed)
    for name, type_ in _knobs(kind).items():
        if name in given:
            try:
                values[name] = _converted(given[name], type_)
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{model}/config.pbtxt: parameter {name}={given[name]!r}: {error}"
                ) from None
    return kind(**values)


def _converted(text: str, type_: Any) -> Any:
    """A parameter as its type; one of several values is written as JSON."""
    if get_origin(get_args(type_)[0]) is dict:
        return msgspec.json.decode(text, type=type_)
    return msgspec.convert(text, type_, strict=False)
