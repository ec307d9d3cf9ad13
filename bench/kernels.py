"""Compiles the kernels that the GPU tests and the benchmarks use, those of FA3 among them.

    python -m bench.kernels FOLDER [--arch 9.0a]

For ``--kernels`` of the benchmarks, and as flashinfer/data/aot/ in an installed FlashInfer, where
the tests find them. Needs a CUDA toolkit and no GPU, and half an hour on two cores; what the
folder has already is left alone. ``python -m fi_runtime prebuild`` compiles what one model needs.
"""

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from fi_runtime.__main__ import report_module, told_errors
from fi_runtime.kernels.prebuild import Compiled, prebuild

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
PLAIN, WINDOW, CAP, BOTH = (False, False), (True, False), (False, True), (True, True)
GELU = "gelu_pytorch_tanh"


class Needed(NamedTuple):
    model: Compiled
    cache_dtype: torch.dtype
    backends: list[str]


NEEDED = [
    Needed(Compiled(128), BF16, ["fa2"]),
    Needed(Compiled(64, frozenset({PLAIN, WINDOW})), BF16, ["fa2"]),
    Needed(Compiled(64, frozenset({CAP, BOTH}), GELU), BF16, ["fa2"]),
    Needed(Compiled(128), FP8, ["fa2"]),
    Needed(Compiled(64, frozenset({PLAIN, BOTH})), FP8, ["fa2"]),
    Needed(Compiled(256), FP8, ["fa2"]),
    # Last, since they take longest.
    Needed(Compiled(128), BF16, ["fa3"]),
    Needed(Compiled(64), BF16, ["fa3"]),
]


def main(
    folder: Annotated[Path, typer.Argument(help="To fill.")],
    arch: Annotated[
        str, typer.Option(help="Compute capability, as FlashInfer writes it.")
    ] = "9.0a",
) -> None:
    """Compile one after another."""
    with told_errors():
        for model, cache_dtype, backends in NEEDED:
            prebuild(model, BF16, cache_dtype, backends, arch, folder, report_module)


if __name__ == "__main__":
    typer.run(main)
