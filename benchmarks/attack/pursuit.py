"""Pursuit over hard dictionaries, in every path and dtype, against a float64 reference that shares no code with it.

A row gets through when it leaves more than the reference by 1e-3 of its norm (1e-2 where the atoms have 16 bits), or
more than it left with fewer steps. Where two atoms tie the paths may differ, so what counts is what is left.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from math import ceil

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from benchmarks.attack.dictionaries import KINDS, activations, real
from itda_lens import ITDA, SparseCodes, matching_pursuit
from itda_lens.pursuit import GramRows, gram_matrix

SHAPES = ((24, 96, 32), (64, 256, 68))
"""Width, atoms, and steps: more than there are dimensions."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SETTINGS = ({"orthogonal": True}, {"orthogonal": True, "nonnegative": True}, {}, {"nonnegative": True})
ROWS = 7
LIMIT = {torch.bfloat16: 1e-2, torch.float16: 1e-2}
RISE = 1e-5
"""Of a row's norm: codes in float32 are rounded."""
Solve = Callable[[Tensor, Tensor, int, dict], SparseCodes]


def _hooked(x: Tensor, atoms: Tensor, k: int, settings: dict) -> SparseCodes:
    itda = ITDA.from_atoms(atoms, min(k, len(atoms)), **settings)
    itda.hook_sae_acts_pre.add_hook(lambda correlations, hook: None)  # as run_with_cache has it
    dense = itda.encode(x)
    return SparseCodes(dense, torch.arange(len(atoms)).expand(dense.shape))


PATHS: dict[str, Solve] = {
    "Gram matrix": lambda x, atoms, k, s: matching_pursuit(x, atoms, k, gram=gram_matrix(atoms), **s),
    "Gram rows on demand": lambda x, atoms, k, s: matching_pursuit(x, atoms, k, gram=GramRows(atoms), **s),
    "ITDA": lambda x, atoms, k, s: ITDA.from_atoms(atoms, min(k, len(atoms)), **s).encode_sparse(x),
    "ITDA with a hook": _hooked,
}


def run(scale: float, seed: int) -> list[dict]:
    """For each path and dtype how many rows were tried, how many got through, and the worst of each."""
    torch.set_num_threads(1)  # many small products
    rows = max(1, ceil(ROWS * scale))
    found: dict[tuple[str, str, bool], list[Tensor]] = defaultdict(list)
    for name, atoms, x, k in _problems(rows, seed, scale):
        for dtype in DTYPES:
            for settings in SETTINGS:
                own, points = atoms.to(dtype), x.to(dtype)
                expected = reference(points.double().numpy(), own.double().numpy(), k, dtype=dtype, **settings)
                for path, solve in PATHS.items():
                    if path.startswith("ITDA") and "norms" in name and dtype not in LIMIT:
                        continue  # an ITDA brings these atoms back to unit length
                    if path == "ITDA with a hook" and dtype in LIMIT:
                        continue  # its codes come in the dtype of the atoms alone
                    left = _left(points, own, k, settings, solve)
                    over = torch.stack([left[steps] - expected[steps] for steps in left])
                    rise = torch.stack(list(left.values())).diff(dim=0)
                    key = path, str(dtype).removeprefix("torch."), "orthogonal" in settings
                    found[key].append(torch.stack([over.amax(dim=0), rise.amax(dim=0)]))
    return [_summary(key, torch.cat(parts, dim=1)) for key, parts in found.items()]


def _problems(rows: int, seed: int, scale: float) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    shapes = SHAPES if scale >= 0.1 else SHAPES[:1]
    for d, n, k in shapes:
        for i, (name, make) in enumerate(KINDS.items()):
            generator = torch.Generator().manual_seed(1000 * seed + i)
            atoms = make(n, d, generator)
            yield name, atoms, activations(atoms, rows, generator), k
    for name, atoms, x in real(96, rows):
        yield name, atoms, x, 40


def _left(x: Tensor, atoms: Tensor, k: int, settings: dict, solve: Solve) -> dict[int, Tensor]:
    """After some numbers of steps, the share of each row's norm that is left."""
    steps = sorted({min(2**i, k) for i in range(8)} | {k - 1, k - 2, x.shape[1], x.shape[1] - 1})
    wide, rows = atoms.double(), x.double()
    found = {s: rows - solve(x, atoms, s, settings).decode(wide).detach() for s in steps if s <= k}
    return {s: residual.norm(dim=-1) / rows.norm(dim=-1) for s, residual in found.items()}


def reference(
    x: np.ndarray, atoms: np.ndarray, k: int, *, dtype: torch.dtype, orthogonal: bool = False, nonnegative: bool = False
) -> dict[int, Tensor]:
    """The share of each norm that is left after each number of steps, by the textbook in float64.

    An atom is passed over when so little of it lies outside the span of the chosen ones that its code, written in the
    dtype that codes have, would hold fewer than four digits of what it explains.
    """
    dependent = 256 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    left = np.empty((k + 1, len(x)))
    for i, row in enumerate(x):
        left[:, i] = _path(row, atoms, k, dependent, orthogonal, nonnegative) / np.linalg.norm(row)
    return dict(enumerate(torch.from_numpy(left)))


def _path(
    x: np.ndarray, atoms: np.ndarray, k: int, dependent: float, orthogonal: bool, nonnegative: bool
) -> np.ndarray:
    residual, chosen, open_ = x, [], np.ones(len(atoms), bool)
    left = np.full(k + 1, np.linalg.norm(x))
    step = 0
    while step < k and open_.any():
        products = np.where(open_, atoms @ residual, 0)
        j = int(np.argmax(products if nonnegative else np.abs(products)))
        if (products[j] if nonnegative else abs(products[j])) <= 1e-14 * np.linalg.norm(x):
            break
        if not orthogonal:
            residual = residual - products[j] / (atoms[j] @ atoms[j]) * atoms[j]
        else:
            open_[j] = False
            q, r = np.linalg.qr(atoms[[*chosen, j]].T)
            if len(chosen) >= len(x) or abs(r[-1, -1]) <= dependent * np.linalg.norm(atoms[j]):
                continue
            chosen.append(j)
            if nonnegative:
                codes, _ = nnls(atoms[chosen].T, x)
                residual = x - codes @ atoms[chosen]
            else:
                residual = x - q @ (q.T @ x)
        step += 1
        left[step:] = np.linalg.norm(residual)
    return left


def _summary(key: tuple[str, str, bool], figures: Tensor) -> dict:
    path, dtype, orthogonal = key
    over, rise = figures.nan_to_num(nan=torch.inf)
    limit = LIMIT.get(getattr(torch, dtype), 1e-3)
    return {
        "pursuit": "orthogonal" if orthogonal else "plain",
        "path": path,
        "dtype": dtype,
        "rows": len(over),
        "above the reference": int((over > limit).sum()),
        "worst": f"{over.max():.1e}",
        "above the step before": int((rise > RISE).sum()),
        "worst rise": f"{rise.max():.1e}",
    }
