"""The hot loop for a CPU: the compiled kernel, its rows shared out among threads."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.kernel import pursue_rows


@torch.no_grad()
def pursue_fused(
    correlations: Float[Tensor, "b n"],
    gram: Float[Tensor, "n capacity"],
    k: int,
    *,
    nonnegative: bool = False,
    energy: Float[Tensor, " b"] | None = None,
    tolerance: float = 0.0,
) -> SparseCodes:
    """What `pursue` computes with a stored Gram matrix, on a CPU. Overwrites `correlations`."""
    b, _ = correlations.shape
    values = correlations.new_zeros(b, k)
    indices = torch.zeros(b, k, dtype=torch.int64)
    # The compiled loop assumes finite numbers: a row with others is emptied, and comes out as NaN.
    broken = correlations.sum(dim=-1).isfinite().logical_not()
    if broken.any():
        correlations[broken] = 0
    left = torch.full((b,), torch.inf, dtype=torch.float64) if energy is None else energy.to(torch.float64, copy=True)
    floor = tolerance**2 * left if tolerance > 0 else torch.full_like(left, -torch.inf)
    arrays = tuple(t.numpy() for t in (correlations, gram, values, indices, left, floor))  # views, not copies
    workers = max(1, min(torch.get_num_threads(), b))
    bounds = [b * i // workers for i in range(workers + 1)]
    jobs = [
        _threads(workers).submit(pursue_rows, *arrays, nonnegative, start, stop) for start, stop in pairwise(bounds[1:])
    ]
    pursue_rows(*arrays, nonnegative, bounds[0], bounds[1])
    for job in jobs:
        job.result()
    values[broken, 0] = torch.nan
    return SparseCodes(values, indices)


@cache
def _threads(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="pursuit")


os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork
