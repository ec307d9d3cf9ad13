"""Time for each further token where each sequence has a LoRA adapter, beside that of none.

    python -m bench.lora [MODEL ...] [--batch 64] [--adapters 8] [--rank 16] [--kernels FOLDER]
                         [--out FILE]

As bench.latency measures it, after prompts of 1,024 tokens: of an engine without adapters; and of
one with some, of all seven projections of each layer, where no sequence uses one, and where they
take turns. Models are shapes of ``bench.shapes`` with random weights and adapters. Needs a GPU.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from bench.latency import point
from bench.offline import engine_of, release
from bench.options import Kernels, Out
from bench.results import write_results
from fi_runtime.models import ModelConfig

CONTEXT = 1024
"""tokens of each prompt"""


def write_adapter(folder: Path, model: ModelConfig, rank: int, seed: int) -> Path:
    """Save a random adapter of a shape's projections, as PEFT does."""
    heads, kv_heads = (count * model.head_dim for count in (model.heads, model.kv_heads))
    hidden, inner = model.hidden_size, model.intermediate_size
    shapes = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(model.layers):
        for name, (outputs, inputs) in shapes.items():
            before = f"base_model.model.model.layers.{layer}.{name}"
            for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                tensor = torch.empty(shape, dtype=torch.bfloat16)
                tensors[f"{before}.lora_{letter}.weight"] = tensor.normal_(
                    std=0.02, generator=generator
                )
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def measure(
    model: str, batch: int, adapters: int, rank: int, kernels: Path | None
) -> list[dict[str, Any]]:
    """Rows: model, batch, context, adapters, used, rank, tpot_ms, times_none."""
    rows: list[dict[str, Any]] = []

    def add(count: int, used: int, tpot_ms: float) -> None:
        row = {"model": model, "batch": batch, "context": CONTEXT, "adapters": count, "used": used}
        none_ms = rows[0]["tpot_ms"] if rows else tpot_ms
        times = {"tpot_ms": tpot_ms, "times_none": round(tpot_ms / none_ms, 3)}
        rows.append(row | {"rank": rank if count else 0} | times)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine, limits = engine_of(model, kernels, folder / "none")
        add(0, 0, point(engine, limits, batch, CONTEXT)["tpot_ms"])
        shape = engine.model_config
        del engine
        release()
        paths = {
            f"adapter-{number}": str(
                write_adapter(folder / "adapters" / str(number), shape, rank, number)
            )
            for number in range(adapters)
        }
        engine, limits = engine_of(model, kernels, folder / "some", adapters=paths)
        for names in ((), tuple(paths)):
            tpot_ms = point(engine, limits, batch, CONTEXT, adapters=names)["tpot_ms"]
            add(adapters, min(len(names), batch), tpot_ms)
    return rows


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Default: Llama-3.1-8B.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 64,
    adapters: Annotated[int, typer.Option(min=1, help="That the engine has.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Of each.")] = 16,
    kernels: Kernels = None,
    out: Out = None,
) -> None:
    """Measure each model and print a table."""
    rows: list[dict[str, Any]] = []
    for model in models or ["Llama-3.1-8B"]:
        rows += measure(model, batch, adapters, rank, kernels)
        release()
        if out is not None:  # what there is, should a later model fail
            given = f"--batch {batch} --adapters {adapters} --rank {rank}"
            write_results(out, rows, f"python -m bench.lora {given} --kernels KERNELS --out FILE")
    table = Table("model", "batch x context", "adapters", "used", "rank", "ms a token", "of none's")
    for row in rows:
        counts = (str(row[name]) for name in ("adapters", "used", "rank"))
        where = f"{row['batch']} x {row['context']}"
        times = f"{row['tpot_ms']:.2f}", f"{row['times_none']:.2f}"
        table.add_row(row["model"], where, *counts, *times)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
