"""Rows shared out among threads of our own, each of which computes with one thread of torch.

Product and pursuit of a row then follow each other on one core. Were torch to spread each product over its own
threads, these would spin for a while after it, and take the cores from the pursuit.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch

from itda_lens.pursuit.codes import SparseCodes


def in_threads(solve: Callable[[slice], SparseCodes], rows: int) -> SparseCodes:
    """The codes that `solve` gives for parts of the rows, put together; as many threads as torch has here."""
    workers = min(torch.get_num_threads(), rows)
    if workers <= 1:
        return solve(slice(0, rows))
    bounds = [rows * i // workers for i in range(workers + 1)]
    parts = _pool(torch.get_num_threads()).map(solve, map(slice, bounds[:-1], bounds[1:]))
    return SparseCodes(*map(torch.cat, zip(*parts, strict=True)))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    pool, ready = ThreadPoolExecutor(workers, "pursuit"), Barrier(workers)

    def start(_: int) -> None:
        torch.get_num_threads()  # a thread takes the global number when it first asks, and its own only after that
        torch.set_num_threads(1)
        ready.wait()

    list(pool.map(start, range(workers)))
    torch.set_num_threads(workers)  # the number that threads made later start with
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
