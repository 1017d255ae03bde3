"""Whether two models are one and the same: by their logits, on tokens that show what tells them apart."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

SHORT = 32
"""Tokens in the rows that every layer is compared on."""
LONGEST = 4224
"""Tokens in the longest row that is worth a comparison: common windows have 4,096."""
_PAST = 16


class Probe(NamedTuple):
    """What two models are run on."""

    tokens: Int64[Tensor, "b s"]
    layers: int | None
    """Run so many layers alone; all if None. Long rows are dear."""


def tolerance(dtype: torch.dtype) -> float:
    """How far the logits of one model may lie apart in two implementations, as a share of their spread.

    Example:
        >>> tolerance(torch.float32)
        5e-05
    """
    return {torch.float64: 5e-5, torch.float32: 5e-5, torch.float16: 0.05}.get(dtype, 0.15)


def difference(logits: Float[Tensor, "*b v"], expected: Float[Tensor, "*b v"]) -> float:
    """The root mean square difference of logits as a share of their standard deviation, averaged over tokens.

    Not finite where one of them is not.

    Example:
        >>> round(difference(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.9, -1.1]])), 3)
        0.1
    """
    if logits.shape != expected.shape:
        return torch.inf
    logits, expected = logits.double(), expected.double()
    spread = expected.std(dim=-1, correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    return ((logits - expected).square().mean(dim=-1).sqrt() / spread).mean().item()


def border(config: Any, n_ctx: int | None) -> int:
    """The last position from which on this Hugging Face configuration treats positions in another way, or 0.

    Sliding windows begin there, or another rotary embedding.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    found = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")]
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        found.append(rope.get("original_max_position_embeddings"))
    return max((b for b in found if isinstance(b, int) and (n_ctx is None or b < n_ctx)), default=0)


def probes(
    config: Any, n_ctx: int | None, bos: int | None = None, special: Iterable[int] = (), seed: int = 0
) -> list[Probe]:
    """Rows of random ordinary tokens for a model with this Hugging Face configuration.

    The short ones differ in their second half alone. A long one goes past the `border`, where that is not too far,
    through the layers up to the first of each type.

    Args:
        config: of the model, or of its text part.
        n_ctx: how many positions it has.
        bos: the token that rows begin with.
        special: tokens that are not ordinary.
        seed: of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.tensor(sorted(set(range(config.vocab_size)).difference(special)) or [0])

    def row(n: int) -> Int64[Tensor, " n"]:
        tokens = ordinary[torch.randint(len(ordinary), (n,), generator=generator)]
        if bos is not None and bos < config.vocab_size:
            tokens[0] = bos
        return tokens

    length = min(SHORT, n_ctx or SHORT)
    short = torch.stack([row(length), row(length)])
    short[1, : length // 2] = short[0, : length // 2]
    far = min(border(config, n_ctx) + _PAST, n_ctx or LONGEST)
    if not length < far <= LONGEST:
        return [Probe(short, None)]
    return [Probe(short, None), Probe(row(far)[None], _one_of_each(config))]


def run(model: nn.Module, head: nn.Module | None, n_layers: int, probe: Probe) -> Float[Tensor, "b s v"]:
    """The logits of a model; of its last tokens alone where it runs some layers alone.

    Args:
        model: of Hugging Face or of TransformerLens.
        head: its module that makes logits.
        n_layers: how many layers it has.
        probe: what to run.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if probe.layers is not None:
            stack.enter_context(_first_layers(model, n_layers, probe.layers))
            if head is not None:  # all logits of a long row need gigabytes
                stack.callback(head.register_forward_pre_hook(lambda _, args: (args[0][:, -_PAST:],)).remove)
        out = model(probe.tokens)
        logits: Tensor = getattr(out, "logits", out)
        return (logits if probe.layers is None else logits[:, -_PAST:]).float()


def _one_of_each(config: Any) -> int:
    types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    return max((types.index(kind) + 1 for kind in set(types)), default=1)


@contextlib.contextmanager
def _first_layers(model: nn.Module, n_layers: int, keep: int) -> Iterator[None]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers]
    layers = [list(module) for module in lists]
    for module in lists:
        del module[keep:]
    try:
        yield
    finally:
        for module, whole in zip(lists, layers, strict=True):
            module.extend(whole[keep:])
