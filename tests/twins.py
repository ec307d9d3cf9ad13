"""The engine and transformers' own model, of the same checkpoint, on the CPU in float32."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bench.families import prompt_of
from fi_runtime.config import EngineConfig
from fi_runtime.engine.core import Engine
from fi_runtime.kernels import projection
from fi_runtime.kernels.moe import experts_grouped
from fi_runtime.layers import moe
from fi_runtime.messages import SamplingParams

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, seed=0, logprobs=0)


@dataclass
class Twin:
    """A checkpoint, and what transformers makes of it."""

    folder: Path
    model: PreTrainedModel
    _answers: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)

    def answer(self, length: int) -> tuple[list[int], list[float]]:
        """Its own greedy tokens after the prompt of that length, and their logprobs."""
        if length not in self._answers:
            with torch.inference_mode():
                out = self.model.generate(
                    torch.tensor([prompt_of(length)]),
                    max_new_tokens=GREEDY.max_tokens,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            tokens = out.sequences[0, length:].tolist()
            rows = torch.cat(out.logits).float().log_softmax(-1)
            best, second = rows.topk(2).values.unbind(-1)
            assert (best - second).min() > 1e-4, "a near tie: choose another seed"
            self._answers[length] = tokens, [rows[i, t].item() for i, t in enumerate(tokens)]
        return self._answers[length]

    def engine(self, **knobs: Any) -> Engine:
        return Engine(
            EngineConfig(checkpoint=str(self.folder), **{"cache_tokens": 16_384, **knobs})
        )

    def check(self, engine: Engine, lengths: Sequence[int]) -> None:
        """Prompts of all these lengths at once, in an order of their own."""
        lengths = random.Random(5).sample(lengths, k=len(lengths))
        results = engine.generate([prompt_of(length) for length in lengths], GREEDY)
        for length, result in zip(lengths, results, strict=True):
            tokens, logprobs = self.answer(length)
            assert result.tokens == tokens, f"prompt of {length} tokens"
            assert result.logprobs == pytest.approx(logprobs, abs=1e-4), f"{length} tokens"
            assert result.finish == "length"
        assert engine.tree.free == engine.tree.usable


def take_few_tokens_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have few tokens computed as on a GPU, whose kernels are stood in for by what they mean."""

    def norm_linear(*arguments: Any) -> torch.Tensor:
        *arguments, out = arguments
        result = projection.norm_linear_reference(*arguments)
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(projection, "is_few", lambda x, weight: len(x) <= 16)
    monkeypatch.setattr(projection, "norm_linear", norm_linear)
    monkeypatch.setattr(moe, "experts", experts_grouped)
    for name in ("norm_linear_silu_and_mul", "add_linear"):
        monkeypatch.setattr(projection, name, getattr(projection, f"{name}_reference"))
