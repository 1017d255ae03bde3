"""Graded membership: how badly each token of a stream is missed by small dictionaries of shared prompts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import normalize

from itda_lens.pursuit import matching_pursuit
from itda_lens.similarity.calibration import Calibration, against
from itda_lens.similarity.null import orders


class MembershipProfiles:
    """The grade of every token in every layer, in one pass over the stream.

    An ITDA says of a token that it is an atom or that it is not, and which of many like tokens comes first is chance.
    This says how badly the token is missed: the share of its squared norm that is left when it is decomposed, as
    an ITDA decomposes, into `k` atoms of a dictionary; the mean over several dictionaries. Their atoms are prompts
    drawn at random from the beginning of the stream, *the same in every layer and model*, so that what differs
    between two profiles is the layers' geometry and not a choice of atoms.

    Args:
        layers: how many layers there are, over all models.
        dictionaries: how many dictionaries; the noise of a profile falls with their number.
        atoms: of each. Somewhat fewer than the activations' width is best: a large dictionary misses nothing.
        k: L0.
        beginning: from how many tokens the prompts are drawn; these get no grade.
        seed: of the choice of prompts.

    Raises:
        ValueError: a number below 1, `k` above `atoms`, a beginning shorter than the prompts drawn from it; or, in
            `update`, a layer that is constant.

    Example:
        >>> profiles = MembershipProfiles(2, dictionaries=2, atoms=5, k=2, beginning=20)
        >>> x = torch.randn(40, 8)
        >>> for part in x.split(20):
        ...     profiles.update([part, 3 * part])
        >>> profiles.similarity([0], [1]).round(decimals=3).item()
        1.0
    """

    def __init__(
        self,
        layers: int,
        *,
        dictionaries: int = 24,
        atoms: int = 100,
        k: int = 8,
        beginning: int = 10_000,
        seed: int = 0,
    ):
        for name, value in (("layers", layers), ("dictionaries", dictionaries), ("atoms", atoms), ("k", k)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if k > atoms:
            raise ValueError(f"k is {k}, but a dictionary has {atoms} atoms: k can be {atoms} at most")
        if beginning < dictionaries * atoms:
            raise ValueError(
                f"{dictionaries} dictionaries of {atoms} prompts can't be drawn from {beginning:,} tokens: make the "
                f"beginning at least {dictionaries * atoms:,}"
            )
        self.beginning, self._k, self._shape = beginning, k, (dictionaries, atoms)
        drawn = torch.randperm(beginning, generator=torch.Generator().manual_seed(seed))[: dictionaries * atoms]
        self._drawn: Int64[Tensor, " mn"] = drawn.sort().values
        self._seed, self._seen = seed, 0
        self._prompts: list[list[Tensor]] = [[] for _ in range(layers)]
        self._sums: list[Tensor] = [torch.zeros(()) for _ in range(layers)]
        self._dictionaries: list[tuple[Tensor, Tensor]] = []
        self._grades: list[list[Tensor]] = [[] for _ in range(layers)]

    @torch.no_grad()
    def update(self, activations: Sequence[Float[Tensor, "t _"]]) -> None:
        """Add the activations of the next tokens, the same ones in every layer."""
        first, self._seen = self._seen, self._seen + len(activations[0])
        early = max(0, self.beginning - first)
        if early:
            here = self._drawn[(self._drawn >= first) & (self._drawn < self._seen)] - first
            for layer, x in enumerate(activations):
                self._prompts[layer].append(x[here].detach().float())
                self._sums[layer] = self._sums[layer] + x[:early].detach().double().sum(dim=0)
        if self._seen > self.beginning:
            self._dictionaries = self._dictionaries or self._made()
            for layer, (x, (mean, atoms)) in enumerate(zip(activations, self._dictionaries, strict=True)):
                self._grades[layer].append(_grade(x[early:].detach().float() - mean, atoms, self._k))

    def profiles(self, layers: Sequence[int]) -> Float64[Tensor, "l t"]:
        """The grades of the tokens in some layers: 0 where a token is fully explained, 1 where not at all.

        Raises:
            ValueError: the stream had too few tokens.
        """
        if not self._grades[0]:
            raise ValueError(
                f"the first {self.beginning:,} tokens give the prompts and the others are graded, but there were "
                f"{self._seen:,}: give more tokens, or a shorter beginning"
            )
        return torch.stack([torch.cat(self._grades[layer]).double() for layer in layers])

    def similarity(
        self, layers_a: Sequence[int], layers_b: Sequence[int], *, less_mean: bool = True
    ) -> Float64[Tensor, "la lb"]:
        """The correlation of profiles, over tokens, after each model's mean over these layers is taken off.

        A rare token is missed in every layer; taken off with the mean, it no longer hides what is special of a layer.
        With one layer of a model there is nothing to take off, and plain correlations are returned, as they are
        without `less_mean`.
        """
        of = self._special if less_mean else lambda layers: _standardised(self.profiles(layers))
        a, b = of(layers_a), of(layers_b)
        return a @ b.T / a.shape[1]

    def calibrate(
        self,
        layers_a: Sequence[int],
        layers_b: Sequence[int],
        *,
        permutations: int = 200,
        block: int = 128,
        seed: int = 0,
    ) -> Calibration:
        """The similarity against permutations of the stream (see `calibrate`).

        The tokens are all that there are, and neighbours have like grades: permuted one by one they would vary too
        little. So blocks of `block` tokens are permuted.
        """
        a, b = self._special(layers_a), self._special(layers_b)
        null = [a @ b[:, order].T / a.shape[1] for order in orders(a.shape[1], permutations, seed, block)]
        return against(a @ b.T / a.shape[1], torch.stack(null), largest=1.0)

    def _special(self, layers: Sequence[int]) -> Float64[Tensor, "l t"]:
        profiles = _standardised(self.profiles(layers))
        return _standardised(profiles - profiles.mean(dim=0)) if len(layers) > 1 else profiles

    def _made(self) -> list[tuple[Tensor, Tensor]]:
        mixed = torch.randperm(len(self._drawn), generator=torch.Generator().manual_seed(self._seed)).view(self._shape)
        made: list[tuple[Tensor, Tensor]] = []
        for layer, (prompts, total) in enumerate(zip(self._prompts, self._sums, strict=True)):
            mean = (total / self.beginning).float()
            centred = torch.cat(prompts) - mean
            if not bool((centred.norm(dim=1) > 1e-6 * mean.norm()).all()):
                raise ValueError(
                    f"layer {layer} is the same for every token, or some tokens are its very mean: choose another hook"
                )
            made.append((mean, normalize(centred, dim=1)[mixed]))
        self._prompts = [[] for _ in made]
        return made


def _grade(x: Float[Tensor, "t d"], dictionaries: Float[Tensor, "m n d"], k: int) -> Float[Tensor, " t"]:
    energy = x.square().sum(dim=1).clamp_min(1e-30)
    # A step of matching pursuit takes the square of its coefficient off the squared norm.
    explained = sum(matching_pursuit(x, atoms, k).values.square().sum(dim=1) for atoms in dictionaries)
    return (1 - explained / energy / len(dictionaries)).clamp(0, 1)


def _standardised(profiles: Float64[Tensor, "l t"]) -> Float64[Tensor, "l t"]:
    centred = profiles - profiles.mean(dim=1, keepdim=True)
    deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
    if not bool((deviation > 1e-12).all()):
        raise ValueError(
            "the grades of a layer are the same for every token, or those of the model's other layers: it is given "
            "twice, or its dictionaries miss nothing (take fewer atoms)"
        )
    return centred / deviation
