"""Options that the benchmarks' commands have in common."""

from pathlib import Path
from typing import Annotated

import typer

Kernels = Annotated[Path | None, typer.Option(help="Folder that prebuild filled.")]
Out = Annotated[Path | None, typer.Option(help="File for the results.")]
