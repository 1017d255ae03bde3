"""What a model loses when activations are replaced by their reconstructions, on held-out text."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor

from benchmarks.quality.subjects import BATCH, Subject
from itda_lens.streams.activations import forward

Reconstruction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scores:
    """All on the same tokens, special ones left out; what a plain function has no latents for is None."""

    ce_score: float
    """`(H* - H0) / (H_orig - H0)`: 1 is a perfect reconstruction, 0 that by zeros (arXiv 2505.17769, section 4)."""
    kl: float
    """Nats a token, from the model's own distribution to the one with the reconstruction."""
    explained_variance: float
    l0: float | None
    dead: float | None
    """Share of the latents that were never used."""
    negative: float | None
    """Share of the coefficients that are below zero."""
    ce: float
    ce_clean: float
    ce_zero: float
    tokens: int


@dataclass(frozen=True)
class _Clean:
    """What the model does by itself at a hook, and with zeros there."""

    tokens: Tensor
    mask: Tensor
    x: Tensor
    log_probs: list[Tensor]
    ce: float
    ce_zero: float


@torch.no_grad()
def score(subject: Subject, hook: str, sae: SAE[Any] | Reconstruction, split: str = "heldout") -> Scores:
    """Replace the activations at `hook` (a residual stream after a block) by reconstructions, except at special tokens.

    Args:
        subject: the model and its text.
        hook: one of its hook points.
        sae: any SAE of SAELens, or a function of activations `[tokens, d]`.
        split: the text, `heldout` or `validation`.
    """
    clean = _clean(subject, hook, split)
    x, mask = clean.x[clean.mask], clean.mask
    n, used, active, negative = 0, None, 0, 0
    parts = []
    for block in x.split(4096):
        if isinstance(sae, SAE):
            acts = sae.encode(block)
            fired = acts != 0
            n, used = acts.shape[-1], fired.any(0) if used is None else used | fired.any(0)
            active, negative = active + int(fired.sum()), negative + int((acts < 0).sum())
            parts.append(sae.decode(acts))
        else:
            parts.append(sae(block))
    recons = torch.cat(parts)
    replaced = clean.x.clone()
    replaced[mask] = recons
    kl, losses = 0.0, []
    for part, tokens, judged, before in zip(
        replaced.split(BATCH), clean.tokens.split(BATCH), mask.split(BATCH), clean.log_probs, strict=True
    ):
        after = _log_probs(subject, hook, part)[judged]
        kl += float((before.exp() * (before - after)).sum())
        losses.append(_losses(after, tokens, judged))
    ce = float(torch.cat(losses).mean())
    residual, spread = (x - recons).square().sum(), (x - x.mean(0)).square().sum()
    return Scores(
        ce_score=(clean.ce_zero - ce) / (clean.ce_zero - clean.ce),
        kl=kl / len(x),
        explained_variance=float(1 - residual / spread),
        l0=active / len(x) if used is not None else None,
        dead=1 - int(used.sum()) / n if used is not None else None,
        negative=negative / max(active, 1) if used is not None else None,
        ce=ce,
        ce_clean=clean.ce,
        ce_zero=clean.ce_zero,
        tokens=len(x),
    )


@lru_cache(maxsize=2)  # each holds a distribution over the vocabulary for each token
def _clean(subject: Subject, hook: str, split: str) -> _Clean:
    tokens = getattr(subject, split)
    mask = subject.mask(tokens)
    x = torch.cat([forward(subject.model, part, {hook: hook})[hook] for part in tokens.split(BATCH)])
    log_probs, clean, zero = [], [], []
    for part, row, judged in zip(x.split(BATCH), tokens.split(BATCH), mask.split(BATCH), strict=True):
        log_probs.append(_log_probs(subject, hook, part)[judged])
        clean.append(_losses(log_probs[-1], row, judged))
        ablated = _log_probs(subject, hook, part.masked_fill(judged[..., None], 0))
        zero.append(_losses(ablated[judged], row, judged))
    ce, ce_zero = (float(torch.cat(losses).mean()) for losses in (clean, zero))
    return _Clean(tokens, mask, x, log_probs, ce, ce_zero)


def _log_probs(subject: Subject, hook: str, resid: Tensor) -> Tensor:
    """`[rows, context, vocabulary]` from the residual stream after a block: the blocks before it are not run again."""
    stop = extract_stop_at_layer_from_tlens_hook_name(hook)
    return subject.model(resid, start_at_layer=stop).log_softmax(dim=-1)


def _losses(log_probs: Tensor, tokens: Tensor, judged: Tensor) -> Tensor:
    """The loss of the next token, after each judged one that has a next."""
    following = torch.full_like(tokens, -1)
    following[:, :-1] = tokens[:, 1:]
    target = following[judged]
    has = target >= 0
    return -log_probs[has].gather(-1, target[has, None])[:, 0].double()
