"""Sums over tokens, from which the scores of `evaluate` follow. The definitions are those of SAELens's `run_evals`."""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cosine_similarity


class Mean:
    """The mean of all values so far; NaN of none."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.float().cpu().double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


class ExplainedVariance:
    """1 - E|x - x_hat|^2 / Var(x) over all tokens so far; NaN of none."""

    def __init__(self) -> None:
        self.sum: Tensor | float = 0.0
        self.squares, self.residual = Mean(), Mean()

    def add(self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> None:
        self.sum = self.sum + x.sum(dim=0).cpu().double()
        self.squares.add(x.square().sum(dim=-1))
        self.residual.add((x - x_hat).square().sum(dim=-1))

    @property
    def value(self) -> float:
        if not self.squares.count:
            return math.nan
        variance = self.squares.value - float(torch.as_tensor(self.sum / self.squares.count).square().sum())
        if variance < 1e-10:
            return float(self.residual.value < 1e-10)
        return 1 - self.residual.value / variance


class Losses:
    """What a change to a forward pass does to the model's predictions."""

    def __init__(self) -> None:
        self.ce, self.kl = Mean(), Mean()

    def add(
        self,
        clean: Float[Tensor, "b s v"],
        changed: Float[Tensor, "b s v"],
        tokens: Int64[Tensor, "b s"],
        judged: Bool[Tensor, "b s"],
        predicts: Bool[Tensor, "b t"],
    ) -> None:
        """Add the log-probabilities of some rows, unchanged and changed."""
        self.ce.add(cross_entropy(changed, tokens)[predicts])
        for p, q, here in zip(clean, changed, judged, strict=True):  # by row: these are the widest tensors of all
            self.kl.add((p.exp() * (p - q)).sum(dim=-1)[here])


class Reconstruction:
    """How well, and with what, activations are reconstructed."""

    def __init__(self, d_sae: int) -> None:
        self.variance, self.ordinary, self.cosine = ExplainedVariance(), ExplainedVariance(), Mean()
        self.l0, self.l1, self.fired = Mean(), Mean(), torch.zeros(d_sae, dtype=torch.bool)
        self.massive = 0

    def add(
        self,
        x: Float[Tensor, "n d"],
        x_hat: Float[Tensor, "n d"],
        latents: Tensor,
        massive: Bool[Tensor, " n"],
    ) -> None:
        """Add some tokens: activations, reconstructions, latents `[n, d_sae]`, and which of the tokens are massive."""
        x, x_hat = x.float(), x_hat.float()
        self.variance.add(x, x_hat)
        self.ordinary.add(x[~massive], x_hat[~massive])
        self.massive += int(massive.sum())
        self.cosine.add(cosine_similarity(x, x_hat, dim=-1))
        active = latents != 0
        self.l0.add(active.sum(dim=-1))
        self.l1.add(latents.float().abs().sum(dim=-1))
        self.fired |= active.any(dim=0).cpu()


def log_probabilities(logits: Float[Tensor, "b s v"]) -> Float[Tensor, "b s v"]:
    """In float32, and in place where the logits are."""
    logits = logits.float()
    for row in logits:
        row -= row.logsumexp(dim=-1, keepdim=True)
    return logits


def cross_entropy(log_p: Float[Tensor, "b s v"], tokens: Int64[Tensor, "b s"]) -> Float[Tensor, "b t"]:
    """Of each next token, hence one less in each row."""
    return -log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


def share(part: float, whole: float) -> float:
    """A quotient; NaN of nothing."""
    return part / whole if whole else math.nan
