import torch

from fi_runtime.kernels.rotary import rotate


class Rotary:
    """Rotary position embedding over the whole head, halves as pairs.

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
        self._cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1) * scaling

    def __call__(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn ``q`` and ``k``, (tokens, any heads, dim), to ``positions``, (tokens,) int32."""
        return rotate(positions, q, k, self._cos_sin)
