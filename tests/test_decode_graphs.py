"""The numbers of sequences and tokens that graphs are captured for."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fi_runtime.engine.decode_graphs import padded_sizes
from fi_runtime.engine.piece_graphs import padded_token_counts


@given(st.integers(1, 4096))
def test_padded_sizes_cover_every_batch_without_much_padding(most: int) -> None:
    sizes = padded_sizes(most)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)
    for smaller, larger in itertools.pairwise(sizes):
        assert larger - smaller <= max(smaller, 16)


@given(st.integers(1, 20_000))
def test_padded_token_counts_cover_every_step_without_much_padding(most: int) -> None:
    sizes = padded_token_counts(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for smaller, larger in itertools.pairwise(sizes):
        assert larger - smaller <= max(smaller, 8)
