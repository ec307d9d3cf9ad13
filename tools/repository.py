"""Copies of the shipped model repository with other parameters, for tests and measurements."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from tools.serve import ROOT

SHIPPED = ROOT / "model_repository"
STREAMED, UNARY = "llm", "llm_unary"


def copy_door(
    name: str, folder: Path, parameters: Mapping[str, str], *, instances: int = 2
) -> Path:
    """Copy a shipped model into ``folder``, with these parameters instead of its own."""
    source = SHIPPED / name
    shutil.copytree(source / "1", folder / "1", ignore=shutil.ignore_patterns("__pycache__"))
    config = (source / "config.pbtxt").read_text(encoding="utf-8")
    config = re.sub(r"^parameters .*$", "", config, flags=re.MULTILINE)
    config = re.sub(r"count: \d+", f"count: {instances}", config)
    lines = [
        f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}'
        for key, value in parameters.items()
    ]
    (folder / "config.pbtxt").write_text("\n".join([config, *lines, ""]), encoding="utf-8")
    return folder


def write_repository(
    folder: Path, checkpoint: Path, knobs: Mapping[str, object], *, instances: int = 2
) -> Path:
    """Write both shipped doors into ``folder``, on another checkpoint."""
    given = {"checkpoint": str(checkpoint), **{name: str(value) for name, value in knobs.items()}}
    copy_door(STREAMED, folder / STREAMED, given, instances=instances)
    copy_door(UNARY, folder / UNARY, {"engine": STREAMED}, instances=instances)
    return folder
