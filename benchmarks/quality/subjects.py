"""The models that dictionaries are compared on, with the text that each is built, chosen and scored on."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer
from torch import Tensor

from itda_lens.streams import hooked_model_from_folder, special_token_ids, token_batches
from itda_lens.streams.activations import forward

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
CACHE = ROOT / "benchmarks" / "cache" / "quality"
CONTEXT = 128
BATCH = 32
VALIDATION_ROWS = HELDOUT_ROWS = 160
"""About 20,000 tokens to choose settings by, and as many for a model with a wide vocabulary to be scored on."""


@dataclass(eq=False)
class Subject:
    """A frozen model and its text, as rows of tokens `[rows, context]`, each beginning with BOS."""

    name: str
    model: HookedSAETransformer
    hooks: tuple[str, ...]
    train: Tensor
    validation: Tensor
    """The end of the training text, which nothing is trained on: settings are chosen by it."""
    heldout: Tensor
    special: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.special = torch.tensor(special_token_ids(self.model))

    def mask(self, rows: Tensor) -> Tensor:
        """True at the tokens that are replaced and scored: all but BOS and its like."""
        return ~torch.isin(rows, self.special)

    @property
    def distinct_tokens(self) -> int:
        """Training tokens without the special ones; draws beyond these are repeats."""
        return int(self.mask(self.train).sum())

    def activations(self, hook: str, rows: Tensor) -> Tensor:
        """`[tokens, d]` of the tokens that the mask leaves, in order."""
        parts = [forward(self.model, part, {hook: hook})[hook][self.mask(part)] for part in rows.split(BATCH)]
        return torch.cat(parts)


ZOO = ("seed21", "seed49", "seed81")
PRETRAINED = {
    "tinystories-instruct-3m-chat-q4": "blocks.4.hook_resid_post",
    "tinystories-char-a": "blocks.2.hook_resid_post",
    "stories260k-a": "blocks.2.hook_resid_post",
}
NAMES = (*ZOO, *PRETRAINED)
LAYERS = (2, 4, 6)


@lru_cache(maxsize=1)
def subject(name: str) -> Subject:
    """A subject by name, one of `NAMES`. Raises FileNotFoundError where the folder `../shared` lacks it."""
    zoo = name in ZOO
    model = hooked_model_from_folder(_existing(SHARED / ("zoo" if zoo else "models") / name))
    if zoo:  # trained on running text, with BOS at the beginning of a row alone
        train, heldout = ([_text(f"wikitext2_{part}")] for part in ("train_part", "heldout"))
    else:
        stories = [story.strip() for story in _text("tinystories_1000").split("\n\n\n") if story.strip()]
        cut = len(stories) * 7 // 8
        train, heldout = stories[:cut], stories[cut:]
    rows = _packed(model, train)
    return Subject(
        name,
        model,
        hooks=tuple(f"blocks.{layer}.hook_resid_post" for layer in LAYERS) if zoo else (PRETRAINED[name],),
        train=rows[:-VALIDATION_ROWS],
        validation=rows[-VALIDATION_ROWS:],
        heldout=_packed(model, heldout)[: HELDOUT_ROWS if model.cfg.d_vocab > 4096 else 2 * HELDOUT_ROWS],
    )


def _packed(model: HookedSAETransformer, documents: list[str]) -> Tensor:
    batches = token_batches(model, Dataset.from_dict({"text": documents}), context_size=CONTEXT, batch_size=512)
    return torch.cat([tokens for tokens, _ in batches])


def _text(name: str) -> str:
    return _existing(SHARED / "text" / f"{name}.txt").read_text(encoding="utf8")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: this benchmark needs the folder {SHARED}")
    return path
