"""How well a model does with each of several SAEs: the figures of SAELens's `run_evals`, from shared forward passes."""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Int64
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.evals.scores import Losses, Mean, Reconstruction, cross_entropy, log_probabilities, share
from itda_lens.metadata import prepends_bos
from itda_lens.streams import (
    HookedModel,
    canonical_hooks,
    check_model,
    load_text,
    special_token_ids,
    token_batches,
)
from itda_lens.streams.datasets import AnyDataset
from itda_lens.streams.hooks import activation_shapes
from itda_lens.streams.massive import is_massive

# Numbers in the widest tensor of a forward pass (128 MB in float32), of which two are held at once.
_WIDEST = {"cpu": 2**25, "cuda": 2**28}

_RESHAPING = ("reshape_fn_in", "reshape_fn_out", "d_head", "hook_z_reshaping_mode")


def evaluate(
    saes: SAE[Any] | Mapping[str, SAE[Any]],
    model: HookedModel,
    dataset: AnyDataset | str | Path,
    *,
    column: str | None = None,
    batch_size: int = 16,
    n_batches: int = 8,
    exclude_special_tokens: bool = True,
    progress: bool = True,
    on_batch: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:
    """One row of metrics for each SAE, all measured on the same tokens.

    They have the definitions of SAELens's `run_evals`. `ce_loss_score` and `kl_div_score` are 1 for a perfect
    reconstruction and 0 for one no better than zeros; `dead` is the share of latents that never fired;
    `tokens_per_s` counts an SAE's own time: encoding, decoding and its forward pass. `massive` is how many of the
    tokens had a norm above `streams.massive.MASSIVE` times the median (of the first rows, special tokens left out),
    and `explained_variance_ordinary` leaves these out: with them, explained variance is a figure about them.

    The clean forward pass is shared by all SAEs, and the one with zeros by those of one hook. SAEs whose metadata ask
    for other rows (`context_size`, `prepend_bos`, `pack`, `seqpos_slice`) are measured on rows of their own.

    Args:
        saes: an ITDA or any other SAE of SAELens, or several by name.
        model: the model that they belong to. Hooks may be named as on either kind of model.
        dataset: held-out text.
        column: the dataset's column with the text, when it is not called `text`.
        batch_size: rows of `context_size` tokens in a batch. A forward pass takes fewer where logits are large.
        n_batches: batches.
        exclude_special_tokens: leave BOS, EOS and padding out, of the metrics and of what is replaced.
        progress: show a progress bar.
        on_batch: called after each batch with the table so far.

    Raises:
        ValueError: an SAE names another model, its hook is not in the model or has another width, its metadata
            lacks what is needed, or the text gives no row; all before any long work.

    Example:
        >>> from itda_lens import ITDA, embedded
        >>> metadata = {"hook_name": "blocks.1.hook_resid_post", "context_size": 64, "prepend_bos": True}
        >>> itda = ITDA.from_atoms(torch.eye(96), k=8, metadata=metadata)
        >>> heldout = embedded.dataset("heldout")
        >>> table = evaluate(itda, embedded.model(), heldout, batch_size=4, n_batches=1, progress=False)
        >>> bool(table.loc["itda", "l0"] <= 8)
        True
    """
    named = saes if isinstance(saes, Mapping) else {saes.cfg.architecture(): saes}
    for name, value in {"saes": len(named), "batch_size": batch_size, "n_batches": n_batches}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    places = _places(named, model)
    data = load_text(dataset, column=column)
    passes: dict[_Layout, _SharedPasses] = {}
    for name, sae in named.items():
        layout = _Layout.of(sae)
        passes.setdefault(layout, _SharedPasses(model, layout, exclude_special_tokens)).admit(name, sae, places[name])

    def table() -> pd.DataFrame:
        rows = {name: row for shared in passes.values() for name, row in shared.scores()}
        return pd.DataFrame.from_dict({name: rows[name] for name in named if name in rows}, orient="index")

    asked = n_batches * batch_size
    with tqdm(total=len(passes) * asked, unit=" rows", disable=not progress) as bar:
        for layout, shared in passes.items():
            for tokens, real in itertools.islice(layout.batches(model, data, batch_size), n_batches):
                shared.add(tokens, real)
                bar.update(len(tokens))
                if on_batch is not None:
                    on_batch(table())
            shared.check_size(asked)
    return table()


class _Layout(NamedTuple):
    """The rows that an SAE is measured on."""

    context_size: int
    prepend_bos: bool
    pack: bool
    positions: tuple[int | None, ...]

    @staticmethod
    def of(sae: SAE[Any]) -> "_Layout":
        metadata: Any = sae.cfg.metadata
        return _Layout(
            metadata.context_size,
            prepends_bos(metadata),
            metadata.pack is not False,
            tuple(metadata.seqpos_slice or (None,)),
        )

    def batches(self, model: HookedModel, data: Any, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
        return token_batches(
            model,
            data,
            context_size=self.context_size,
            batch_size=batch_size,
            prepend_bos=self.prepend_bos,
            pack=self.pack,
        )


class _Place(NamedTuple):
    """What an SAE replaces: all of a hook point, by the model's own name, or one of its heads."""

    hook: str
    head: int | None

    def read(self, x: Tensor) -> Tensor:
        return x.flatten(2) if self.head is None else x[:, :, self.head]

    def write(self, x: Tensor, new: Tensor) -> Tensor:
        if self.head is None:
            return new.reshape(x.shape)
        x = x.clone()
        x[:, :, self.head] = new
        return x


class _SharedPasses:
    """The SAEs that are measured on the same rows, and what all of them, or those of one place, share."""

    def __init__(self, model: HookedModel, layout: _Layout, exclude_special_tokens: bool) -> None:
        self.model, self.layout, self.exclude_special_tokens = model, layout, exclude_special_tokens
        self.special = torch.tensor(special_token_ids(model), dtype=torch.int64)
        self.rows, self.clean = 0, Mean()
        self.ablated: dict[_Place, Losses] = {}
        self.medians: dict[_Place, Tensor] = {}
        self.measured: dict[str, _Measured] = {}

    @property
    def judged(self) -> int:
        """How many predictions were judged."""
        return self.clean.count

    def admit(self, name: str, sae: SAE[Any], place: _Place) -> None:
        self.measured[name] = _Measured(sae, place)
        self.ablated.setdefault(place, Losses())

    def scores(self) -> Iterable[tuple[str, dict[str, float]]]:
        if self.judged:
            for name, measured in self.measured.items():
                yield name, measured.row(self.clean.value, self.ablated[measured.place])

    def check_size(self, asked: int) -> None:
        """Afterwards: raise a ValueError where no token was judged, and warn where there were fewer rows than asked."""
        size = f"{self.rows:,} rows of {self.layout.context_size} tokens"
        if not self.judged:
            raise ValueError(f"the text gives no token to measure on, in {size}: give more of it")
        if self.rows < asked:
            warnings.warn(
                f"the text gives {size}, where {asked:,} were asked for: the scores are of these", stacklevel=3
            )

    @torch.no_grad()
    def add(self, tokens: Int64[Tensor, "b s"], real: Bool[Tensor, "b s"]) -> None:
        """Measure a batch, a few rows at a time; `real` is False on padding."""
        widths = [self.model.cfg.d_vocab, *(measured.sae.cfg.d_sae for measured in self.measured.values())]
        widest = _WIDEST.get(torch.device(self.model.cfg.device or "cpu").type, _WIDEST["cpu"])
        at_once = max(1, widest // (tokens.shape[1] * max(widths)))
        for some, some_real in zip(tokens.split(at_once), real.split(at_once), strict=True):
            self._add_rows(some, some_real)
        self.rows += len(tokens)

    def _add_rows(self, tokens: Tensor, real: Tensor) -> None:
        inside = torch.zeros(tokens.shape[1], dtype=torch.bool)
        inside[slice(*self.layout.positions)] = True
        ordinary = real & inside & ~torch.isin(tokens, self.special)
        judged = ordinary if self.exclude_special_tokens else real & inside
        predicts = judged[:, :-1] & real[:, 1:]
        tokens, judged, predicts = (t.to(self.model.cfg.device) for t in (tokens, judged, predicts))

        activations: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any, name: str) -> None:
            activations[name] = x.clone()  # some models go on to change it in place

        hooks = {place.hook for place in self.ablated}
        clean = _forward(self.model, tokens, {name: partial(keep, name=name) for name in hooks})
        self.clean.add(cross_entropy(clean, tokens)[predicts])
        for place, losses in self.ablated.items():
            x = place.read(activations[place.hook])
            if place not in self.medians and ordinary.any():
                self.medians[place] = x[ordinary.to(x.device)].float().norm(dim=-1).median()
            changed = _with(self.model, tokens, place, torch.zeros_like(x))
            losses.add(clean, changed, tokens, judged, predicts)
            del changed
        for measured in self.measured.values():
            place, started = measured.place, time.perf_counter()
            x = place.read(activations[place.hook])
            x_hat, latents = _reconstructed(measured.sae, x)
            changed = _with(self.model, tokens, place, x_hat.where(judged[..., None], x))
            measured.losses.add(clean, changed, tokens, judged, predicts)
            del changed
            massive = is_massive(x.float().norm(dim=-1), self.medians.get(place, torch.tensor(math.nan)))
            measured.reconstruction.add(
                x[judged], x_hat[judged], latents[judged.to(latents.device)], massive.to(judged.device)[judged]
            )
            measured.tokens += tokens.numel()
            measured.seconds += time.perf_counter() - started


class _Measured:
    """One SAE and its sums."""

    def __init__(self, sae: SAE[Any], place: _Place) -> None:
        self.sae, self.place = sae, place
        self.losses, self.reconstruction = Losses(), Reconstruction(sae.cfg.d_sae)
        self.tokens, self.seconds = 0, 0.0

    def row(self, clean_ce: float, ablated: Losses) -> dict[str, float]:
        ce, kl, found = self.losses.ce.value, self.losses.kl.value, self.reconstruction
        return {
            "ce_loss_score": share(ablated.ce.value - ce, ablated.ce.value - clean_ce),
            "kl_div_score": share(ablated.kl.value - kl, ablated.kl.value),
            "explained_variance": found.variance.value,
            "cosine": found.cosine.value,
            "l0": found.l0.value,
            "l1": found.l1.value,
            "dead": 1 - float(found.fired.float().mean()),
            "tokens_per_s": self.tokens / self.seconds,
            "massive": found.massive,
            "explained_variance_ordinary": found.ordinary.value,
        }


def _forward(model: HookedModel, tokens: Tensor, hooks: Mapping[str, Callable[..., Any]]) -> Tensor:
    """Log-probabilities, with functions hooked in by the model's own names."""
    # Rows are padded on the right, if at all: with a tokenizer that pads on the left, TransformerLens would mask BOS.
    logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=list(hooks.items()), padding_side="right")
    return log_probabilities(logits)  # pyright: ignore[reportArgumentType]


def _with(model: HookedModel, tokens: Tensor, place: _Place, new: Tensor) -> Tensor:
    """Log-probabilities where a place has other activations."""
    return _forward(model, tokens, {place.hook: lambda x, hook: place.write(x, new)})


def _reconstructed(sae: SAE[Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """What an SAE gives for activations `[b, s, d]`, and its latents on the way, dense."""
    found: list[Any] = []
    watch = sae.hook_sae_acts_post.register_forward_hook(lambda module, args, output: found.append(output))
    reshaping = {name: getattr(sae, name, None) for name in _RESHAPING}
    sae.turn_off_forward_pass_hook_z_reshaping()  # heads are flattened already
    try:
        x_hat = sae(x.to(sae.device)).to(x.device, x.dtype)
        latents = found[0] if found else sae.encode(x.to(sae.device))  # SAELens's own matching pursuit fires no hook
    finally:
        watch.remove()
        for name, value in reshaping.items():  # its own way back refuses a hook of another name
            setattr(sae, name, value)
    return x_hat, latents.to_dense() if latents.is_sparse else latents


def _places(saes: Mapping[str, SAE[Any]], model: HookedModel) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for name, sae in saes.items():
        metadata: Any = sae.cfg.metadata
        missing = [key for key in ("hook_name", "context_size") if metadata[key] is None]
        if missing:
            raise ValueError(f"the metadata of {name!r} lacks {', '.join(missing)}: set sae.cfg.metadata.{missing[0]}")
        check_model(metadata, model, repr(name))
        if not 2 <= metadata.context_size <= model.cfg.n_ctx:
            raise ValueError(
                f"the metadata of {name!r} has context_size={metadata.context_size}, which must be between 2 and the "
                f"{model.cfg.n_ctx} positions of {model.cfg.model_name}: set sae.cfg.metadata.context_size"
            )
        if metadata.hook_name_out not in (None, metadata.hook_name):
            raise ValueError(f"{name!r} is a transcoder, from {metadata.hook_name!r} to {metadata.hook_name_out!r}")
        if sae.use_error_term:
            raise ValueError(f"{name!r} adds its error term, which makes every score 1: set sae.use_error_term = False")
        [hook] = canonical_hooks(model, [metadata.hook_name]).values()
        places[name] = _Place(hook, metadata.hook_head_index)
    shapes = activation_shapes(model, {place.hook for place in places.values()})
    for name, (hook, head) in places.items():
        width = math.prod(shapes[hook][2 if head is None else 3 :])
        if width != saes[name].cfg.d_in:
            raise ValueError(
                f"{name!r} takes activations of width {saes[name].cfg.d_in}, but those at {hook!r} of "
                f"{model.cfg.model_name} have width {width}: pass the model that it was built on"
            )
    return places
