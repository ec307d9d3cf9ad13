"""What a captured pass reads of a step, from where it read it when it was captured."""

import numpy as np
import torch

from fi_runtime.attention.base import Int64s
from fi_runtime.upload import upload_to


class StepInputs:
    """The tokens of a step and, if the model has adapters, which of them each is computed with.

    Args:
        most: tokens.
        adapters: whether there are any.
    """

    def __init__(self, most: int, adapters: bool, device: torch.device) -> None:
        self._tokens = torch.zeros(most, dtype=torch.int64, device=device)
        self._adapters = torch.zeros_like(self._tokens) if adapters else None

    def first(self, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens and adapters of a step of so many, (count,) int64 each; they never move."""
        adapters = None if self._adapters is None else self._adapters[:count]
        return self._tokens[:count], adapters

    def fill(self, tokens: Int64s, adapters: Int64s | None) -> None:
        """Put a step's in; what is left of a longer one's is padding.

        Args:
            tokens: (tokens,), as ``embed`` takes them.
            adapters: (tokens,); None: no token has one.
        """
        upload_to(self._tokens, tokens)
        if self._adapters is not None:
            upload_to(self._adapters, np.zeros_like(tokens) if adapters is None else adapters)
