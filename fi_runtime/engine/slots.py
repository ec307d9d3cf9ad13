"""What steps need of each running sequence, in rows that numpy takes at once."""

import numpy as np
import numpy.typing as npt

from fi_runtime.attention.base import Int32s, Int64s
from fi_runtime.engine import sampler
from fi_runtime.engine.sequence import Sequence

FIRST_PAGES = 64
"""that a row has room for at first"""


class Slots:
    """Pages and sampling parameters of the sequences that run, by slot."""

    def __init__(self, max_sequences: int) -> None:
        self._lists: list[list[int]] = [[] for _ in range(max_sequences)]
        """whose pages a row holds: a sequence that stops and runs again has a new list"""
        self._held = [0] * max_sequences
        """how many of them"""
        self._rows: list[Int32s] = [
            np.zeros(FIRST_PAGES, dtype=np.int32) for _ in range(max_sequences)
        ]
        self._knobs = np.zeros((4, max_sequences))
        self._seeds = np.zeros(max_sequences, dtype=np.uint64)

    def pages(self, sequence: Sequence, count: int) -> Int32s:
        """The first pages of a sequence: (count,)."""
        slot = sequence.slot
        if self._lists[slot] is not sequence.pages or self._held[slot] != len(sequence.pages):
            self._refresh(sequence)
        return self._rows[slot][:count]

    def drawing(self, slots: Int64s) -> tuple[sampler.Float64s, npt.NDArray[np.uint64]]:
        """Knobs and seeds of sequences that ``pages`` was asked for, as ``draws_of`` takes them."""
        return self._knobs[:, slots], self._seeds[slots]

    def _refresh(self, sequence: Sequence) -> None:
        slot, pages = sequence.slot, sequence.pages
        if self._lists[slot] is not pages:
            self._lists[slot] = pages
            self._knobs[:, slot] = sampler.knobs_of(sequence.params)
            self._seeds[slot] = sequence.params.seed
            self._held[slot] = 0
        if len(pages) > len(self._rows[slot]):
            grown = np.zeros(2 * len(pages), dtype=np.int32)
            grown[: self._held[slot]] = self._rows[slot][: self._held[slot]]
            self._rows[slot] = grown
        held = self._held[slot]
        self._rows[slot][held : len(pages)] = pages[held:]
        self._held[slot] = len(pages)
