"""Rows with NaN or infinite numbers: kept out of every loop, and marked with NaN in what comes out, in one way."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes


def marks_broken_rows(pursue: Callable[..., SparseCodes]) -> Callable[..., SparseCodes]:
    """A pursuit from correlations, of which broken rows come out as NaN in the first slot and zeros in the others."""

    @wraps(pursue)
    def marking(correlations: Tensor, *arguments: Any, **settings: Any) -> SparseCodes:
        energy = settings.get("energy")
        broken = (correlations.sum(dim=-1) if energy is None else energy).isfinite().logical_not()
        if correlations.device.type == "cuda" or broken.any():  # asking a GPU would wait for it
            correlations = correlations.masked_fill(broken[:, None], 0)
            if energy is not None:
                settings["energy"] = energy.masked_fill(broken, 0)
        values, indices = pursue(correlations, *arguments, **settings)
        values[:, 0].masked_fill_(broken, torch.nan)
        return SparseCodes(values, indices)

    return marking
