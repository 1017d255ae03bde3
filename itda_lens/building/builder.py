"""From a stream of activations to a dictionary: each token is judged once, against every atom before it."""

import copy
import warnings
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from itda_lens.building.checks import as_bool, check_counts, check_range
from itda_lens.building.growing import GrowingDictionary
from itda_lens.building.losses import LOSSES, LossName, check_threshold, rounding
from itda_lens.building.paper import judge_batch
from itda_lens.building.sequential import judge_in_order
from itda_lens.building.sizing import Sizing
from itda_lens.building.state import BuildState, Tally, Tokens
from itda_lens.provenance import Provenance, Tokenizer, same_tokenizer
from itda_lens.pursuit import lengths, unit_rows, without_autocast
from itda_lens.sae import ITDA
from itda_lens.streams.massive import is_massive


class BuildStats(NamedTuple):
    """What one call of `update` did, and where the builder stands after it."""

    tokens: int
    """Tokens judged so far, over all calls."""
    atoms: int
    """Atoms held now."""
    added: int
    """Atoms added by this call."""
    dropped: int
    """Atoms dropped by this call, since the threshold has moved above their loss."""
    loss: float
    """Mean loss of the tokens that this call judged, each against the atoms before it; NaN where there were none.

    With the `relative` loss a token leaves pursuit as soon as it is below the threshold, and that is its loss here.
    """
    threshold: float
    """The loss above which a token becomes an atom, now."""
    done: bool
    """Whether the size or the budget is reached, so that further tokens are passed over."""


class DictionaryBuilder:
    """Builds a dictionary from activations in one pass (after Algorithm 1 of arXiv 2505.17769).

    A token whose loss under the atoms so far is above a threshold becomes an atom, `(x - b) / |x - b|`.
    Selection is exactly sequential: the same activations give the same dictionary, to within rounding,
    however they are cut into calls of `update`.

    The size is set by `threshold` (any size), `threshold` and `n_atoms` (stop there), or `n_atoms` and `tokens`
    (a budget): then the threshold moves by itself at fixed token counts, and atoms whose loss lay below it
    are dropped again, so that the dictionary spans the stream.

    **Attention sinks.** A few tokens, BOS above all, can have a norm a hundred times that of others. Such *massive*
    tokens (see `itda_lens.streams.massive`) count in neither mean, loss nor budget. One of which more than the norm of
    an ordinary token is left becomes an atom, whatever the threshold; these atoms stay, and stand first. So an ITDA
    passes sinks on nearly as they are, which the model needs. It takes `center`, with which the usual norm is known.

    Args:
        d_in: width of the activations; trailing dimensions are flattened to it.
        k: L0, the steps of pursuit.
        threshold: loss above which a token becomes an atom; in the range of the loss.
        n_atoms: atoms wanted.
        tokens: budget: how many tokens are judged.
        loss: `"relative"`, `"cosine"` or `"paper"` (see `itda_lens.building.losses`).
        center: subtract `b`, the mean of the first `center_tokens` tokens, before pursuit.
        center_tokens: how many tokens the mean is taken over; they are held back, then judged in order
            (all of a smaller budget).
        orthogonal: whether the ITDA encodes by orthogonal pursuit, which loses less at equal L0
            (`benchmarks/quality`). Atoms are chosen by plain pursuit either way: the other chooses no better ones.
        tokenizer: for the text of the atoms' prompts.
        device: where atoms (float32) and their Gram matrix are held.

    Raises:
        ValueError: an argument is out of range, or none says how large the dictionary shall be.

    Example:
        >>> builder = DictionaryBuilder(4, k=2, threshold=0.1, center=False)
        >>> x = torch.eye(4)[None]  # one sequence of four tokens
        >>> builder.update(torch.cat([x, 2 * x])).atoms
        4
        >>> builder.to_itda().provenance.identities("position")
        [(0, 0), (0, 1), (0, 2), (0, 3)]
    """

    def __init__(
        self,
        d_in: int,
        k: int,
        *,
        threshold: float | None = None,
        n_atoms: int | None = None,
        tokens: int | None = None,
        loss: LossName | str = "relative",
        center: bool = True,
        center_tokens: int = 2048,
        orthogonal: bool = True,
        tokenizer: Tokenizer | None = None,
        device: torch.device | str = "cpu",
    ):
        check_counts(d_in=d_in, k=k, n_atoms=n_atoms, tokens=tokens, center_tokens=center_tokens)
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {sorted(LOSSES)}, got {loss!r}")
        if threshold is not None:
            check_threshold(threshold, loss, d_in, center)
        if n_atoms is not None and k > n_atoms:
            raise ValueError(f"k is {k}, but the dictionary shall have n_atoms={n_atoms}: k can be {n_atoms} at most")
        self.d_in, self.k, self.loss, self.center, self.orthogonal = d_in, k, loss, center, orthogonal
        self.center_tokens = min(center_tokens, tokens or center_tokens)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self._state = BuildState(
            k=k,
            loss=LOSSES[loss],
            dictionary=GrowingDictionary(d_in, self.device),
            sizing=Sizing.choose(threshold, n_atoms, tokens),
            bias=torch.zeros(d_in, dtype=torch.float32, device=self.device),
            floor=rounding(loss, d_in, center),
        )
        self._judge = judge_in_order
        self._bias_is_known = not center
        self._sequences: dict[int, Tensor] = {}
        self._held_back: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._rows_seen, self._tokens_given = 0, False
        self._metadata: dict[str, Any] = {}

    @staticmethod
    def paper(d_in: int, k: int, threshold: float, max_atoms: int | None = None) -> "DictionaryBuilder":
        """The selection of the paper's released code, atom for atom: a batch is one call of `update`.

        Example:
            >>> DictionaryBuilder.paper(768, k=40, threshold=0.0004).loss
            'paper'
        """
        builder = DictionaryBuilder(
            d_in, k, threshold=threshold, n_atoms=max_atoms, loss="paper", center=False, orthogonal=False
        )
        builder._judge = judge_batch
        return builder

    @staticmethod
    def from_itda(itda: ITDA, *, k: int | None = None, **settings: Any) -> "DictionaryBuilder":
        """A builder that goes on from a dictionary: its atoms stay, its bias is kept, rows are numbered on.

        Args:
            itda: the dictionary to go on from.
            k: L0; the dictionary's own if not given.
            settings: as for `DictionaryBuilder`; `n_atoms` counts the atoms that are there.

        Raises:
            ValueError: the tokenizer is not the one of the dictionary's provenance, its input is normalised, it is
                non-negative, or
                `n_atoms` is less than it has.
        """
        if itda.cfg.normalize_activations != "none":
            raise ValueError(
                f"this ITDA normalises its input ({itda.cfg.normalize_activations!r}), and a builder takes activations "
                "as they are: build on normalised activations from the start"
            )
        if itda.cfg.nonnegative:
            raise ValueError("this ITDA has nonnegative=True, and a builder's pursuit is signed: build on another")
        builder = DictionaryBuilder(
            itda.cfg.d_in,
            itda.cfg.k if k is None else k,
            **{"device": itda.device, "orthogonal": itda.cfg.orthogonal, **settings},
        )
        nowhere = torch.full((itda.cfg.d_sae,), -1)
        prov = itda.provenance or Provenance(nowhere, nowhere)
        tokenizer = builder.tokenizer
        if tokenizer is not None and not same_tokenizer(prov, tokenizer):
            raise ValueError("the dictionary was built with another tokenizer, so its tokens mean something else")
        wanted = builder._state.sizing.n_atoms
        if wanted is not None and wanted < itda.cfg.d_sae:
            raise ValueError(
                f"n_atoms={wanted} counts the {itda.cfg.d_sae} atoms that the dictionary has already: ask for more, "
                "or crop it first"
            )
        state, always = builder._state, torch.full((itda.cfg.d_sae,), float("inf"), dtype=torch.float64)
        record: dict[str, Any] = itda.cfg.metadata.itda_build or {}
        sink = torch.arange(itda.cfg.d_sae) < record.get("sinks", 0)
        state.dictionary.extend(unit_rows(itda.atoms.detach().float()), prov.row, prov.position, always, sink)
        state.scale = record.get("typical_norm") or 0.0
        state.bias = itda.b_dec.detach().float().to(builder.device, copy=True) * itda.cfg.apply_b_dec_to_input
        builder._bias_is_known = True
        builder._sequences = dict(prov.sequences)
        builder._rows_seen = int(prov.row.max()) + 1
        builder._metadata = itda.cfg.metadata.to_dict()
        return builder

    @property
    def n_atoms(self) -> int:
        """Atoms held now."""
        return self._state.dictionary.n

    @property
    def done(self) -> bool:
        """Whether the size or the budget is reached: further tokens are passed over."""
        return self._state.done

    @torch.no_grad()
    @without_autocast
    def update(
        self,
        activations: Float[Tensor, "b s *d"],
        tokens: Int[Tensor, "_ _"] | None = None,
        mask: Shaped[Tensor, "_ _"] | None = None,
        unjudged: Shaped[Tensor, "_ _"] | None = None,
    ) -> BuildStats:
        """Judge the next sequences of the stream.

        Args:
            activations: `[b, s, ...]`; trailing dimensions are flattened to `d_in`.
            tokens: the token ids, for provenance.
            mask: True (or 1) where a token may become an atom; a masked token counts in neither mean, loss nor budget,
                yet keeps its position.
            unjudged: True for masked tokens that are no padding, such as BOS: one that is massive becomes an atom.

        Raises:
            ValueError: the width is another, shapes disagree, an unmasked activation is NaN, infinite or beyond what
                float32 holds (the message names its sequence and position), or tokens are missing that earlier calls
                gave. The builder is left as it was.
        """
        x, mask, others = self._checked(activations, tokens, mask, unjudged)
        before = copy.copy(self._state.tally)
        first_row = self._rows_seen
        self._rows_seen += len(x)
        self._tokens_given |= tokens is not None
        if not self.done:
            keep = (mask | others).flatten()
            row = torch.arange(first_row, self._rows_seen).repeat_interleave(x.shape[1])[keep]
            position = torch.arange(x.shape[1]).repeat(len(x))[keep]
            if tokens is not None:
                self._sequences |= dict(enumerate(tokens.detach().to("cpu", torch.int64).unbind(), first_row))
            kept = x.flatten(0, 1)[keep.to(x.device)].to(self.device, torch.float32)
            self._take(kept, row, position, mask.flatten()[keep])
            self._forget_sequences()
        now = self._state.tally
        judged = now.tokens - before.tokens
        return BuildStats(
            tokens=now.tokens,
            atoms=self.n_atoms,
            added=now.added - before.added,
            dropped=now.dropped - before.dropped,
            loss=(now.loss - before.loss) / judged if judged else float("nan"),
            threshold=self._state.sizing.threshold,
            done=self.done,
        )

    @without_autocast
    def to_itda(self, metadata: dict[str, Any] | None = None) -> ITDA:
        """The dictionary as it stands, as an ITDA; the builder can go on afterwards.

        Args:
            metadata: for SAELens: `model_name`, `hook_name`, `context_size`, ...

        Raises:
            ValueError: no token became an atom.
        """
        if self._held_back:
            # The stream ended before the mean was known: take the mean of what there is, without fixing it.
            builder = copy.deepcopy(self)
            builder._release()
            return builder.to_itda(metadata)
        self._report()
        dictionary = self._state.dictionary
        keep = self._state.sizing.best(dictionary.admission)
        keep = torch.cat([keep[dictionary.sink[keep]], keep[~dictionary.sink[keep]]])
        row, position = dictionary.row[keep], dictionary.position[keep]
        sequences = {r: self._sequences[r] for r in row.unique().tolist() if r in self._sequences}
        if 0 < len(sequences) < len(row.unique()):
            warnings.warn(
                f"the tokens of {len(row.unique()) - len(sequences)} of {len(row.unique())} rows with atoms were never "
                "given, so the dictionary has no text: build without tokens, or give them from the first row on",
                stacklevel=2,
            )
        if len(sequences) < len(row.unique()):
            sequences = {}
        k = min(self.k, len(keep))
        if k < self.k:
            warnings.warn(
                f"only {len(keep)} atoms were found, fewer than k={self.k}, so this ITDA has k={k}: "
                "lower the threshold or give more text",
                stacklevel=2,
            )
        return ITDA.from_atoms(
            dictionary.atoms[keep.to(self.device)],
            k,
            bias=self._state.bias,
            orthogonal=self.orthogonal,
            provenance=Provenance.from_tokens(row, position, sequences, self.tokenizer if sequences else None),
            metadata=self._metadata | (metadata or {}) | {"itda_build": self._record(int(dictionary.sink[keep].sum()))},
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: tensors, numbers and strings, which `torch.save` and `torch.load` take."""
        dictionary = self._state.dictionary
        return {
            "settings": self._settings(),
            "atoms": dictionary.atoms.clone(),
            "row": dictionary.row.clone(),
            "position": dictionary.position.clone(),
            "admission": dictionary.admission.clone(),
            "sink": dictionary.sink.clone(),
            "scale": self._state.scale,
            "bias": self._state.bias.clone(),
            "bias_is_known": self._bias_is_known,
            "held_back": [torch.cat(parts) for parts in zip(*self._held_back, strict=True)],
            "sequences": {row: tokens.clone() for row, tokens in self._sequences.items()},
            "rows_seen": self._rows_seen,
            "tokens_given": self._tokens_given,
            "tally": asdict(self._state.tally),
            "sizing": self._state.sizing.state_dict(),
            "metadata": copy.deepcopy(self._metadata),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; raises a ValueError when it belongs to a builder with other settings."""
        for name, value in self._settings().items():
            saved = state["settings"].get(name)
            if saved != value:
                raise ValueError(f"the saved builder has {name}={saved!r}, this one {name}={value!r}: make it alike")
        own = self._state
        own.dictionary = GrowingDictionary(self.d_in, self.device)
        # States of earlier versions know of no sinks.
        places = state["row"], state["position"]
        own.dictionary.extend(state["atoms"], *places, state["admission"], state.get("sink"))
        own.scale = state.get("scale", 0.0)
        own.bias = state["bias"].to(self.device, copy=True)
        own.tally = Tally(**state["tally"])
        own.sizing.load_state_dict(state["sizing"])
        self._bias_is_known = state["bias_is_known"]
        self._held_back = []
        if held := state["held_back"]:
            masked_in = held[3] if len(held) > 3 else torch.ones_like(held[1], dtype=torch.bool)
            self._held_back = [(held[0], held[1], held[2], masked_in)]
        self._sequences = dict(state["sequences"])
        self._rows_seen, self._tokens_given = state["rows_seen"], state.get("tokens_given", False)
        self._metadata = copy.deepcopy(state["metadata"])

    def _take(self, x: Tensor, row: Tensor, position: Tensor, masked_in: Tensor) -> None:
        if not self._bias_is_known:
            self._held_back.append((x, row, position, masked_in))
            if sum(int(held.sum()) for *_, held in self._held_back) >= self.center_tokens:
                self._release()
            return
        massive = self._state.massive(x)
        keep = masked_in.to(x.device) | massive
        places = keep.cpu()
        self._judge(self._state, Tokens(x[keep], row[places], position[places], massive[keep]))

    def _release(self) -> None:
        held = [torch.cat(parts) for parts in zip(*self._held_back, strict=True)]
        self._held_back = []
        self._bias_is_known = True
        x, masked_in = held[0], held[3]
        self._measure(x[masked_in.to(x.device)][: self.center_tokens])
        self._take(*held)

    def _measure(self, x: Tensor) -> None:
        """The mean and the usual norm about it, of all but massive tokens."""
        norms = lengths(x)
        if not norms.any():
            return
        ordinary = x[~is_massive(norms, norms[norms > 0].median())]
        self._state.bias = ordinary.double().mean(dim=0).float()
        self._state.scale = float(lengths(ordinary - self._state.bias).median())

    def _forget_sequences(self) -> None:
        wanted = set(self._state.dictionary.row.tolist()).union(*(row.tolist() for _, row, *_ in self._held_back))
        self._sequences = {row: tokens for row, tokens in self._sequences.items() if row in wanted}

    def _checked(
        self, activations: Tensor, tokens: Tensor | None, mask: Tensor | None, unjudged: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if activations.ndim < 3:
            raise ValueError(
                f"activations must have the shape [sequences, positions, ...], got {tuple(activations.shape)}"
            )
        x = activations.detach().flatten(2)
        if x.shape[2] != self.d_in:
            raise ValueError(f"the activations have width {x.shape[2]}, but this builder was made for d_in={self.d_in}")
        for name, other in (("tokens", tokens), ("mask", mask), ("unjudged", unjudged)):
            if other is not None and other.shape != x.shape[:2]:
                raise ValueError(
                    f"{name} has shape {tuple(other.shape)}, but the activations have {tuple(x.shape[:2])}"
                )
        if tokens is None and self._tokens_given and not self.done:
            raise ValueError(
                f"this update gives no tokens, but those before it did: the text of all {self.n_atoms} atoms would be "
                "lost. Give the tokens of these activations too"
            )
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else as_bool("mask", mask)
        finite = x.isfinite().all(dim=-1).cpu()
        others = torch.zeros_like(mask) if unjudged is None else as_bool("unjudged", unjudged) & ~mask & finite
        check_range(x, mask, others, self._rows_seen)
        return x, mask, others

    def _report(self) -> None:
        judged, sizing = self._state.tally, self._state.sizing
        seen = f"the losses of {judged.tokens:,} tokens were between {judged.low:.4g} and {judged.high:.4g}"
        if self.n_atoms == 0:
            raise ValueError(
                f"no token became an atom: the threshold is {sizing.threshold:.4g}, and {seen}"
                if judged.tokens
                else "no token became an atom: none was given that is not masked"
            )
        if sizing.is_fixed and judged.tokens > 1:
            if judged.added == judged.tokens:
                warnings.warn(
                    f"every token became an atom: the threshold {sizing.threshold:.4g} is below what they lost "
                    f"({seen}). Raise it, or ask for n_atoms with a budget of tokens",
                    stacklevel=3,
                )
            if judged.added <= 1:
                warnings.warn(
                    f"{judged.added} of {judged.tokens:,} tokens became atoms: the threshold is "
                    f"{sizing.threshold:.4g}, and {seen}. Lower it, or ask for n_atoms with a budget of tokens",
                    stacklevel=3,
                )
        if not sizing.is_fixed and sizing.n_atoms is not None and self.n_atoms < sizing.n_atoms:
            warnings.warn(
                f"the dictionary has {self.n_atoms} atoms of the {sizing.n_atoms} asked for: the stream ended after "
                f"{judged.tokens:,} tokens ({seen}). Give more text, or a budget of no more tokens than there are",
                stacklevel=3,
            )

    def _record(self, sinks: int) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "center_tokens": self.center_tokens if self.center else 0,
            "tokens_judged": self._state.tally.tokens,
            "sequences": self._rows_seen,
            "sinks": sinks,
            "typical_norm": self._state.scale or None,
            **self._state.sizing.record(),
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "selection": self._judge.__name__,
            "d_in": self.d_in,
            "k": self.k,
            "loss": self.loss,
            "center": self.center,
            "center_tokens": self.center_tokens,
            "orthogonal": self.orthogonal,
            **self._state.sizing.settings(),
        }
