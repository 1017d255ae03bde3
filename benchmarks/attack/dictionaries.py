"""Dictionaries that are hard to pursue with: atoms that lean together, repeat, cancel, or span less than there is."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

KINDS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {}


def _kind(name: str) -> Callable[[Callable[[int, int, torch.Generator], Tensor]], None]:
    return lambda make: KINDS.__setitem__(name, make)


def _random(n: int, d: int, generator: torch.Generator) -> Tensor:
    return normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1)


def _around(centers: Tensor, cosine: float, generator: torch.Generator) -> Tensor:
    """Unit rows about unit centers, whose cosines with each other are as given."""
    apart = _random(*centers.shape, generator)
    apart = normalize(apart - (apart * centers).sum(-1, keepdim=True) * centers, dim=-1)
    return normalize(cosine**0.5 * centers + (1 - cosine) ** 0.5 * apart, dim=-1)


for cosine in (0.9, 0.98, 0.999, 0.9999):
    _kind(f"cone, cosine {cosine}")(lambda n, d, g, c=cosine: _around(_random(1, d, g).expand(n, d), c, g))
for spread in (1e-2, 1e-3):
    _kind(f"clusters, {spread:g} apart")(
        lambda n, d, g, s=spread: _around(_random(8, d, g).repeat(n // 8 + 1, 1)[:n], 1 - s**2, g)
    )
_kind("random")(_random)
_kind("antipodal pairs")(lambda n, d, g: torch.cat([a := _random(n // 2, d, g), -a]))
_kind("every atom twice")(lambda n, d, g: _random(n // 2, d, g).repeat(2, 1))
_kind("a third of the dimensions")(lambda n, d, g: normalize(_random(n, d // 3, g) @ _random(d // 3, d, g), dim=-1))
_kind("norms within 1.7 %")(
    lambda n, d, g: _random(n, d, g) * (1 + 0.034 * (torch.rand(n, 1, generator=g, dtype=torch.float64) - 0.5))
)
_kind("cone, norms within 1.7 %")(
    lambda n, d, g: (
        KINDS["cone, cosine 0.98"](n, d, g) * (1 + 0.034 * (torch.rand(n, 1, generator=g, dtype=torch.float64) - 0.5))
    )
)


def activations(atoms: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Of each: anything, a few atoms with some noise, and the direction that most atoms share."""
    anything = torch.randn(rows, atoms.shape[1], generator=generator, dtype=torch.float64)
    weights = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    few = torch.einsum("br,brd->bd", weights, atoms[torch.randint(len(atoms), (rows, 5), generator=generator)])
    shared = atoms.mean(dim=0) * atoms.shape[1] ** 0.5 + 0.3 * anything
    return torch.stack([anything, few + 0.05 * anything, shared])[torch.arange(rows) % 3, torch.arange(rows)]


def real(n: int, rows: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Activations of the embedded model, and atoms of its own: as they are and centered, whole and of one head."""
    from itda_lens import embedded

    model = embedded.model()
    texts = embedded.dataset("train")["text"][:64]
    tokens = torch.cat([model.to_tokens(text)[0] for text in texts])[: 16 * 64].view(16, 64)
    for hook, head in (("blocks.3.hook_resid_post", None), ("blocks.3.attn.hook_z", 1)):
        _, cache = model.run_with_cache(tokens, names_filter=hook)
        x = cache[hook][:, 1:]
        x = (x if head is None else x[..., head, :]).flatten(0, 1).double()
        for centered in (False, True):
            points = x - x.mean(dim=0) * centered
            order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
            name = f"real, {hook.split('.')[-1]}{', centered' * centered}"
            yield name, normalize(points[order[:n]], dim=-1), points[order[n : n + rows]]
