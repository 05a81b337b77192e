"""Who may generate: one visitor after the other."""

import asyncio
import threading
from collections.abc import AsyncIterator

INTERVAL = 0.1  # seconds between two looks at the line


class Place:
    """A visitor's place in the line. `stop` is set when it is given up."""

    def __init__(self, visitor: str | None):
        self.visitor = visitor
        self.stop = threading.Event()


class Line:
    """Visitors in the order in which they came; whose place is first has its turn, until it is left.

    A visitor is in it once: a new place gives up the one before, which leaves as soon as it can. Places are taken and
    left within one event loop.
    """

    def __init__(self) -> None:
        self._places: list[Place] = []

    def __contains__(self, visitor: str | None) -> bool:
        return any(place.visitor == visitor for place in self._places)

    def enter(self, visitor: str | None) -> Place:
        """Takes a place at the end."""
        self.stop(visitor)
        self._places.append(Place(visitor))
        return self._places[-1]

    def leave(self, place: Place) -> None:
        self._places.remove(place)

    def stop(self, visitor: str | None) -> None:
        """Gives up the place of a visitor; nothing where there is none."""
        for place in list(self._places):
            if place.visitor == visitor:
                place.stop.set()

    def is_latest(self, place: Place) -> bool:
        """Whether the visitor has taken no other place since."""
        later = self._places[self._places.index(place) + 1 :]
        return all(other.visitor != place.visitor for other in later)

    async def wait(self, place: Place) -> AsyncIterator[int]:
        """Yields how many other visitors are before the place, whenever that changes, until it has its turn or is
        given up."""
        known = 0
        while self._places[0] is not place and not place.stop.is_set():
            before = self._places[: self._places.index(place)]
            others = len({other.visitor for other in before} - {place.visitor})
            if others != known:
                known = others
                yield others
            await asyncio.sleep(INTERVAL)
