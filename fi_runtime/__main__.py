"""Commands that need no server: ``python -m fi_runtime --help``."""

import logging
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tokenizers import Tokenizer

from fi_runtime.config import ConfigError
from fi_runtime.engine.core import Engine
from fi_runtime.frontend.repository import read_engine_config
from fi_runtime.messages import SamplingParams
from fi_runtime.models.tokenizer import tokenizer_file

app = typer.Typer(add_completion=False, help=__doc__)
errors = Console(stderr=True)


@app.callback()
def _commands() -> None:
    """Commands that need no server."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")


@app.command()
def generate(
    prompt: str,
    model: Annotated[
        Path, typer.Option(help="Model folder whose config.pbtxt names the checkpoint.")
    ] = Path("model_repository/llm"),
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 chooses the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Answer one prompt with an engine in this process, with no server between."""
    try:
        config = read_engine_config(model)
        engine = Engine(config)
        with tempfile.TemporaryDirectory() as scratch:
            file = tokenizer_file(Path(config.checkpoint), Path(scratch))
            tokenizer = Tokenizer.from_file(str(file))
    except ConfigError as error:
        errors.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    begin = time.perf_counter()
    result = engine.generate([list(tokenizer.encode(prompt).ids)], params)[0]
    seconds = time.perf_counter() - begin
    print(tokenizer.decode(result.tokens))
    errors.print(
        f"{len(result.tokens)} tokens in {seconds:.2f} s, finished: {result.finish}", style="dim"
    )


if __name__ == "__main__":
    app()
