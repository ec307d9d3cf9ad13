"""The numbers of sequences that decode graphs are captured for."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fi_runtime.engine.decode_graphs import padded_sizes


@given(st.integers(1, 4096))
def test_padded_sizes_cover_every_batch_without_much_padding(most: int) -> None:
    sizes = padded_sizes(most)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)
    for smaller, larger in itertools.pairwise(sizes):
        assert larger - smaller <= max(smaller, 16)
