"""Work ahead on threads: results in order, and no more of them in memory than asked for."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def in_order(function: Callable[[A], B], items: Iterable[A], workers: int, ahead: int) -> Iterator[B]:
    """`map` on `workers` threads (0: in the caller), results in order, at most `ahead` of them computed in advance.

    When the caller stops early, or a call raises, what has not begun is not begun any more.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="in_order")
    try:
        waiting, remaining = deque(), iter(items)
        waiting.extend(pool.submit(function, item) for item in islice(remaining, ahead))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
    finally:
        pool.shutdown(cancel_futures=True)
