"""Commands that need no server: ``python -m fi_runtime --help``."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from fi_runtime.config import ConfigError, Device
from fi_runtime.doctor import examine, print_report, report_json
from fi_runtime.engine.build import cache_dtype, check_has_kernels, compiled_in, compute_dtype
from fi_runtime.engine.core import BadRequest, Engine
from fi_runtime.frontend.repository import read_engine_config
from fi_runtime.kernels.prebuild import prebuild as compile_modules
from fi_runtime.messages import SamplingParams
from fi_runtime.models import load_model_config
from fi_runtime.tokenizer import load_tokenizer, tokenizer_file

app = typer.Typer(add_completion=False, help=__doc__)
errors = Console(stderr=True)

MAX_SEED = (1 << 63) - 1
"""the engine's is a signed integer"""

Model = Annotated[Path, typer.Option(help="Model folder whose config.pbtxt names the checkpoint.")]


@app.callback()
def _commands() -> None:
    """Commands that need no server."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")


@app.command()
def generate(
    prompt: str,
    model: Model = Path("model_repository/llm"),
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 chooses the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
    device: Annotated[
        Device | None, typer.Option(help="Where to run.", show_default="cuda where there is a GPU")
    ] = None,
) -> None:
    """Answer one prompt with an engine in this process, with no server between."""
    with told_errors():
        config = read_engine_config(model, device or _device_here())
        engine = Engine(config)
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer = load_tokenizer(tokenizer_file(Path(config.checkpoint), Path(scratch)))
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
        begin = time.perf_counter()
        result = engine.generate([list(tokenizer.encode(prompt).ids)], params)[0]
    seconds = time.perf_counter() - begin
    print(tokenizer.decode(result.tokens))
    errors.print(
        f"{len(result.tokens)} tokens in {seconds:.2f} s, finished: {result.finish}", style="dim"
    )


@app.command()
def doctor(
    model: Model = Path("model_repository/llm"),
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
) -> None:
    """Say what this machine and a model can do together; with a GPU, time its decode attention."""
    report = examine(model)
    if as_json:
        print(report_json(report))
    else:
        print_report(report, Console())
    raise typer.Exit(1 if report.has_problem else 0)


@app.command()
def prebuild(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to fill.", show_default="the model's own, which it looks in"),
    ] = None,
    model: Model = Path("model_repository/llm"),
    arch: Annotated[
        str, typer.Option(help="Compute capabilities, blanks between: 8.0, 8.9, 9.0a, ...")
    ] = "9.0a",
    fa3: Annotated[
        bool, typer.Option("--fa3", help="Also FA3's attention, which doctor compares with.")
    ] = False,
) -> None:
    """Compile the GPU kernels that a model needs, so that a server need not. Needs no GPU."""
    with told_errors():
        config = read_engine_config(model, "cuda")
        shape = load_model_config(Path(config.checkpoint))
        check_has_kernels(shape, compute_dtype(config))
        # What auto would choose is for the GPU to say; one of these it is.
        both = fa3 or config.attention_backend != "fa2"
        compile_modules(
            compiled_in(shape),
            compute_dtype(config),
            cache_dtype(config),
            ["fa2", "fa3"] if both else ["fa2"],
            arch,
            out or Path(config.kernels),
            report_module,
        )


def _device_here() -> Device:
    return "cuda" if torch.cuda.is_available() else "cpu"


def report_module(name: str, number: int, total: int, seconds: float) -> None:
    """Say that a module is done."""
    errors.print(f"{number}/{total}  {seconds:5.0f} s  {name}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def told_errors() -> Iterator[None]:
    """End the command with one message for what cannot be done."""
    try:
        yield
    except (ConfigError, BadRequest) as error:
        errors.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
