"""Two models side by side: a probe in the tokens of each, and one dictionary carried into both."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from itda_lens.interpret.decompose import decompose
from itda_lens.interpret.placing import place
from itda_lens.interpret.profiles import Profiled, profile_shift
from itda_lens.interpret.prompts import run_prompts
from itda_lens.interpret.transfer import source_atoms, transfer
from itda_lens.provenance import Provenance, shared_kind
from itda_lens.sae import ITDA
from itda_lens.streams import HookedModel, canonical_hooks

BLOCK = 2048


class Side(NamedTuple):
    """One model, with its activations at the probe and the base's dictionary."""

    model: HookedModel
    hook: str
    head_index: int | None
    prepend_bos: bool
    x: Float[Tensor, "b d"]
    """On the CPU, in float32."""
    carried: ITDA

    @staticmethod
    def of(model: HookedModel, itda: ITDA, hook: str, prompts: Provenance, prepend_bos: bool) -> "Side":
        """A model that is shown the probe, `prompts` in its own tokens."""
        head = itda.cfg.metadata.hook_head_index
        carried = transfer(itda, model, hook, head_index=head)
        return Side(model, hook, head, prepend_bos, _activations(model, prompts, hook, head), carried)

    def at(self, prompts: Provenance) -> Float[Tensor, "m d"]:
        """The activations at some prompts."""
        placed = place(prompts, self.model, prepend_bos=self.prepend_bos)
        return _activations(self.model, placed.provenance, self.hook, self.head_index)

    def placed(self, prompts: Provenance) -> set[int]:
        """Which prompts can be placed in this model."""
        return set(place(prompts, self.model, prepend_bos=self.prepend_bos).source.tolist())

    def carry(self, itda: ITDA) -> ITDA:
        """Another dictionary, in this model."""
        return transfer(itda, self.model, self.hook, head_index=self.head_index)

    def error(self, itda: ITDA) -> Float[Tensor, " b"]:
        """The relative error of each token of the probe under a dictionary of this model."""
        return torch.cat([decompose(itda, x).relative_error.float().cpu() for x in self.x.split(BLOCK)])

    def profiled(self, atoms: Int64[Tensor, " n"]) -> Profiled:
        """The probe beside some atoms of the carried dictionary."""
        bias = self.carried.b_dec * self.carried.cfg.apply_b_dec_to_input
        rows = self.carried.atoms[atoms.to(self.carried.device)]
        return Profiled(self.x, rows.detach().float().cpu(), bias.detach().float().cpu())


def common_atoms(sides: Sequence[Side]) -> tuple[Int64[Tensor, " n"], list[Int64[Tensor, " n"]]]:
    """The atoms of the base's dictionary that both models have, and where each has them."""
    sources = [source_atoms(side.carried) for side in sides]
    common = sources[0][torch.isin(sources[0], sources[1])]
    return common, [torch.searchsorted(source, common) for source in sources]


def latent_uses(sides: Sequence[Side]) -> pd.DataFrame:
    """How often each latent is used in the base and in the tuned model, those first that are used more than before."""
    common, columns = common_atoms(sides)
    was, now, gained, lost = torch.zeros(4, len(common), dtype=torch.float64)
    for x, y in zip(*(side.x.split(BLOCK) for side in sides), strict=True):
        before, after = (_used(s.carried, part)[:, c] for s, part, c in zip(sides, (x, y), columns, strict=True))
        was += before.sum(dim=0)
        now += after.sum(dim=0)
        gained += (after & ~before).sum(dim=0)
        lost += (before & ~after).sum(dim=0)
    n_tokens = len(sides[0].x)
    provenance = sides[0].carried.provenance
    assert provenance is not None
    table = {
        "base_use": (was / n_tokens).numpy(),
        "tuned_use": (now / n_tokens).numpy(),
        "z": ((gained - lost) / (gained + lost).clamp_min(1).sqrt()).numpy(),
        "text": texts(provenance.select(columns[0])),
    }
    return pd.DataFrame(table, index=pd.Index(common.tolist(), name="latent")).sort_values("z", ascending=False)


def atoms_of_one(sides: Sequence[Side], dictionaries: Sequence[ITDA], profiled: Sequence[Profiled]) -> pd.DataFrame:
    """The prompts that only one of two dictionaries holds, judged by the other one in both models."""
    means = (profiled[0].directions().mean(0), profiled[1].directions().mean(0))
    columns = ["model", "atom", "shift", "error", "need", "text"]
    tables = [pd.DataFrame(columns=columns)]
    for name, own, lacking in (("base", *dictionaries), ("tuned", *reversed(dictionaries))):
        assert own.provenance is not None
        assert lacking.provenance is not None
        kind = shared_kind([own.provenance, lacking.provenance])
        held = set(lacking.provenance.identities(kind))
        readable = sides[0].placed(own.provenance) & sides[1].placed(own.provenance)
        identities = enumerate(own.provenance.identities(kind))
        only = [i for i, identity in identities if identity not in held and i in readable]
        if not only:
            continue
        prompts = own.provenance.select(only)
        x = [side.at(prompts) for side in sides]
        shift = profile_shift(profiled[0]._replace(x=x[0]), profiled[1]._replace(x=x[1]), means)
        base, tuned = (
            decompose(side.carry(lacking), at).relative_error.float().cpu() for side, at in zip(sides, x, strict=True)
        )
        mine, theirs = (base, tuned) if name == "base" else (tuned, base)
        values = [name, only, shift.numpy(), mine.numpy(), (mine - theirs).numpy(), texts(prompts)]
        tables.append(pd.DataFrame(dict(zip(columns, values, strict=True))))
    found = [table for table in tables if len(table)] or tables[:1]
    return pd.concat(found).sort_values("shift", ascending=False, ignore_index=True)


def texts(prompts: Provenance, width: int = 96) -> list[str]:
    """The ends of prompts on one line each, with the token in brackets; token ids where there is no text."""
    if not prompts.prompts:
        return [f"«{prompts.tokens(i)[-1]}»" for i in range(len(prompts))]
    return [marked(before, token, width) for before, token in prompts.prompts]


def marked(before: str, token: str, width: int = 96) -> str:
    """The end of a text and its token on one line, the token in brackets."""
    return f"{before[-width:]}«{token}»".replace("\n", "↵")


def _used(itda: ITDA, x: Tensor) -> Tensor:
    return (decompose(itda, x).codes.to_dense(itda.cfg.d_sae) != 0).cpu()


def _activations(model: HookedModel, prompts: Provenance, hook: str, head_index: int | None) -> Tensor:
    batches = list(run_prompts(model, prompts, canonical_hooks(model, [hook]), head_index=head_index))
    x = torch.cat([batch.activations[hook].float().cpu() for batch in batches])
    return x[torch.cat([batch.which for batch in batches]).argsort()]
