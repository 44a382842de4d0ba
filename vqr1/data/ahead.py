"""Decode pictures ahead, in bounded memory: while one window is in use, the next is decoded."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

HELD = 2**30
"""Bytes that fill a window: four 12-megapixel pictures, 288 MB each as Qwen's processor makes them."""
THREADS = 4
"""Pictures decoded at a time."""

Opened = TypeVar("Opened")


def windows(
    items: Iterable, decode: Callable[..., Opened], size: Callable[[Opened], int], most: int
) -> Iterator[list[Opened]]:
    """Yield what `decode` makes of the items, in order, a window at a time.

    A window is `most` items, or as many as take `HELD` bytes. While it is in use, background threads decode
    the next. Memory holds two windows, one more item per thread, and what was handed over. The caller
    empties a window's list when it is done with it.

    Args:
        items: what to decode; it is read no further than two windows need.
        decode: called with one item, in a thread.
        size: bytes that a decoded item takes.
        most: items in a window.

    >>> list(windows("abcde", str.upper, len, most=2))
    [['A', 'B'], ['C', 'D'], ['E']]
    """
    items, room, queue = enumerate(items), _Room(2 * HELD), deque()

    def decode_in_turn(place: int, item) -> Opened | None:
        if not room.enter(place):
            return None  # nobody waits for it any more
        opened = decode(item)
        room.take(size(opened))
        return opened

    with ThreadPoolExecutor(THREADS, "decode") as pool:

        def ask() -> None:
            queue.extend(pool.submit(decode_in_turn, *item) for item in islice(items, most - len(queue)))

        try:
            ask()
            while queue:
                window, held = [], 0
                while queue and len(window) < most and held < HELD:
                    window.append(queue.popleft().result())
                    held += size(window[-1])
                ask()
                yield window
                room.leave(held)
        finally:
            room.close()
            pool.shutdown(cancel_futures=True)


class _Room:
    """Let threads decode, in the order of the items, while fewer than `limit` bytes are held.

    The order keeps later items from taking the room of the one waited for.
    """

    def __init__(self, limit: int):
        self.limit, self.held, self.turn, self.open, self.changed = limit, 0, 0, True, threading.Condition()

    def enter(self, place: int) -> bool:
        """Wait for this place's turn and for room; return False once decoding has ended."""
        with self.changed:
            self.changed.wait_for(lambda: not self.open or (self.turn == place and self.held < self.limit))
            self.turn += 1
            self.changed.notify_all()
            return self.open

    def take(self, size: int) -> None:
        with self.changed:
            self.held += size

    def leave(self, size: int) -> None:
        with self.changed:
            self.held -= size
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.open = False
            self.changed.notify_all()
