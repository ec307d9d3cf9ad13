"""Knobs as the models of a repository hold them."""

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fi_runtime.config import ConfigError, Device, EngineConfig, engine_config, split_parameters


def read_engine_config(model_folder: Path, device: Device = "cpu") -> EngineConfig:
    """The engine's knobs in a model's ``config.pbtxt``, for an engine on that device.

    Raises:
        ConfigError: no such file, or something in it that is wrong.
    """
    path = model_folder / "config.pbtxt"
    try:
        parsed = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except text_format.ParseError as error:
        raise ConfigError(f"{path}: {error}") from None
    parameters = {key: value.string_value for key, value in parsed.parameters.items()}
    door, own = split_parameters(parameters, model_folder.name)
    if door.engine:
        raise ConfigError(
            f"{path}: its parameter engine={door.engine!r} sends on to another model; "
            "name the model that holds the checkpoint"
        )
    return engine_config(own, model_folder, device)
