"""A checkpoint's tokenizer: its file, which transformers may have to write, and what is in it."""

from pathlib import Path

from tokenizers import Tokenizer

from fi_runtime.config import ConfigError


def tokenizer_file(checkpoint: Path, scratch: Path) -> Path:
    """Path of the checkpoint's tokenizer.json.

    Older checkpoints have only what transformers knows how to convert; it is converted once, here,
    so that front ends need no transformers, and written to ``scratch``.

    Raises:
        ConfigError: no tokenizer that could be loaded or converted.
    """
    if not checkpoint.is_dir():
        raise ConfigError(
            f"{checkpoint}: no such folder; a checkpoint is a folder with config.json, "
            "tokenizer.json and *.safetensors"
        )
    file = checkpoint / "tokenizer.json"
    if file.exists():
        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no other kind
            raise ConfigError(f"{file}: cannot be read as a tokenizer: {error}") from error
        return file
    # It takes seconds to import, which only such a checkpoint has to wait for.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint, local_files_only=True, trust_remote_code=False
        )
        # Some classes are made of nothing, with an empty vocabulary, where their files are missing.
        names = sorted(tokenizer.vocab_files_names.values())
        if not any((checkpoint / name).exists() for name in names):
            raise FileNotFoundError(f"none of {', '.join(names)} is there")
        converted = scratch / "tokenizer.json"
        tokenizer.backend_tokenizer.save(str(converted))
    except Exception as error:  # whatever a missing or malformed file makes transformers raise
        raise ConfigError(
            f"{file}: no such file, and transformers finds no tokenizer to convert: {error}"
        ) from error
    return converted


def load_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, which takes texts whole and as they are.

    The file may ask for truncation and padding, which would change prompts behind their back.
    """
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
