"""How near each family's answers are to transformers' own.

    python -m bench.fidelity [FAMILY ...] [--kernels FOLDER] [--out FILE]

For each of ``bench.families`` a tiny random checkpoint, stored in bfloat16, so that all that are
compared have the same weights; served in bfloat16 on a GPU, and in float32 on the CPU where there
is none. Greedy tokens are compared with those of transformers in float32, after prompts of 1 to 300
tokens: the share of prompts after which all are the same. Log-probabilities are compared with its
own of the same tokens: their mean absolute error, and the one that transformers has in bfloat16.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from bench.families import FAMILIES, GPU_SHAPE, GPU_SHAPES, prompt_of, write
from bench.options import Kernels, Out
from bench.results import write_results
from fi_runtime.config import Device, EngineConfig
from fi_runtime.dtypes import dtype_name
from fi_runtime.engine.build import compute_dtype
from fi_runtime.engine.core import Engine
from fi_runtime.messages import SamplingParams

LENGTHS = (1, 2, 7, 16, 17, 33, 64, 100, 191, 256, 300)
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, seed=0)
DRAWN_TOKENS = 32
"""after each prompt"""


@dataclass(frozen=True)
class Fidelity:
    """Of one checkpoint."""

    greedy_equal: float
    """the share of prompts after which all greedy tokens are those of transformers in float32"""
    error: float
    """mean absolute error of the log-probabilities, against transformers in float32"""
    reference_error: float
    """the same of transformers in bfloat16"""


def fidelity_of(config: EngineConfig, copies: int = 8) -> Fidelity:
    """Of a checkpoint as the engine of that config serves it.

    Args:
        copies: prompts of each length that tokens are drawn after.
    """
    engine = Engine(config)
    wide = reference(config, torch.float32)
    error, reference_error = logprob_errors(engine, wide, reference(config, torch.bfloat16), copies)
    return Fidelity(greedy_equal(engine, wide), error, reference_error)


def reference(config: EngineConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Read from disk, since a model that is cast has its rotary frequencies cast too."""
    model = AutoModelForCausalLM.from_pretrained(config.checkpoint, dtype=dtype)
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        # What transformers chooses by itself leaves the cap out without a word, before 5.21.
        model.set_attn_implementation("eager")
    return model.to(config.device).eval()


def greedy_equal(engine: Engine, wide: PreTrainedModel) -> float:
    """The share of prompts after which all greedy tokens are the model's own."""
    results = engine.generate([prompt_of(length) for length in LENGTHS], GREEDY)
    equal = 0
    for length, result in zip(LENGTHS, results, strict=True):
        prompt = torch.tensor([prompt_of(length)], device=wide.device)
        with torch.inference_mode():
            out = wide.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=GREEDY.max_tokens,
                do_sample=False,
            )
        equal += out[0, length:].tolist() == result.tokens
    return equal / len(LENGTHS)


def logprob_errors(
    engine: Engine, wide: PreTrainedModel, narrow: PreTrainedModel, copies: int
) -> tuple[float, float]:
    """Mean absolute errors against the wide model: the engine's, and the narrow model's.

    Of drawn tokens: the likeliest ones of a small random model soon repeat, so that a whole answer
    would be one sample of how its logits round.
    """
    prompts = [prompt_of(length, copy) for length in LENGTHS for copy in range(copies)]
    params = [
        SamplingParams(max_tokens=DRAWN_TOKENS, seed=seed, logprobs=0)
        for seed in range(len(prompts))
    ]
    ours, theirs = [], []
    for prompt, result in zip(prompts, engine.generate(prompts, params), strict=True):
        tokens = prompt + result.tokens
        right = forced_logprobs(wide, tokens, len(prompt))
        ours.append((torch.tensor(result.logprobs) - right).abs())
        theirs.append((forced_logprobs(narrow, tokens, len(prompt)) - right).abs())
    return torch.cat(ours).mean().item(), torch.cat(theirs).mean().item()


def forced_logprobs(model: PreTrainedModel, tokens: list[int], start: int) -> torch.Tensor:
    """Of the tokens from ``start`` on: (tokens - start,), float32, on the CPU."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens], device=model.device)).logits[0]
    rows = logits.float().log_softmax(-1)[start - 1 : -1]
    return rows.gather(1, torch.tensor(tokens[start:], device=model.device)[:, None])[:, 0].cpu()


def write_family(name: str, folder: Path, device: Device) -> Path:
    """A checkpoint of a family, in bfloat16, of a shape that the device has kernels for."""
    shape = GPU_SHAPE | GPU_SHAPES.get(name, {}) if device == "cuda" else {}
    write(name, folder, torch.bfloat16, **shape)
    return folder


def config_of(folder: Path, device: Device, **knobs: Any) -> EngineConfig:
    """Of an engine with steps that hold several prompts, and prompts in several chunks."""
    values: dict[str, Any] = {"cache_tokens": 32_768, "step_tokens": 256, **knobs}
    return EngineConfig(checkpoint=str(folder), device=device, **values)


def measure(name: str, device: Device, kernels: Path | None) -> dict[str, Any]:
    """One row."""
    knobs = {"kernels": str(kernels.resolve())} if kernels else {}
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(write_family(name, Path(folder), device), device, **knobs)
        found = fidelity_of(config)
    return {
        "family": name,
        "device": device,
        "dtype": dtype_name(compute_dtype(config)),
        "greedy_equal": round(found.greedy_equal, 3),
        "mean_abs_logprob_error": float(f"{found.error:.3g}"),
        "reference_bf16_error": float(f"{found.reference_error:.3g}"),
    }


def main(
    families: Annotated[
        list[str] | None, typer.Argument(help=f"Of: {'; '.join(FAMILIES)}.")
    ] = None,
    kernels: Kernels = None,
    out: Out = None,
) -> None:
    """Compare each family and print a table."""
    logging.disable_progress_bar()
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in families or FAMILIES:
        rows.append(measure(name, device, kernels))
        if out is not None:  # what there is, should a later family fail
            write_results(out, rows, "python -m bench.fidelity --out FILE")
    table = Table("family", "device", "dtype", "greedy equal", "error", "transformers in bfloat16")
    for row in rows:
        own, their = row["mean_abs_logprob_error"], row["reference_bf16_error"]
        equal = f"{row['greedy_equal']:.1%}"
        table.add_row(row["family"], device, row["dtype"], equal, f"{own:.2g}", f"{their:.2g}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
