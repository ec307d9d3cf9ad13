"""How many of the demo checkpoint's tasks a running server answers exactly, greedily.

    python -m bench.accuracy [--url host:port] [--count 300] [--cache-dtype fp8] [--kernels FOLDER]

Asks the door ``llm_unary`` over gRPC, several requests at a time; without ``--url`` it starts a
server of its own on the default checkpoint. No prompt was seen in training.
"""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tritonclient.grpc as triton
import typer
from rich.console import Console
from rich.table import Table

from bench.options import Kernels, Out
from bench.results import write_results
from client.request import Request
from client.tensors import to_piece, to_tensors
from fi_runtime.config import CacheDTypeName
from tools.demo.tasks import MAX_ANSWER_TOKENS, Example, Task, evaluation_set, is_correct
from tools.repository import SHIPPED, STREAMED, write_repository
from tools.serve import TritonServer

TASKS: list[tuple[str, Task, int]] = [
    ("add", "add", 256),
    ("recall, 256 tokens", "recall", 256),
    ("recall, 1,900 tokens", "recall", 1900),
    ("copy", "copy", 256),
    ("reverse", "reverse", 256),
    ("story", "story", 256),
]
"""What the table calls it, the task, and the length of its prompts where that can be chosen."""


@contextmanager
def running_server(url: str, cache_dtype: CacheDTypeName, kernels: Path | None) -> Iterator[str]:
    """The address of the server given, or of one that runs for as long as it is needed."""
    if url:
        yield url
        return
    with tempfile.TemporaryDirectory() as name:
        checkpoint = SHIPPED / STREAMED / "demo_checkpoint"
        kernels = kernels or SHIPPED / STREAMED / "kernels"
        knobs = {"cache_dtype": cache_dtype, "kernels": kernels.resolve()}
        repository = write_repository(Path(name) / "repository", checkpoint, knobs)
        with TritonServer(repository, log=Path(name) / "log") as server:
            server.wait_ready()
            yield server.grpc_url


def answer(client: triton.InferenceServerClient, prompt: str) -> str:
    """The server's greedy answer, without the prompt."""
    request = Request(prompt, max_tokens=MAX_ANSWER_TOKENS, temperature=0.0)
    inputs = to_tensors(request.inputs(), triton.InferInput)
    return to_piece(client.infer(request.door, inputs)).text


def main(
    url: Annotated[str, typer.Option(help="gRPC host:port of a running server.")] = "",
    count: Annotated[int, typer.Option(help="Prompts of each task.")] = 300,
    cache_dtype: Annotated[
        CacheDTypeName, typer.Option(help="The engine's knob, without --url.")
    ] = "auto",
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 16,
    kernels: Kernels = None,
    wrong: Annotated[int, typer.Option(help="Wrong answers to show of each task.")] = 2,
    out: Out = None,
) -> None:
    """Ask, compare, and print a table."""
    console = Console()
    rows: list[dict[str, Any]] = []
    table = Table(title="Exact answers, greedy, through the running server")
    for column in ("task", "right", "of", "share"):
        table.add_column(column, justify="left" if column == "task" else "right")
    with (
        running_server(url, cache_dtype, kernels) as address,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        client = triton.InferenceServerClient(address)

        def ask(example: Example) -> str:
            return answer(client, example.prompt)

        for name, task, tokens in TASKS:
            examples = evaluation_set(task, count, tokens=tokens)
            outputs = list(pool.map(ask, examples))
            pairs = list(zip(examples, outputs, strict=True))
            failed = [(e, o) for e, o in pairs if not is_correct(e, o)]
            right = len(examples) - len(failed)
            share = f"{100 * right / len(examples):.1f} %"
            table.add_row(name, str(right), str(len(examples)), share)
            rows.append({"task": name, "right": right, "of": len(examples)})
            for example, output in failed[:wrong]:
                console.print(f"{name}: …{example.prompt[-60:]!r}: {output!r}", markup=False)
    console.print(table)
    if out is not None:
        write_results(
            out, rows, f"python -m bench.accuracy --count {count} --cache-dtype {cache_dtype}"
        )


if __name__ == "__main__":
    typer.run(main)
