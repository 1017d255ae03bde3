"""Rows shared out among threads of our own, each of which computes with one thread of torch.

The threads of torch spin for some milliseconds after each of its operations, and take the cores from whoever comes
next. So a product and the pursuit that follows it are done by the same thread, one for each core.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_computed = False
ROWS_EACH = 32
"""Fewer rows are done before another thread has woken up."""


def in_threads(solve: Callable[[slice], T], x: Tensor, split: bool = True) -> list[T]:
    """What `solve` gives for each part of the rows of `x`, in order; on a CPU as many threads as torch has here.

    Without `split` the rows stay together, for what torch's own threads do better.
    """
    global _computed
    rows, _computed = len(x), True
    workers = min(torch.get_num_threads(), rows // ROWS_EACH) if split and x.device.type == "cpu" else 1
    if workers <= 1:
        return [solve(slice(0, rows))]
    bounds = [rows * i // workers for i in range(workers + 1)]
    return list(_pool(torch.get_num_threads()).map(solve, map(slice, bounds[:-1], bounds[1:])))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    pool, ready = ThreadPoolExecutor(workers, "pursuit"), Barrier(workers)

    def start(_: int) -> None:
        torch.get_num_threads()  # a thread takes the global number when it first asks, and its own only after that
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        ready.wait()

    list(pool.map(start, range(workers)))
    torch.set_num_threads(workers)  # the number that threads made later start with
    return pool


def _after_fork() -> None:
    """Threads do not survive a fork, those of torch neither: a child that asked them to work would wait forever."""
    _pool.cache_clear()
    if _computed:
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)
