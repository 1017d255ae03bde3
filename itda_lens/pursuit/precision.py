"""Pursuit is computed in full precision, whatever `torch.autocast` makes of products around it."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
_DEVICES = ("cpu", "cuda")


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, in which autocast is off."""

    @wraps(function)
    def run(*arguments: P.args, **settings: P.kwargs) -> T:
        on = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
        if not on:
            return function(*arguments, **settings)
        with ExitStack() as stack:
            for device in on:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*arguments, **settings)

    return run
