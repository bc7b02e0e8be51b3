"""Pages of the key/value cache: allocation, sharing of common prefixes, least-recently-used eviction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

ROOT = 0  # the parent of every first page


@dataclass(slots=True)
class _Page:
    references: int = 0
    key: tuple[int, tuple[int, ...]] | None = None  # (parent, tokens) while it can be found by prefix


class PagePool:
    """Hands out pages and finds the ones that already hold a wanted prefix.

    A full page is known by its parent (the id of the page content before it, ``ROOT`` for the first) and its tokens, so
    equal ids mean equal prefixes: there are no hash collisions. Pages that nobody uses stay findable until they are
    needed. A sequence first promises itself the most pages it can ever need; taking one then cannot fail.
    """

    def __init__(self, num_pages: int, *, prefix_cache: bool) -> None:
        self._pages = [_Page() for _ in range(num_pages)]
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable, used by nobody; oldest first
        self._known: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # key -> (page, id of its content)
        self._promised = 0
        self._next_id = ROOT + 1
        self._prefix_cache = prefix_cache

    @property
    def num_pages(self) -> int:
        """Size of the pool."""
        return len(self._pages)

    @property
    def num_available(self) -> int:
        """Pages that could be promised now."""
        return len(self._free) + len(self._idle) - self._promised

    def promise(self, count: int) -> bool:
        """Set ``count`` pages aside; False (and nothing changes) when so many are not available."""
        if count > self.num_available:
            return False
        self._promised += count
        return True

    def withdraw(self, count: int) -> None:
        """Give back ``count`` promised pages that will not be needed."""
        assert count <= self._promised
        self._promised -= count

    def take(self) -> int:
        """Turn one promised page into an allocated one, forgetting the longest unused prefix where necessary."""
        self.withdraw(1)
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._pages[page].references = 1
        return page

    def find(self, parent: int, tokens: tuple[int, ...]) -> tuple[int, int] | None:
        """Share the page that holds ``tokens`` after ``parent``, in place of a promised one; (page, id) or None."""
        found = self._known.get((parent, tokens))
        if found is None:
            return None
        page = self._pages[found[0]]
        if page.references == 0:
            del self._idle[found[0]]
        page.references += 1
        self.withdraw(1)
        return found

    def register(self, parent: int, tokens: tuple[int, ...], page: int) -> int:
        """Make a full page findable; returns the id of its content (an equal page's where one is known already)."""
        if not self._prefix_cache:
            return ROOT
        key = (parent, tokens)
        known = self._known.get(key)
        if known is not None:
            return known[1]
        content, self._next_id = self._next_id, self._next_id + 1
        self._known[key] = (page, content)
        self._pages[page].key = key
        return content

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference of each page of a sequence, the last page first so that prefixes outlive their ends."""
        for index in reversed(pages):
            page = self._pages[index]
            page.references -= 1
            if page.references == 0:
                if page.key is None:
                    self._free.append(index)
                else:
                    self._idle[index] = None

    def forget_all(self) -> None:
        """No content can be found any more (the weights changed)."""
        for index in self._idle:
            self._free.append(index)
        self._idle.clear()
        self._known.clear()
        for page in self._pages:
            page.key = None

    def _forget(self, index: int) -> None:
        key = self._pages[index].key
        if key is not None:
            del self._known[key]
            self._pages[index].key = None
