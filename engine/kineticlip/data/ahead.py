"""Results of threads that work ahead, in order, a bounded number of them waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def run_ahead(
    tasks: Iterable[Callable[[], T]], *, workers: int, ahead: int
) -> Generator[T, None, None]:
    """Runs tasks in threads and gives their results in order, at most `ahead` of them early.

    An exception of a task comes out where its result would. Closing the iterator, or leaving a
    loop over it, drops what has not begun and waits for what has.
    """
    queue = iter(tasks)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="kineticlip-loader")
    try:
        pending: deque[Future[T]] = deque(pool.submit(task) for task in islice(queue, ahead))
        while pending:
            result = pending.popleft().result()
            for task in islice(queue, 1):
                pending.append(pool.submit(task))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
