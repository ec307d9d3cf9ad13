"""Dtypes by the names that knobs and checkpoints call them by."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""those that weights may be stored in, and computed with"""


def dtype_name(dtype: torch.dtype) -> str:
    """As torch calls it, without the module: any dtype, not only of ``DTYPES``."""
    return str(dtype).removeprefix("torch.")
