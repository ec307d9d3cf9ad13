import torch


class Rotary:
    """Rotary position embedding over the whole head (Su et al., 2021), halves as pairs.

    Element ``i`` of a head turns with element ``i + head_dim / 2`` by
    ``position * inverse_frequencies[i]``.

    Args:
        inverse_frequencies: (head_dim / 2,), float32, radians a position.
        scaling: factor on the result, for the rope scalings that have one.
        max_position: positions that the table is made for.
    """

    def __init__(
        self, inverse_frequencies: torch.Tensor, scaling: float, max_position: int
    ) -> None:
        positions = torch.arange(
            max_position, dtype=torch.float32, device=inverse_frequencies.device
        )
        angles = torch.outer(positions, inverse_frequencies)
        self._cos = (angles.cos() * scaling).repeat(1, 2)
        self._sin = (angles.sin() * scaling).repeat(1, 2)

    def __call__(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn queries and keys: ``positions`` (tokens,), the others (tokens, any heads, dim)."""
        cos = self._cos[positions].unsqueeze(1).to(q.dtype)
        sin = self._sin[positions].unsqueeze(1).to(q.dtype)
        return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
