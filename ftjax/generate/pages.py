"""Hand out the pages of a cache, and find the texts that are in them already."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass
class _Held:
    """A page whose contents are known: `serial` is never used again, so that no later page is taken for this one."""

    key: Hashable
    serial: int


class PagePool:
    """The pages of one group of rows (`ftjax.models.nn.paged`). Page 0 is not handed out.

    A page that is full can be published: a later text with the same tokens up to its end takes the page too. It stays after
    the last row that uses it has ended, until its place is needed; the one that was used longest ago goes first.

    Attributes:
        size: tokens of a page.
        total: number of pages.
    """

    def __init__(self, total: int, size: int):
        self.total, self.size = total, size
        self._free = list(range(total, 0, -1))
        self._users = [0] * (total + 1)
        self._held: dict[int, _Held] = {}
        self._known: dict[Hashable, int] = {}  # (space, serial of the page before, tokens) -> page
        self._idle: OrderedDict[int, None] = OrderedDict()  # published pages without users, oldest use first
        self._serial = 0

    @property
    def available(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Number of pages that rows use."""
        return self.total - self.available

    @property
    def kept(self) -> int:
        """Number of pages that no row uses and that still hold a text."""
        return len(self._idle)

    def find(self, space: Hashable, tokens: Sequence[int]) -> list[int]:
        """Return the pages that hold the beginning of a text, in order.

        Args:
            space: what the contents depend on besides the tokens, such as the adapter.
        """
        found, serial = [], 0
        for at in range(0, len(tokens) - self.size + 1, self.size):
            page = self._known.get((space, serial, tuple(tokens[at : at + self.size])))
            if page is None:
                break
            found.append(page)
            serial = self._held[page].serial
        return found

    def share(self, pages: Sequence[int]) -> None:
        """Add a user to pages that `find` has returned."""
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)

    def take(self, count: int) -> list[int] | None:
        """Return so many pages for new contents, or None if there are too few."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._users[page] = 1
            taken.append(page)
        return taken

    def publish(self, space: Hashable, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Let later texts find the pages that these tokens fill; `pages` hold the whole text, in order."""
        serial = 0
        for number, page in enumerate(pages[: len(tokens) // self.size]):
            key = (space, serial, tuple(tokens[number * self.size : (number + 1) * self.size]))
            other = self._known.get(key)
            if other is None and page not in self._held:
                self._serial += 1
                self._known[key], self._held[page] = page, _Held(key, self._serial)
                other = page
            if other is None:  # the page is published under another beginning, which has been evicted since
                return
            serial = self._held[other].serial

    def give_back(self, pages: Sequence[int]) -> None:
        """Remove a user of each page. The last pages of a text are the first to be evicted."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._held:
                self._idle[page] = None
            else:
                self._free.append(page)

    def unpublished(self, pages: Sequence[int]) -> list[int]:
        """Return those of a row's pages that only this row can have."""
        return [page for page in pages if page not in self._held]

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._known[self._held.pop(page).key]
        return page
