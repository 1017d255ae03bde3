"""What torch does to all code within a context: autocast, which pursuit leaves, and transformations."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
_DEVICES = ("cpu", "cuda")


def is_transformed() -> bool:
    """Whether code is traced or transformed just now."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, which `torch.compile` leaves as it is."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


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
