"""Captures a graph for each of some sizes, and says how far it is and what it took."""

import logging
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

PROGRESS_S = 2.0
"""seconds between words about a capture that takes long"""
Graph = TypeVar("Graph")


def replay_first(graphs: Iterable[torch.cuda.CUDAGraph]) -> None:
    """Replay new graphs one after another, to have the device take them.

    The first replay of a graph uploads it, and so takes milliseconds longer than all that follow,
    which a step that answers wait for should not.
    """
    for graph in graphs:
        graph.replay()


def capture_each(
    sizes: list[int], what: str, capture: Callable[[int], Graph]
) -> tuple[dict[int, Graph], dict[int, int]]:
    """The graph of each size; and bytes of the device that each took beyond the larger ones.

    Args:
        sizes: rising.
        what: they are, for the log.
        capture: makes the graph of a size.
    """
    graphs: dict[int, Graph] = {}
    nbytes: dict[int, int] = {}
    begin = told = time.perf_counter()
    with torch.inference_mode():
        # The largest first: the smaller ones then fit the memory that it has taken.
        for done, size in enumerate(reversed(sizes)):
            if time.perf_counter() - told > PROGRESS_S:
                told = time.perf_counter()
                log.info("capturing %s: %d of %d", what, done, len(sizes))
            torch.cuda.empty_cache()  # before and after: what is only kept is nobody's
            free = torch.cuda.mem_get_info()[0]
            graphs[size] = capture(size)
            torch.cuda.empty_cache()
            nbytes[size] = free - torch.cuda.mem_get_info()[0]
    log.info(
        "captured %s of %s in %.1f s, %.0f MB",
        what,
        ", ".join(map(str, sizes)),
        time.perf_counter() - begin,
        sum(nbytes.values()) / 1e6,
    )
    return graphs, nbytes
