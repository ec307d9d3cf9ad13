"""Pages: the unit in which cache memory is handed out."""

SPARE_PAGE = 0
"""Never handed out, so that padding has a page to write to that no sequence reads."""


class OutOfPages(Exception):
    """Fewer pages are free than were asked for. Nothing was taken."""


class PagePool:
    """Free pages of a cache of ``total`` pages, the spare page among them."""

    def __init__(self, total: int) -> None:
        if total < 2:
            raise ValueError(f"a pool of {total} pages has none to hand out; it needs at least 2")
        self.total = total
        self._free = list(range(total - 1, SPARE_PAGE, -1))
        self._taken = bytearray(total)

    @property
    def usable(self) -> int:
        """Pages that sequences can hold in all."""
        return self.total - 1

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take ``count`` pages, or none at all.

        Raises:
            OutOfPages: fewer are free.
        """
        if count > len(self._free):
            raise OutOfPages(f"{count} pages asked for, {len(self._free)} of {self.usable} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._taken[page] = 1
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Return pages that were taken.

        Raises:
            ValueError: a page that is not taken, which would be handed out twice.
        """
        for page in pages:
            if not self._taken[page]:
                raise ValueError(f"page {page} is given back but was not taken")
            self._taken[page] = 0
            self._free.append(page)
