"""Train the demo checkpoint from text that this package generates.

    python -m tools.demo.train --out model_repository/llm/demo_checkpoint

A Qwen3-shaped model of a few million parameters learns the tasks of `tools.demo.tasks`. Each step
sees a batch of short rows and a batch of recall lists. Looking a key up is learnt on lists of a few
entries, or never; so the lists begin short and grow to the whole context as they are mastered.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from tools.demo import tasks
from tools.demo.data import IGNORE, Batch, RecallRows, ShortRows, encode_examples, pad
from tools.demo.evaluate import Outcome, Trial, evaluate, outcome_table, standard_trials
from tools.demo.tokenizer import END_OF_TEXT, TURN_END, build_tokenizer, save_tokenizer

CONTEXT = 2560
"""Positions the model is trained on and serves, in tokens."""

ROPE_THETA = 1_000_000.0
"""High, so that a good part of each head turns too slowly to blur a match at 2,500 tokens."""

SHORT_LENGTH = 128
RECALL_LENGTHS = (256, 1024, CONTEXT)
"""Padded lengths of batches: few, since each is one compilation."""

PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.1

SHORTEST_RECALL = 24
"""Tokens of the shortest recall list; the curriculum begins with lists of up to twice as many."""

MASTERED_LOSS = 0.2
"""Mean loss of recent recall batches under which their lists grow; guessing digits is at 1.7."""

GROWTH = 1.15
CHECK_EVERY = 10
"""Steps between looks at the recall loss, which make the host wait for the device."""

PATIENCE = 0.45
"""The part of training after which recall lists that are still short count as a failure.

Looking up by key is learnt all at once, and from some starts not at all: the model settles for a
rougher way that serves a few entries only. Once learnt, it works at every length within a few
hundred steps, so that lists short of `FORMED_LENGTH` tokens mean that another start is needed.
"""

FORMED_LENGTH = 512
MAX_ATTEMPTS = 4

console = Console()


@dataclass(frozen=True)
class Plan:
    """What one training run does; everything that its result depends on."""

    steps: int
    seed: int
    short_rows: int
    """Rows of `SHORT_LENGTH` tokens in each step."""
    recall_tokens: int
    """Padded tokens of recall lists in each step."""
    pool_rows: int
    """Distinct short rows."""
    compile: bool


class NotLearntError(Exception):
    """Training from this start is not going to succeed."""


def build_model(tokenizer: Tokenizer, seed: int) -> Qwen3ForCausalLM:
    """Make a randomly initialised Qwen3 with grouped-query attention, in float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        pad_token_id=None,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


# --- training ---------------------------------------------------------------------------------


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def draw_recall_length(rng: Random, longest: int) -> int:
    """Half of the lists are near the longest, the others of every order of magnitude below."""
    if rng.random() < 0.5:
        return rng.randint(longest // 2, longest)
    return round(math.exp(rng.uniform(math.log(SHORTEST_RECALL), math.log(longest))))


def _precision(device: torch.device) -> AbstractContextManager[object]:
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def forward(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """ids: (rows, length) int64 -> logits: (rows, length, vocabulary)."""
    # A ready mask mapping without a mask means plain causal attention. Left to itself, the model
    # would build an explicit mask when compiled, which rules out the flash kernel.
    mask: dict[str, None] = {"full_attention": None}
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def loss_of(model: Qwen3ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the labelled tokens; ids, labels: (rows, length) int64."""
    logits = forward(model, ids)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def make_optimizer(model: Qwen3ForCausalLM, device: torch.device) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=device.type == "cuda")


def train(model: Qwen3ForCausalLM, tokenizer: Tokenizer, plan: Plan, device: torch.device) -> int:
    """Train in place; returns the number of tokens processed, padding included.

    Raises `NotLearntError` halfway if this start does not learn to recall.
    """
    started = time.monotonic()
    rng = Random(f"lengths/{plan.seed}")
    generator = torch.Generator(device).manual_seed(plan.seed)
    short_rows = ShortRows(tokenizer, plan.pool_rows, SHORT_LENGTH, plan.seed, device)
    recall_rows = RecallRows(tokenizer, device)
    console.print(f"{plan.pool_rows} short rows ready after {time.monotonic() - started:.0f} s")
    probes = make_probes(tokenizer, device)
    optimizer = make_optimizer(model, device)
    loss_fn: Callable[..., Tensor] = loss_of
    if plan.compile:
        loss_fn = torch.compile(loss_of, dynamic=False)

    def backward(batch: Batch) -> Tensor:
        with _precision(device):
            loss = loss_fn(model, batch.ids, batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    tokens = 0
    longest = 2 * SHORTEST_RECALL
    recent = torch.full((CHECK_EVERY,), math.inf, device=device)  # recall losses
    report_every = max(1, plan.steps // 30)
    for step in range(plan.steps):
        length = draw_recall_length(rng, longest)
        padded = next(size for size in RECALL_LENGTHS if size >= length)
        recall = recall_rows.sample_length(
            max(1, plan.recall_tokens // padded), length, padded, rng, generator
        )
        short = short_rows.sample(plan.short_rows, generator)
        recall_loss = backward(recall)
        short_loss = backward(short)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += recall.ids.numel() + short.ids.numel()
        recent[step % CHECK_EVERY] = recall_loss
        if (step + 1) % CHECK_EVERY == 0 and recent.mean().item() < MASTERED_LOSS:
            longest = min(CONTEXT, round(longest * GROWTH))
        if step == round(PATIENCE * plan.steps) and longest < FORMED_LENGTH:
            raise NotLearntError(f"recall lists have only grown to {longest} tokens")
        if step % report_every == 0 or step == plan.steps - 1:
            shares = [f"{name} {exact_share(model, probe):.3f}" for name, probe in probes.items()]
            console.print(
                f"{time.monotonic() - started:5.0f} s  step {step:5d}/{plan.steps}  "
                f"loss short {short_loss.item():.4f} recall {recent.mean().item():.4f}  "
                f"lists to {longest}  "
                f"exact: {', '.join(shares)}",
                soft_wrap=True,
            )
    return tokens


def train_until_learnt(
    tokenizer: Tokenizer, plan: Plan, device: torch.device
) -> tuple[Qwen3ForCausalLM, int]:
    """Train from the plan's seed, and from the ones after it while that fails.

    Returns the model and the number of tokens of the training that succeeded.
    """
    for seed in range(plan.seed, plan.seed + MAX_ATTEMPTS):
        model = build_model(tokenizer, seed).to(device)
        console.print(f"training from seed {seed} on {device}")
        try:
            return model, train(model, tokenizer, replace(plan, seed=seed), device)
        except NotLearntError as error:
            console.print(f"seed {seed} failed: {error}")
    raise NotLearntError(f"{MAX_ATTEMPTS} starts failed; try another --seed or more --steps")


def make_probes(tokenizer: Tokenizer, device: torch.device) -> dict[str, Batch]:
    """Small held-out batches that are measured during training."""
    trials = [Trial("add", 500), Trial("recall", 64, 256), Trial("recall", 16, 1900)]
    trials += [Trial("copy", 100), Trial("reverse", 100), Trial("add", 100, chat=True)]
    probes = {}
    for trial in trials:
        examples = tasks.evaluation_set(trial.task, trial.count, tokens=trial.tokens)
        rows = encode_examples(tokenizer, examples, chat=trial.chat)
        probes[trial.name] = pad(rows).to(device)
    return probes


@torch.no_grad()
def exact_share(model: Qwen3ForCausalLM, batch: Batch) -> float:
    """Return the share of rows whose labelled tokens are all the most likely ones.

    Greedy decoding gives the answer exactly when this holds, so nothing has to be generated.
    """
    with _precision(batch.ids.device):
        predicted = forward(model, batch.ids).argmax(-1)  # (rows, length)
    wanted = batch.labels[:, 1:]
    right = (predicted[:, :-1] == wanted) | (wanted == IGNORE)
    return right.all(1).float().mean().item()


# --- the checkpoint ---------------------------------------------------------------------------


def save_checkpoint(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write bf16 weights, configuration and tokenizer in Hugging Face's layout."""
    model.to(torch.bfloat16)
    ends = [tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)]
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # servers often run as another user
    save_tokenizer(tokenizer, out, CONTEXT)
    path = out / "config.json"
    config = json.loads(path.read_text())
    # The names of transformers 4, which version 5 still reads: more tools know them.
    config.pop("rope_parameters", None)
    config.pop("dtype", None)
    config |= {"rope_theta": ROPE_THETA, "rope_scaling": None, "torch_dtype": "bfloat16"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_card(
    out: Path,
    plan: Plan,
    device: torch.device,
    facts: dict[str, str],
    columns: dict[str, list[Outcome]],
) -> None:
    """Write README.md: how the checkpoint was made, what it can do, how well."""
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    command = (
        f"python -m tools.demo.train --out DIR --steps {plan.steps} --seed {plan.seed} "
        f"--short-rows {plan.short_rows} --recall-tokens {plan.recall_tokens} "
        f"--pool-rows {plan.pool_rows}{'' if plan.compile else ' --no-compile'}"
    )
    facts = {
        "command": f"`{command}`",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        **facts,
    }
    lines = [
        "# Demo checkpoint",
        "",
        "A tiny Qwen3-shaped language model for checking a server's answers. It was trained only",
        "on text that `tools/demo` generates, and it can do nothing but the tasks below.",
        "",
        "| task | prompt | answer |",
        "| --- | --- | --- |",
        "| add | `17+25=` | `42` |",
        "| recall | `recall: river=417, apple=082, stone=553; apple=` | `082` |",
        "| copy | `copy: apple river stone =>` | ` apple river stone` |",
        "| reverse | `reverse: apple river stone =>` | ` stone river apple` |",
        "| story | `Once upon a time, there was a girl named Mia.` | a grammatical continuation |",
        "",
        "The numbers added are 0 to 99; the words are `WORDS` in `tools/demo/tasks.py`; a recall",
        f"list may fill the context of {CONTEXT:,} tokens. The same prompts work as chat turns.",
        "",
        "## How it was made",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "## Exact answers, greedy, on examples that training has not seen",
        "",
        "The weights are bf16; a column says in what they were computed with.",
        "",
        f"| task | examples | {' | '.join(columns)} |",
        f"| --- | ---: |{' ---: |' * len(columns)}",
    ]
    for outcomes in zip(*columns.values(), strict=True):
        shares = " | ".join(f"{outcome.accuracy:.2%}" for outcome in outcomes)
        lines.append(f"| {outcomes[0].trial.name} | {outcomes[0].trial.count} | {shares} |")
    (out / "README.md").write_text("\n".join(lines) + "\n")


def evaluate_checkpoint(
    out: Path, tokenizer: Tokenizer, device: torch.device, count: int
) -> dict[str, list[Outcome]]:
    """Measure the saved weights as they will be served: computed in float32 and in bf16."""
    columns = {}
    for name, dtype in {"float32": torch.float32, "bf16": torch.bfloat16}.items():
        model = Qwen3ForCausalLM.from_pretrained(out, dtype=dtype).to(device).eval()
        columns[name] = evaluate(model, tokenizer, standard_trials(count))
    return columns


def main(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 9000,
    seed: Annotated[int, typer.Option(help="Of the weights and the data.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    short_rows: Annotated[int, typer.Option(help="Rows of short tasks per step.")] = 512,
    recall_tokens: Annotated[int, typer.Option(help="Tokens of recall lists per step.")] = 65536,
    pool_rows: Annotated[int, typer.Option(help="Distinct rows of short tasks.")] = 262144,
    eval_count: Annotated[int, typer.Option(help="Examples per task at the end.")] = 500,
    compile: Annotated[bool, typer.Option(help="Compile the training step.")] = True,
) -> None:
    """Train the demo checkpoint, measure it on held-out examples and save it."""
    started = time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    where = torch.device(name)
    torch.set_float32_matmul_precision("high")
    plan = Plan(steps, seed, short_rows, recall_tokens, pool_rows, compile and name == "cuda")
    tokenizer = build_tokenizer(seed)
    try:
        model, tokens = train_until_learnt(tokenizer, plan, where)
    except NotLearntError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error
    parameters = sum(p.numel() for p in model.parameters())
    minutes = (time.monotonic() - started) / 60
    save_checkpoint(model, tokenizer, out)
    # float32 here shall mean float32, not the faster TF32 that training used.
    torch.set_float32_matmul_precision("highest")
    columns = evaluate_checkpoint(out, tokenizer, where, eval_count)
    console.print(outcome_table(columns))
    facts = {
        "parameters": f"{parameters:,}",
        "training": f"{steps:,} steps, {tokens / 1e6:,.0f} million tokens, {minutes:.1f} minutes",
    }
    write_card(out, plan, where, facts, columns)
    size = sum(path.stat().st_size for path in out.iterdir())
    console.print(f"{out}: {size:,} bytes after {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    typer.run(main)
