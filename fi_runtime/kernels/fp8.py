"""Products with weights in fp8 (float8_e4m3fn), whose rows are rounded to it on their way.

Weights have a scale for each row, or for each block of 128 x 128; what they are multiplied with has
one for each row, or for each 128 elements of one, chosen so that its largest element fits.
"""

from collections.abc import Iterable

import torch
from torch.nn import functional
from torch.nn.functional import ScalingType

from fi_runtime.kernels.own import own

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
BLOCK = 128
ROWS = 16
"""that matrix products are given multiples of"""
LEAST = 1e-10
"""the largest element that rows are taken to have at least, so that zeros have a scale"""


def has_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights may stay in fp8: on Hopper, where all else is in bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def fits(outputs: Iterable[int], inputs: int, blocks: bool) -> bool:
    """Whether a projection is of sizes that there are products for.

    Args:
        outputs: of each part that is joined to one weight.
        inputs: of all.
        blocks: whether scales are those of blocks, which lie within one part each.
    """
    multiple = BLOCK if blocks else ROWS
    return inputs % multiple == 0 and all(count % multiple == 0 for count in outputs)


def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight that is meant, in float32: (out, in).

    Args:
        weight: (out, in), in fp8.
        scale: float32; (out, 1), or (out / 128, in / 128), both rounded up.
    """
    if scale.shape != (len(weight), 1):
        scale = scale.repeat_interleave(BLOCK, 0)[: len(weight)]
        scale = scale.repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
    return weight.float() * scale


def laid_out(scale: torch.Tensor, blocks: bool) -> torch.Tensor:
    """A weight's scale, as ``dequantised`` takes it, as ``product`` takes it."""
    if not blocks:
        return scale.T.contiguous()
    outputs, inputs = scale.shape
    padded = scale.new_zeros((outputs, -(-inputs // 4) * 4))
    padded[:, :inputs] = scale
    return padded.T


def product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, blocks: bool
) -> torch.Tensor:
    """X times the weight: (rows, out), in the dtype of ``x``.

    Args:
        x: (rows, in), bfloat16.
        weight: (out, in), in fp8.
        scale: of the weight, as ``laid_out`` lays it out.
        blocks: whether it is of blocks.
    """
    codes, scales = rounded(x, blocks)
    own_kind, kind = ScalingType.RowWise, ScalingType.RowWise
    if blocks:
        own_kind, kind = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    y = functional.scaled_mm(codes, weight.T, scales, own_kind, scale, kind, output_dtype=x.dtype)
    return y[: len(x)]


def product_reference(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, blocks: bool
) -> torch.Tensor:
    """``product`` in plain torch, in the dtype of ``x``."""
    codes, scales = rounded_reference(x, blocks)
    wide = codes.float() * scales.repeat_interleave(x.shape[1] // scales.shape[1], 1)
    own_scale = scale.T[:, : x.shape[1] // BLOCK] if blocks else scale.T
    return (wide[: len(x)] @ dequantised(weight, own_scale).T).to(x.dtype)


def rounded(x: torch.Tensor, blocks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in fp8 and their scales, padded with rows of zeros to a multiple of 16.

    Args:
        x: (rows, in), bfloat16.
        blocks: whether each 128 elements have a scale, not each row.

    Returns:
        (rows, in) in fp8; (rows, 1) or (rows, in / 128), float32, of which columns are contiguous.
    """
    rows, inputs = -(-len(x) // ROWS) * ROWS, x.shape[1]
    codes = torch.empty((rows, inputs), dtype=FP8, device=x.device)
    groups = inputs // BLOCK if blocks else 1
    scales = torch.empty((groups, rows), dtype=torch.float32, device=x.device)
    own().round_rows(x, codes, scales)
    return codes, scales.T


def rounded_reference(x: torch.Tensor, blocks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    wide = functional.pad(x.float(), (0, 0, 0, -len(x) % ROWS))
    groups = wide.view(len(wide), -1, BLOCK if blocks else wide.shape[1])
    scales = groups.abs().amax(2, keepdim=True).clamp(min=LEAST) / LARGEST
    codes = (groups / scales).clamp(-LARGEST, LARGEST).to(FP8)
    return codes.flatten(1), scales.squeeze(2).T.contiguous().T
