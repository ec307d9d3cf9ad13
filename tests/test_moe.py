"""The experts' one product for all against one for each, and the router against its definition."""

import math

import pytest
import torch

from fi_runtime.kernels.activation import silu_and_mul_reference
from fi_runtime.kernels.moe import ExpertMLPs, experts_grouped, experts_reference, route

EXPERTS, HIDDEN, SIZE = 12, 32, 24


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def choices(tokens: int, per_token: int, of: int) -> torch.Tensor:
    """Experts of each token, no one twice, all among the last few."""
    rng = torch.Generator().manual_seed(tokens)
    rows = [torch.randperm(of, generator=rng)[:per_token] for _ in range(tokens)]
    return torch.stack(rows) + EXPERTS - of


@pytest.mark.parametrize(
    ("tokens", "per_token", "of"),
    [(1, 1, EXPERTS), (1, 3, EXPERTS), (5, 2, EXPERTS), (64, 4, EXPERTS), (300, 3, 3), (40, 2, 7)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_one_product_for_all_experts_is_one_for_each(
    tokens: int, per_token: int, of: int, biased: bool
) -> None:
    mlps = ExpertMLPs(
        normal(EXPERTS, 2 * SIZE, HIDDEN) / HIDDEN**0.5,
        normal(EXPERTS, HIDDEN, SIZE) / SIZE**0.5,
        silu_and_mul_reference,
        normal(EXPERTS, 2 * SIZE) if biased else None,
        normal(EXPERTS, HIDDEN) if biased else None,
    )
    arguments = (
        normal(tokens, HIDDEN),
        normal(tokens, per_token).softmax(-1),
        choices(tokens, per_token, of),
        mlps,
    )
    found, expected = experts_grouped(*arguments), experts_reference(*arguments)
    assert torch.allclose(found, expected, atol=1e-5)
    assert expected.abs().mean() > 0.01


@pytest.mark.parametrize("normalised", [True, False])
def test_a_token_goes_to_its_likeliest_experts(normalised: bool) -> None:
    logits = normal(50, EXPERTS)
    weights, chosen = route(logits, 4, normalised)
    for row, own, places in zip(logits.tolist(), weights.tolist(), chosen.tolist(), strict=True):
        shares = [math.exp(each) / sum(map(math.exp, row)) for each in row]
        likeliest = sorted(range(EXPERTS), key=lambda expert: -shares[expert])[:4]
        assert places == likeliest
        total = sum(shares[expert] for expert in likeliest) if normalised else 1.0
        assert own == pytest.approx([shares[expert] / total for expert in likeliest], rel=1e-5)
