"""Measure a demo checkpoint with transformers: greedy decoding, exact answers.

python -m tools.demo.evaluate model_repository/llm/demo_checkpoint --count 100
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from tools.demo import tasks
from tools.demo.tokenizer import END_OF_TEXT, TURN_END

TOKENS_PER_BATCH = 65536
"""Tokens that are decoded together: bounds the memory of the cache and the logits."""


@dataclass(frozen=True)
class Trial:
    """One line of the evaluation: a task, as completion or as chat, over `count` examples."""

    task: tasks.Task
    count: int
    tokens: int = 256
    chat: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        name = f"{self.task} at {self.tokens:,} tokens" if self.task == "recall" else self.task
        return f"{name} (chat)" if self.chat else name


@dataclass(frozen=True)
class Outcome:
    """How many of a trial's examples were answered exactly."""

    trial: Trial
    correct: int

    @property
    def accuracy(self) -> float:
        """The share of exact answers, 0 to 1."""
        return self.correct / self.trial.count


def standard_trials(count: int) -> list[Trial]:
    """Every task as completion and as chat, recall at several lengths, `count` examples each."""
    trials = []
    for chat in (False, True):
        trials += [Trial("add", count, chat=chat)]
        trials += [Trial("recall", count, tokens, chat) for tokens in (64, 256, 1000, 1900, 2500)]
        trials += [Trial(task, count, chat=chat) for task in ("copy", "reverse", "story")]
    return trials


def evaluate(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, trials: Sequence[Trial], seed: int = 0
) -> list[Outcome]:
    """Decode greedily and count exact answers; a model that does not stop is wrong."""
    outcomes = []
    for trial in trials:
        examples = tasks.evaluation_set(trial.task, trial.count, seed, tokens=trial.tokens)
        prompts = [tasks.chat_text(e.prompt) if trial.chat else e.prompt for e in examples]
        outputs = greedy(model, tokenizer, prompts, tasks.MAX_ANSWER_TOKENS)
        correct = sum(map(tasks.is_correct, examples, outputs))
        outcomes.append(Outcome(trial, correct))
    return outcomes


def greedy(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Continue each prompt until the model stops; prompts of similar length go together."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    size = max(1, TOKENS_PER_BATCH // (len(encoded[order[-1]]) + max_new_tokens))
    outputs = [""] * len(encoded)
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        new_ids = _generate(model, tokenizer, [encoded[index] for index in chosen], max_new_tokens)
        texts = tokenizer.decode_batch(new_ids, skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            outputs[index] = text
    return outputs


def _generate(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """Return the new ids of each prompt, padded with end tokens."""
    ends = [tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)]
    length = max(map(len, prompts))
    # Padded on the left, so that every prompt ends where its continuation begins: (rows, length).
    ids = torch.tensor([[ends[0]] * (length - len(prompt)) + [*prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    result = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=min(max_new_tokens, model.config.max_position_embeddings - length),
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    return cast(list[list[int]], result[:, length:].tolist())


def outcome_table(columns: Mapping[str, Sequence[Outcome]]) -> Table:
    """One line per trial, one column of accuracies per way of running the model."""
    table = Table(title="Exact answers, greedy")
    table.add_column("task")
    table.add_column("examples", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    for outcomes in zip(*columns.values(), strict=True):
        trial = outcomes[0].trial
        shares = [f"{outcome.accuracy:.2%}" for outcome in outcomes]
        table.add_row(trial.name, str(trial.count), *shares)
    return table


def main(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint's folder.")],
    count: Annotated[int, typer.Option(help="Examples per task.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the evaluation sets.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Print the accuracy of a checkpoint on every task."""
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, **options).to(device).eval()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    outcomes = evaluate(model, tokenizer, standard_trials(count), seed)
    Console().print(outcome_table({dtype: outcomes}))


if __name__ == "__main__":
    typer.run(main)
