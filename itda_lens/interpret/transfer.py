"""A dictionary of one model, made again in another: latent i is the same prompt in both."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from itda_lens.interpret.placing import DEGENERATE, Placed, place
from itda_lens.interpret.prompts import run_prompts
from itda_lens.metadata import prepends_bos
from itda_lens.sae import ITDA, NonnegativeView
from itda_lens.streams import HookedModel, canonical_hooks
from itda_lens.streams.hooks import hook_widths
from itda_lens.streams.models import model_metadata

_ROUNDING = 1e-5
"""A centred activation shorter than this share of what it is the difference of is rounding."""


def transfer(itda: ITDA, model: HookedModel, hook: str, *, head_index: int | None = None, batch_size: int = 32) -> ITDA:
    """Make a dictionary again in another model, layer or checkpoint, from its provenance alone.

    The prompts of its atoms are run in the other model; each gives an atom `(x - b) / |x - b|`, where `b` is the mean
    over all tokens of these prompts' rows (0 where the dictionary was built without centring). So latent i means
    the same prompt in both, and codes compare latent by latent, though widths may differ.

    With the same tokenizer, token sequences are run as they were. With another, an atom is carried where a token of
    the other model ends where the atom's text ends (see `place`). The metadata's `itda_transfer` says where the
    dictionary came from and which atoms were not carried: for want of a `border`, since the `context` of the model is
    too short, or since they are `degenerate`, equal to the mean. `source_atoms` is the mapping.

    Args:
        itda: a dictionary with tokens or text in its provenance.
        model: the other model, or the same.
        hook: where in it.
        head_index: take this attention head alone.
        batch_size: rows in a forward pass.

    Raises:
        ValueError: the dictionary has no provenance, the hook is not in the model, or no atom could be carried.

    Example:
        >>> from itda_lens import BuildConfig, build, embedded
        >>> hook = "blocks.2.hook_resid_post"
        >>> config = BuildConfig(k=8, n_atoms=100, tokens=2000, progress=False)
        >>> itda = build(embedded.model(0), embedded.dataset(), hook, config)[hook]
        >>> other = transfer(itda, embedded.model(1), hook)
        >>> other.provenance.text(7) == itda.provenance.text(7)
        True
    """
    return transfer_all(itda, model, [hook], head_index=head_index, batch_size=batch_size)[hook]


@torch.no_grad()
def transfer_all(
    itda: ITDA, model: HookedModel, hooks: Sequence[str], *, head_index: int | None = None, batch_size: int = 32
) -> dict[str, ITDA]:
    """`transfer` to several hooks of a model in one pass: the dictionary at each, by name."""
    _check(itda)
    names = canonical_hooks(model, hooks)
    hook_widths(model, names, head_index)
    metadata: Any = itda.cfg.metadata
    assert itda.provenance is not None
    placed = place(itda.provenance, model, prepend_bos=prepends_bos(metadata))
    n = len(placed.source)
    atoms: dict[str, Tensor] = {}
    totals: dict[str, Any] = defaultdict(int)
    n_tokens: dict[str, int] = defaultdict(int)
    for batch in run_prompts(
        model,
        placed.provenance,
        names,
        head_index=head_index,
        batch_size=batch_size,
        exclude_special_tokens=metadata.exclude_special_tokens is not False,
    ):
        for hook, x in batch.activations.items():
            totals[hook] += batch.total[hook]
            n_tokens[hook] += batch.n_tokens[hook]
            atoms.setdefault(hook, x.new_empty(n, x.shape[1]))[batch.which.to(x.device)] = x
    centred = itda.cfg.apply_b_dec_to_input and bool((itda.b_dec != 0).any())
    carried = {}
    for hook, x in atoms.items():
        bias = (totals[hook] / max(n_tokens[hook], 1) * centred).float()
        carried[hook] = _dictionary(itda, x, bias, placed, model, names[hook], head_index)
    return carried


def source_atoms(itda: ITDA) -> Int64[Tensor, " n"]:
    """For each atom of a transferred dictionary, which atom of the one it was carried from it is.

    Raises:
        ValueError: this dictionary does not come from `transfer`, or atoms were added since.

    Example:
        >>> metadata = {"itda_transfer": {"atoms": 4, "dropped": {"border": [1], "context": [], "degenerate": []}}}
        >>> source_atoms(ITDA.from_atoms(torch.eye(3), k=1, metadata=metadata)).tolist()
        [0, 2, 3]
    """
    record: Any = itda.cfg.metadata.itda_transfer
    if record is None:
        raise ValueError("the metadata of this dictionary lacks itda_transfer: it does not come from transfer()")
    gone = {atom for atoms in record["dropped"].values() for atom in atoms}
    kept = [atom for atom in range(record["atoms"]) if atom not in gone]
    if len(kept) < itda.cfg.d_sae:
        raise ValueError(f"{len(kept)} atoms were carried, but this dictionary has {itda.cfg.d_sae}: atoms were added")
    return torch.tensor(kept[: itda.cfg.d_sae])  # a crop keeps the first ones


def _dictionary(
    itda: ITDA,
    x: Float[Tensor, "m d"],
    bias: Float[Tensor, " d"],
    placed: Placed,
    model: HookedModel,
    hook: str,
    head_index: int | None,
) -> ITDA:
    rows = x - bias
    lengths = rows.norm(dim=-1)
    usable = (lengths > _ROUNDING * torch.maximum(x.norm(dim=-1), bias.norm())).cpu()
    keep = usable.nonzero().flatten()
    if len(keep) == 0:
        raise ValueError(
            f"all {len(x)} activations at {hook} of {model.cfg.model_name} equal their mean: none points anywhere"
        )
    k = min(itda.cfg.k, len(keep))
    if k < itda.cfg.k:
        warnings.warn(
            f"only {len(keep)} atoms of this itda could be carried, fewer than k={itda.cfg.k}, so it has k={k}",
            stacklevel=4,
        )
    own = {f.name: getattr(itda.cfg, f.name) for f in fields(itda.cfg)}
    for name in ("d_in", "d_sae", "k", "metadata", "reshape_activations", "device", "dtype"):
        del own[name]
    kept = keep.to(x.device)
    return ITDA.from_atoms(
        (rows[kept] / lengths[kept, None]).to(itda.dtype),
        k,
        bias=bias,
        provenance=placed.provenance.select(keep),
        metadata=_metadata(itda, placed, usable, model, hook, head_index),
        **own,
    )


def _metadata(
    itda: ITDA, placed: Placed, usable: Bool[Tensor, " m"], model: HookedModel, hook: str, head_index: int | None
) -> SAEMetadata:
    source = copy.deepcopy(itda.cfg.metadata.to_dict())
    context: int | None = source.get("context_size")
    record = {
        "atoms": itda.cfg.d_sae,
        "model_name": source.get("model_name"),
        "hook_name": source.get("hook_name"),
        "dropped": {**placed.dropped, DEGENERATE: placed.source[~usable].tolist()},
    }
    build: dict[str, Any] = source.get("itda_build") or {}
    sinks = int((placed.source[usable] < build.get("sinks", 0)).sum())
    own = {
        **model_metadata(model),
        "hook_name": hook,
        "hook_head_index": head_index,
        "context_size": None if context is None else min(context, model.cfg.n_ctx),
        "itda_transfer": record,
        # Which tokens are massive in this model, and what norm is usual, nobody has looked at.
        "itda_build": {**build, "sinks": sinks, "typical_norm": None},
    }
    return SAEMetadata(**source | own)


def _check(itda: ITDA) -> None:
    if itda.provenance is None:
        raise ValueError("this dictionary has no provenance, so its atoms can't be found again: build it with tokens")
    if isinstance(itda, NonnegativeView):
        raise ValueError("this is a non-negative view: transfer the ITDA itself, and take the view of the result")
    if itda.cfg.normalize_activations != "none":
        raise ValueError(
            f"this ITDA normalises its input ({itda.cfg.normalize_activations!r}), and transfer takes activations as "
            "they are: transfer one that was built on raw activations"
        )
