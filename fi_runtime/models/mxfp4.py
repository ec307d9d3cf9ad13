"""Weights in MXFP4: blocks of 32 elements that share a scale (Open Compute Project, 2023)."""

import torch

METHOD = "mxfp4"
"""what quantization_config calls it"""
BLOCK = 32
"""elements that share a scale, two to a byte"""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""what the 3 lower bits of an element say; the fourth is its sign"""
_BIAS = 127
"""of scales, which are powers of 2"""


def stored_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the blocks and of the scales of (experts, in, out), which are stored by outputs."""
    experts, inputs, outputs = shape
    blocks = inputs // BLOCK
    return (experts, outputs, blocks, BLOCK // 2), (experts, outputs, blocks)


def dequantised(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the codes mean.

    Args:
        blocks: (experts, out, blocks, 16), uint8: of each byte the lower half is first.
        scales: (experts, out, blocks), uint8: e + 127, for a factor of 2**e.

    Returns:
        (experts, out, 32 * blocks), of that dtype.
    """
    experts, outputs, count, _ = blocks.shape
    meant = torch.empty((experts, outputs, BLOCK * count), dtype=dtype, device=blocks.device)
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=blocks.device)
    # One expert after another: what lies between takes many times the memory of the codes.
    for codes, scale, place in zip(blocks, scales, meant, strict=True):
        pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(2)
        factors = scale.int().sub(_BIAS).unsqueeze(2)
        place.copy_(torch.ldexp(values[pairs.int()], factors).flatten(1))
    return meant
