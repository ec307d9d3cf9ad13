"""Finds a checkpoint's tokenizer.json, or has transformers write one."""

from pathlib import Path

from transformers import AutoTokenizer

from fi_runtime.config import ConfigError


def tokenizer_file(checkpoint: Path, scratch: Path) -> Path:
    """Path of the checkpoint's tokenizer.json.

    Older checkpoints have only what transformers knows how to convert; it is converted once, here,
    so that front ends need no transformers, and written to ``scratch``.

    Raises:
        ConfigError: no tokenizer that could be loaded or converted.
    """
    file = checkpoint / "tokenizer.json"
    if file.exists():
        return file
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
