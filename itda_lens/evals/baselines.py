"""What a dictionary must beat: atoms taken at random."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from itda_lens.metadata import prepends_bos
from itda_lens.sae import ITDA, NonnegativeView
from itda_lens.streams import HookedModel, activation_batches, canonical_hooks, check_model, load_text
from itda_lens.streams.datasets import AnyDataset
from itda_lens.streams.massive import is_massive


def random_directions(itda: ITDA, *, seed: int = 0) -> ITDA:
    """An ITDA of as many random unit vectors, with the same bias, L0 and other settings.

    Atoms that stand for attention sinks (the first ones, as many as the metadata says) stay.

    Raises:
        ValueError: it is a non-negative view.

    Example:
        >>> random_directions(ITDA.from_atoms(torch.eye(3), k=2)).atoms.shape
        torch.Size([3, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    return _with_others(
        itda, torch.randn(itda.cfg.d_sae - _sinks(itda), itda.cfg.d_in, dtype=torch.float32, generator=generator)
    )


@overload
def random_activations(
    itda: ITDA, model: HookedModel, dataset: AnyDataset | str | Path, *, seed: int = 0, batch_size: int = 32
) -> ITDA: ...
@overload
def random_activations(
    itda: ITDA, model: HookedModel, dataset: AnyDataset | str | Path, *, seed: Sequence[int], batch_size: int = 32
) -> list[ITDA]: ...
@overload
def random_activations(
    itda: Mapping[str, ITDA],
    model: HookedModel,
    dataset: AnyDataset | str | Path,
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, ITDA]: ...
@overload
def random_activations(
    itda: Mapping[str, ITDA],
    model: HookedModel,
    dataset: AnyDataset | str | Path,
    *,
    seed: Sequence[int],
    batch_size: int = 32,
) -> dict[str, list[ITDA]]: ...
def random_activations(
    itda: ITDA | Mapping[str, ITDA],
    model: HookedModel,
    dataset: AnyDataset | str | Path,
    *,
    seed: int | Sequence[int] = 0,
    batch_size: int = 32,
) -> ITDA | list[ITDA] | dict[str, ITDA] | dict[str, list[ITDA]]:
    """An ITDA of as many activations drawn at random from the stream that `itda` was built on, all else the same.

    Atoms that stand for attention sinks (the first ones, as many as the metadata says) stay.

    Args:
        itda: built by `build`, whose metadata says how the stream was cut; or several by name, such as `build`'s
            result, which are then drawn in one pass over the stream.
        model: the model that it was built on.
        dataset: the dataset that it was built on.
        seed: which tokens are drawn; several give a list, from one pass.
        batch_size: rows in a forward pass.

    Raises:
        ValueError: the metadata does not say how the stream was cut or names another model, several were built on
            streams that are cut differently, or the stream is too short.

    Example:
        >>> from itda_lens import BuildConfig, build, embedded
        >>> model, hook = embedded.model(), "blocks.2.hook_resid_post"
        >>> itdas = build(model, embedded.dataset(), hook, BuildConfig(k=8, n_atoms=50, tokens=1000, progress=False))
        >>> [a, b] = random_activations(itdas, model, embedded.dataset(), seed=range(2))[hook]
        >>> a.atoms.shape == b.atoms.shape == itdas[hook].atoms.shape
        True
    """
    itdas = itda if isinstance(itda, Mapping) else {"this dictionary": itda}
    seeds = [seed] if isinstance(seed, int) else list(seed)
    if not itdas or not seeds:
        raise ValueError(f"there are {len(itdas)} dictionaries and {len(seeds)} seeds: give at least one of each")
    cut = {name: _cut(name, one, model) for name, one in itdas.items()}
    first, settings = next(iter(cut.items()))
    for name, other in cut.items():
        if other != settings:
            raise ValueError(f"{first} was built on rows of {settings}, and {name} on rows of {other}: draw one by one")
    draws = {name: [_Draw(name, one, s) for s in seeds] for name, one in itdas.items()}
    _fill(
        [draw for of_one in draws.values() for draw in of_one], model, dataset, {**settings, "batch_size": batch_size}
    )
    found = {name: [draw.itda() for draw in of_one] for name, of_one in draws.items()}
    if isinstance(itda, Mapping):
        return {name: of_one[0] for name, of_one in found.items()} if isinstance(seed, int) else found
    [of_one] = found.values()
    return of_one[0] if isinstance(seed, int) else of_one


class _Draw:
    """One baseline in the making."""

    def __init__(self, name: str, itda: ITDA, seed: int):
        metadata = cast(Any, itda.cfg.metadata)
        self._like, self.hook, judged = itda, cast(str, metadata.hook_name), metadata.itda_build["tokens_judged"]
        n = itda.cfg.d_sae - _sinks(itda)
        if n > judged:
            raise ValueError(f"{name} has {n:,} atoms, but only {judged:,} tokens were judged when it was built")
        drawn = torch.randperm(judged, generator=torch.Generator().manual_seed(seed))[:n]
        self._drawn, self._parts = drawn.sort().values, cast(list[Tensor], [])
        self._typical_norm = metadata.itda_build.get("typical_norm") or torch.inf
        self.end, self.seen = int(self._drawn[-1]) + 1 if n else 0, 0

    def take(self, x: Float[Tensor, "t d"]) -> None:
        """What is drawn of the next tokens. Massive ones were not judged, and are passed over."""
        x = x[~is_massive((x.float() - self._like.b_dec.to(x.device)).norm(dim=-1), self._typical_norm)]
        inside = self._drawn[(self._drawn >= self.seen) & (self._drawn < self.seen + len(x))] - self.seen
        self._parts.append(x[inside.to(x.device)].float())
        self.seen += len(x)

    @torch.no_grad()
    def itda(self) -> ITDA:
        """The baseline: what `encode` would pursue, made an atom."""
        like = self._like
        x = like.run_time_activation_norm_fn_in(torch.cat(self._parts).to(like.device))
        return _with_others(like, x - like.b_dec * like.cfg.apply_b_dec_to_input)


def _fill(
    draws: Sequence[_Draw], model: HookedModel, dataset: AnyDataset | str | Path, settings: Mapping[str, Any]
) -> None:
    others = dict(settings)
    data = load_text(dataset, column=others.pop("column"))
    hooks = canonical_hooks(model, list(dict.fromkeys(draw.hook for draw in draws)))
    for batch in activation_batches(model, data, hooks, **others):
        mask = batch.mask.to(model.cfg.device)
        at_hooks = {hook: x[mask] for hook, x in batch.activations.items()}
        for draw in draws:
            draw.take(at_hooks[draw.hook])
        if all(draw.seen >= draw.end for draw in draws):
            return
    short = next(draw for draw in draws if draw.seen < draw.end)
    raise ValueError(
        f"the stream has {short.seen:,} tokens, and the token number {short.end:,} of what was read at building was "
        "drawn: give the dataset that it was built on"
    )


def _cut(name: str, itda: ITDA, model: HookedModel) -> dict[str, Any]:
    """How the stream that a dictionary was built on was cut."""
    metadata = cast(Any, itda.cfg.metadata)
    if metadata.itda_build is None or metadata.hook_name is None or metadata.context_size is None:
        raise ValueError(f"{name} was not made by build(), so its metadata does not say how the stream was cut")
    check_model(metadata, model, name)
    return {
        "column": metadata.dataset_column,
        "context_size": metadata.context_size,
        "prepend_bos": prepends_bos(metadata),
        "pack": metadata.pack is not False,
        "exclude_special_tokens": metadata.exclude_special_tokens is not False,
        "head_index": metadata.hook_head_index,
        "seqpos_slice": tuple(metadata.seqpos_slice or (None,)),
    }


def _sinks(itda: ITDA) -> int:
    record: dict[str, Any] = cast(Any, itda.cfg.metadata).itda_build or {}
    return min(record.get("sinks", 0), itda.cfg.d_sae)


@torch.no_grad()
def _with_others(itda: ITDA, rows: Float[Tensor, "m d"]) -> ITDA:
    """The dictionary with these rows in place of all atoms but the sinks'."""
    if isinstance(itda, NonnegativeView):
        raise ValueError("this is a non-negative view: take a baseline of the ITDA itself, and the view of that")
    others = normalize(rows.to(itda.device, torch.float32), dim=-1)
    return itda.with_atoms(torch.cat([itda.atoms[: _sinks(itda)].float(), others]))
