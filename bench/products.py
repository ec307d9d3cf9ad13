"""How long the products of one layer take, by rows: which sizes of steps are fast.

    python -m bench.products [MODEL] [--out FILE]

A row is a token of a step. Queries, keys and values, attention's output, gate and up, and down, one
after another in a CUDA graph, of as many layers as the L2 cache cannot keep; random weights of a
dense shape of ``bench.shapes``. Needs a GPU.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear

from bench.options import Out
from bench.results import write_results
from bench.shapes import write_shape
from fi_runtime.models import ModelConfig, load_model_config

MODEL = "Llama-3.1-8B"
ROWS = (*range(16, 128, 16), *range(128, 1025, 32))
WEIGHT_BYTES = 1 << 30
"""of all layers, at least"""
REPLAYS = 5


def products_of(model: ModelConfig) -> list[tuple[int, int]]:
    """Outputs and inputs of each product of a dense layer, as they are computed: some joined."""
    heads, kv_heads = (count * model.head_dim for count in (model.heads, model.kv_heads))
    return [
        (heads + 2 * kv_heads, model.hidden_size),
        (model.hidden_size, heads),
        (2 * model.intermediate_size, model.hidden_size),
        (model.hidden_size, model.intermediate_size),
    ]


def measure(model: str) -> list[dict[str, Any]]:
    """A row for each number of rows: model, rows, us of a layer's products."""
    with tempfile.TemporaryDirectory() as name:
        products = products_of(load_model_config(write_shape(model, Path(name))))
    layer_bytes = sum(2 * outputs * inputs for outputs, inputs in products)
    layers = [
        [torch.randn(each, device="cuda", dtype=torch.bfloat16) * 0.02 for each in products]
        for _ in range(-(-WEIGHT_BYTES // layer_bytes))
    ]
    return [{"model": model, "rows": rows, "us": round(time_of(layers, rows), 1)} for rows in ROWS]


def time_of(layers: list[list[torch.Tensor]], rows: int) -> float:
    """Microseconds of a layer's products with so many rows; the median of some replays."""
    inputs = [
        torch.randn((rows, weight.shape[1]), device=weight.device, dtype=weight.dtype)
        for weight in layers[0]
    ]

    def compute() -> None:
        for layer in layers:
            for x, weight in zip(inputs, layer, strict=True):
                linear(x, weight)

    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    times = list[float]()
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(layers))
    return sorted(times)[REPLAYS // 2]


def main(
    model: Annotated[str, typer.Argument(help="A dense shape.")] = MODEL,
    out: Out = None,
) -> None:
    """Measure and print a table."""
    rows = measure(model)
    table = Table("rows", "us a layer", "us a row")
    for row in rows:
        table.add_row(str(row["rows"]), f"{row['us']:.1f}", f"{row['us'] / row['rows']:.2f}")
    Console().print(table)
    if out is not None:
        write_results(out, rows, "python -m bench.products --out FILE")


if __name__ == "__main__":
    typer.run(main)
