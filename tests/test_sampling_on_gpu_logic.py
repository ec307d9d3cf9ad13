"""How a GPU draws, on the CPU: FlashInfer is stood in for by what its functions compute. The real
ones are for tests/test_gpu.py."""

from types import SimpleNamespace

import pytest
import torch

from fi_runtime.engine.sampler import filters
from fi_runtime.kernels import sampling
from fi_runtime.kernels.sampling import Draws, choose_reference
from fi_runtime.messages import SamplingParams
from tests.draws import draws_for


def softmax(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    return (logits / temperature[:, None]).softmax(dim=-1)


def top_k_renorm(weights: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    order = weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    kept = weights.where(order < top_k[:, None], 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def top_p_renorm(
    weights: torch.Tensor, top_p: torch.Tensor, is_deterministic: bool
) -> torch.Tensor:
    assert is_deterministic
    assert top_p.is_contiguous()
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.where(before < top_p[:, None] * ordered.sum(dim=-1, keepdim=True), 0.0)
    kept = torch.zeros_like(kept).scatter_(1, order, kept)
    return kept / kept.sum(dim=-1, keepdim=True)


NO_FILTER = {
    "top_k": torch.zeros(200),
    "top_p": torch.ones(200),
    "min_p": torch.zeros(200),
}


@pytest.mark.parametrize("vocab", [12, 997, 1504, 32_000])
@pytest.mark.parametrize(
    "kind",
    [
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.7, "min_p": 0.01},
    ],
    ids=str,
)
def test_the_same_tokens_are_drawn_as_by_the_reference(
    monkeypatch: pytest.MonkeyPatch, kind: dict[str, float], vocab: int
) -> None:
    stand_in = SimpleNamespace(
        softmax=softmax, top_k_renorm_probs=top_k_renorm, top_p_renorm_probs=top_p_renorm
    )
    monkeypatch.setattr(sampling, "flashinfer", lambda: SimpleNamespace(sampling=stand_in))
    logits = torch.randn(200, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    rows = [SamplingParams(max_tokens=1, seed=i, **kind) for i in range(len(logits))]  # type: ignore[arg-type]
    draws = draws_for(rows, range(len(logits)))
    assert filters(draws)
    table = Draws.of(draws)
    weights = softmax(logits, table.temperature.float())
    left = sampling._keep(weights, table).log()
    found = choose_reference(left, table._replace(temperature=torch.ones(200), **NO_FILTER))
    expected = choose_reference(logits, table)
    # In float32: a token on the edge of a filter may be left or not.
    assert int((found != expected).sum()) <= 2
