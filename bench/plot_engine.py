"""Draws how near the engine alone comes to what the GPU's memory allows, beside its peers.

    python -m bench.plot_engine FOLDER OUT.png

FOLDER has ``offline.json`` and ``latency.json``, as ``bench.offline`` and ``bench.latency`` write
them. What they lack is left out.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.drawing import pyplot
from bench.results import read_results
from fi_runtime.config import ConfigError

OURS = "fi_runtime"
MINI_SGLANG, VLLM = "mini-sglang 20fcd7f", "vLLM 0.25.1"
COLOURS = {OURS: "#0072B2", VLLM: "#E69F00", MINI_SGLANG: "#999999"}
"""told apart by colour-blind readers too"""

# Of the same card, torch, shapes and work, as docs/BENCHMARKS.md says of each.
PEERS_OFFLINE = {
    "Qwen3-0.6B": {MINI_SGLANG: 17_286, VLLM: 18_596},
    "Llama-3.1-8B": {MINI_SGLANG: 8_035, VLLM: 8_154},
    "Qwen3-14B": {MINI_SGLANG: 4_201},
}
"""tokens per second"""
PEERS_LATENCY = {
    ("Qwen3-0.6B", 1): {MINI_SGLANG: 1.67, VLLM: 2.22},
    ("Qwen3-0.6B", 8): {MINI_SGLANG: 2.04, VLLM: 2.00},
    ("Qwen3-0.6B", 64): {MINI_SGLANG: 4.86, VLLM: 4.82},
    ("Llama-3.1-8B", 1): {MINI_SGLANG: 6.45, VLLM: 6.52},
    ("Llama-3.1-8B", 8): {MINI_SGLANG: 7.05, VLLM: 7.04},
    ("Llama-3.1-8B", 64): {MINI_SGLANG: 10.40, VLLM: 10.18},
}
"""milliseconds for each further token, by model and batch"""


def shares(offline: dict[str, Any], latency: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What is drawn: for each line the share of the limit that each engine reaches.

    Args:
        offline: the results of ``bench.offline``.
        latency: those of ``bench.latency``.
    """
    lines = []
    for row in latency["rows"]:
        times = {OURS: row["tpot_ms"]} | PEERS_LATENCY.get((row["model"], row["batch"]), {})
        where = f"{row['batch']} x {row['context']:,}"
        lines.append(
            (row["model"], where, {who: row["limit_ms"] / it for who, it in times.items()})
        )
    for row in offline["rows"]:
        speeds = {OURS: row["tokens_per_s"]} | PEERS_OFFLINE.get(row["model"], {})
        limit = row["limit_tokens_per_s"]
        lines.append((row["model"], "offline", {who: it / limit for who, it in speeds.items()}))
    models = list(dict.fromkeys(model for model, _, _ in lines))
    lines.sort(key=lambda line: models.index(line[0]))
    return {f"{model}, {where}": each for model, where, each in lines}


def draw(lines: dict[str, dict[str, float]], gpu: str, out: Path) -> None:
    """Draw them, a line each.

    Raises:
        ConfigError: there are none, or there is nothing to draw with.
    """
    if not lines:
        raise ConfigError("the results have no rows to draw")
    plots = pyplot()
    figure, axes = plots.subplots(figsize=(9, 0.9 + 0.42 * len(lines)), layout="constrained")
    for number, each in enumerate(lines.values()):
        ends = [100 * min(each.values()), 100 * max(each.values())]
        axes.plot(ends, [number, number], color="0.8", linewidth=3, zorder=1)
        axes.annotate(
            f"{100 * each[OURS]:.0f} %",
            (100 * each[OURS], number),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    for who, colour in COLOURS.items():
        there = [(100 * each[who], n) for n, each in enumerate(lines.values()) if who in each]
        if there:
            height = 3 if who == OURS else 2
            axes.scatter(*zip(*there, strict=True), 70, color=colour, label=who, zorder=height)
    axes.set_yticks(range(len(lines)), list(lines))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="x", color="0.9", zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("share of what memory and arithmetic allow, per cent; more is better")
    axes.set_title(f"The engine alone, {gpu}\nbatch x context: further tokens", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(out, dpi=160)


def main(
    folder: Annotated[Path, typer.Argument(help="With offline.json and latency.json.")],
    out: Annotated[Path, typer.Argument(help="The picture, a PNG.")],
) -> None:
    """Draw the results of a folder."""
    try:
        offline, latency = (read_results(folder / f"{n}.json") for n in ("offline", "latency"))
        draw(shares(offline, latency), latency["gpu"], out)
    except ConfigError as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
