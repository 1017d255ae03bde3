"""What two models, one mostly made from the other, do differently, as a ranked table of prompts."""

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from itda_lens.interpret.chance import adjusted_p, empirical_z
from itda_lens.interpret.placing import place
from itda_lens.interpret.profiles import profile_shift
from itda_lens.interpret.prompts import probe
from itda_lens.interpret.sides import Side, atoms_of_one, common_atoms, latent_uses, marked
from itda_lens.metadata import prepends_bos
from itda_lens.provenance import Provenance, tokenizer_digest
from itda_lens.sae import ITDA
from itda_lens.streams import HookedModel, canonical_hooks, check_model
from itda_lens.streams.datasets import AnyDataset

_CONTEXT = 24
"""Tokens of context in the table of prompts."""


class Diff(NamedTuple):
    """Tables of what differs, each with what differs most first."""

    prompts: pd.DataFrame
    """The probe's documents, by `shift`."""
    tokens: pd.DataFrame
    """The tokens of the probe, by `shift`."""
    latents: pd.DataFrame
    """The atoms of the base's dictionary, by how much more the tuned model uses them."""
    atoms: pd.DataFrame
    """Prompts that are an atom in the native dictionary of one model only; empty without `native`."""


def diff(
    base: HookedModel,
    tuned: HookedModel,
    itda: ITDA,
    dataset: AnyDataset | str | Path,
    *,
    native: ITDA | None = None,
    second: ITDA | None = None,
    tokens: int = 20_000,
    context_size: int | None = None,
    column: str | None = None,
) -> Diff:
    """Compare two models on the documents of a probe, by means of a dictionary that is carried into both.

    **What ranks.** Latent i is the same prompt in both models, so each token of the probe has in each model a
    *profile*: how near it is to each of these prompts. `shift` is `1 - cosine` of its two profiles (see
    `profile_shift`): what stands to other text as before has 0, whatever became of the model's coordinates.
    That a reconstruction gets worse is a poorer sign, and stands in the table for comparison: a dictionary in real
    use spans most of the space, so that activations of a new kind are reconstructed about as well as others.

    **By chance.** Any further training shifts everything a little, so `z` says how far a document stands out from the
    bulk of the documents (`empirical_z`), and `q` is its Benjamini-Hochberg adjusted p-value (one-sided). Where more
    than half of the probe is of the new kind, that kind is the bulk, and does not stand out.

    Args:
        base: the model that `itda` belongs to.
        tuned: the other one.
        itda: a dictionary with provenance, best built on text like the probe's. Its hook must be in both models.
        dataset: the probe; each document is one prompt. It should not be what the dictionaries were built on.
        native: the tuned model's own dictionary at the same hook, for `gap` and for the table of atoms.
        second: another dictionary of the base, selected from the same stream in another order: with `native`, for the
            null of the gap.
        tokens: how many tokens of the probe are looked at, whole documents or parts.
        context_size: tokens of a document at most; as the dictionary was built if not given.
        column: the dataset's column with the text, when it is not called `text`.

    Returns:
        `prompts`, by falling shift: `row` in the dataset (the index), `n_tokens`, `shift`, `z`, `q`; the mean relative
        errors of reconstruction `base_error` and `tuned_error` under the one dictionary; and `text`, the
        end of which is the token that shifted most. With `native`, `gap` is by how much the native dictionary
        beats the base's in the tuned model, less the same in the base; with `second`, `gap_z` is that in
        units of the same quantity for `second` in place of `native`.

        `tokens`: the same for each token. `latents`: the share of tokens on which each atom of the base's dictionary
        is used, in both models, and McNemar's `z` of the difference. `atoms`: prompts that only one dictionary holds,
        with the error of its `model` there under the dictionary that lacks it, and by how much it is above the
        other model's (`need`).

    Raises:
        ValueError: a dictionary belongs to another model or hook, or has no provenance; or the probe is empty.

    Example:
        >>> from itda_lens import BuildConfig, build, embedded
        >>> base, hook = embedded.model(0), "blocks.4.hook_resid_post"
        >>> config = BuildConfig(k=8, n_atoms=100, tokens=2000, progress=False)
        >>> itda = build(base, embedded.dataset(), hook, config)[hook]
        >>> found = diff(base, embedded.model(1), itda, embedded.dataset("heldout"), tokens=500)
        >>> list(found.prompts.columns[:4])
        ['n_tokens', 'shift', 'z', 'q']
    """
    hook, prepend_bos = _check(base, tuned, itda, native, second)
    context = context_size or itda.cfg.metadata.context_size or 128
    if not 2 <= context <= base.cfg.n_ctx:
        raise ValueError(f"context_size must be between 2 and the base's {base.cfg.n_ctx} positions, got {context}")
    found = probe(
        base,
        dataset,
        tokens=tokens,
        context_size=context,
        prepend_bos=prepend_bos,
        column=column,
        text=tokenizer_digest(base.tokenizer) != tokenizer_digest(tuned.tokenizer),
    )
    there = place(found, tuned, prepend_bos=prepend_bos)
    here = found.select(there.source)
    sides = [
        Side.of(model, itda, hook, prompts, prepend_bos) for model, prompts in ((base, here), (tuned, there.provenance))
    ]
    _, columns = common_atoms(sides)
    profiled = [side.profiled(atoms) for side, atoms in zip(sides, columns, strict=True)]
    table = pd.DataFrame({"row": here.row.numpy(), "position": here.position.numpy()})
    table["shift"] = profile_shift(profiled[0], profiled[1]).numpy()
    table["base_error"], table["tuned_error"] = (side.error(side.carried).numpy() for side in sides)
    for name, dictionary in (("gap", native), ("null", second)):
        if dictionary is not None:
            gain = [side.error(side.carried) - side.error(side.carry(dictionary)) for side in sides]
            table[name] = (gain[1] - gain[0]).numpy()
    return Diff(
        prompts=_by_prompt(table, base, here),
        tokens=_by_token(table, base, here),
        latents=latent_uses(sides),
        atoms=pd.DataFrame() if native is None else atoms_of_one(sides, (itda, native), profiled),
    )


def _by_prompt(table: pd.DataFrame, model: HookedModel, prompts: Provenance) -> pd.DataFrame:
    groups: Any = table.groupby("row")
    shift, counts = groups["shift"].mean(), groups.size()
    within = (table["shift"] - groups["shift"].transform("mean")).to_numpy().std()
    result = pd.DataFrame({"n_tokens": counts, "shift": shift})
    result["z"] = empirical_z(shift.to_numpy(), counts.to_numpy(), float(within))
    result["q"] = adjusted_p(result["z"].to_numpy())
    for name in ("base_error", "tuned_error", "gap"):
        if name in table:
            result[name] = groups[name].mean()
    if "null" in table:
        null = groups["null"].mean().to_numpy()
        result["gap_z"] = (result["gap"] - null.mean()) / (null.std() or 1.0)
    result["text"] = [_context(model, prompts, i) for i in groups["shift"].idxmax().tolist()]
    return result.sort_values("shift", ascending=False)


def _by_token(table: pd.DataFrame, model: HookedModel, prompts: Provenance) -> pd.DataFrame:
    ids = [prompts.tokens(i)[-1] for i in range(len(prompts))]
    text = {token: _decode(model, [token]) for token in set(ids)}
    table = table.drop(columns="null", errors="ignore").assign(token=[text[token] for token in ids])
    return table.sort_values("shift", ascending=False, ignore_index=True)


def _context(model: HookedModel, prompts: Provenance, i: int) -> str:
    ids = prompts.tokens(i)
    return marked(_decode(model, ids[-_CONTEXT:-1]), _decode(model, ids[-1:]))


def _decode(model: HookedModel, ids: list[int]) -> str:
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        return " ".join(map(str, ids))
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _check(
    base: HookedModel, tuned: HookedModel, itda: ITDA, native: ITDA | None, second: ITDA | None
) -> tuple[str, bool]:
    metadata: Any = itda.cfg.metadata
    hook: str | None = metadata.hook_name
    if hook is None:
        raise ValueError("the metadata of this dictionary lacks hook_name: set itda.cfg.metadata.hook_name")
    if second is not None and native is None:
        raise ValueError("second is the null of the gap, which needs native: give both")
    for what, dictionary, model in (("itda", itda, base), ("native", native, tuned), ("second", second, base)):
        if dictionary is None:
            continue
        if dictionary.provenance is None:
            raise ValueError(f"{what} has no provenance, so its atoms can't be found in another model")
        check_model(dictionary.cfg.metadata, model, what)
        other: Any = dictionary.cfg.metadata.hook_name
        if set(canonical_hooks(model, [hook]).values()) != set(canonical_hooks(model, [other]).values()):
            raise ValueError(f"{what} belongs to {other!r}, and itda to {hook!r}: take one hook")
    for model in (base, tuned):
        canonical_hooks(model, [hook])
    return hook, prepends_bos(metadata)
