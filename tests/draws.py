"""What tokens are drawn by, from requests' parameters."""

from collections.abc import Sequence

import numpy as np
import torch

from fi_runtime.engine.sampler import draws_of, knobs_of
from fi_runtime.messages import SamplingParams


def draws_for(rows: Sequence[SamplingParams], indices: Sequence[int]) -> torch.Tensor:
    """Of each row's parameters, for its output's token of that index: (5, rows)."""
    return draws_of(
        np.array([knobs_of(row) for row in rows]).T,
        np.array([row.seed for row in rows], dtype=np.uint64),
        np.array(indices, dtype=np.uint64),
    )
