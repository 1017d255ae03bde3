"""What each sub-command takes: its fields are the options, and their docs the help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from itda_lens.settings import BuildConfig, MatchingConfig


@dataclass(kw_only=True)
class ModelOptions:
    """How models are run."""

    device: str = "cpu"
    """Where models and dictionaries go: cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision of the model's weights."""


@dataclass(kw_only=True)
class TextOptions:
    """Which text of a dataset is read."""

    split: str = "train"
    """The split, where the dataset has several."""
    config: str | None = None
    """The configuration of a dataset that has several."""
    revision: str | None = None
    """The revision of a dataset on the hub."""


@dataclass(kw_only=True)
class ColumnOption:
    """Where the text is."""

    column: str | None = None
    """The dataset's column with the text, when it is not called text."""


@dataclass(kw_only=True)
class Quickstart(ModelOptions):
    """Build an ITDA on the embedded model, evaluate it, look at what its atoms mean, and save it. Needs no network."""

    out: Path = Path("itda-quickstart")
    """The folder for the SAELens files."""
    hook: str = "blocks.3.hook_resid_post"
    """The hook point."""
    k: int = 8
    """L0: atoms for each activation."""
    n_atoms: int = 1024
    """Atoms wanted."""
    tokens: int = 60_000
    """Budget: how many tokens are judged."""
    prompt: str | None = None
    """The prompt to decompose; the beginning of a held-out document if not given."""
    overwrite: bool = False
    """Replace what is in the folder, also if it is not an earlier quickstart's."""


@dataclass(kw_only=True)
class Build(TextOptions, ModelOptions, BuildConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Build one ITDA for each hook point and write SAELens folders."""

    model: str
    """A TransformerLens model name, a local Hugging Face folder, or embedded (embedded:1, embedded:2)."""
    dataset: str
    """A dataset name, a text, JSON or Parquet file, a saved dataset, or embedded (embedded:heldout)."""
    hooks: list[str]
    """Hook points: blocks.4.hook_resid_post, blocks.*.hook_mlp_out, blocks.0-5.hook_resid_post, or a layer's number."""
    out: Path
    """The folder that gets one folder for each hook point."""
    overwrite: bool = False
    """Replace ITDAs, also partial ones; without it nothing is written to a folder that holds any files."""


@dataclass(kw_only=True)
class Eval(ColumnOption, TextOptions, ModelOptions):
    """Evaluate saved SAEs, ITDAs or others, side by side on the same tokens."""

    saes: list[Path]
    """Folders of saved SAEs."""
    dataset: str
    """Held-out text: as for build."""
    model: str | None = None
    """As for build; the one that the first SAE names if not given."""
    built_on: str | None = None
    """The dataset that the first one was built on: then random activations and directions are evaluated too."""
    n_batches: int = 8
    """Batches of tokens."""
    batch_size: int = 16
    """Rows in a batch."""
    csv: Path | None = None
    """Write the table to this file too, after each batch."""


@dataclass(kw_only=True)
class Explain(ModelOptions):
    """Decompose the activations of a prompt into atoms, and show the prompts that those come from."""

    itda: Path
    """The folder of a saved ITDA."""
    prompt: str
    """Any text."""
    model: str | None = None
    """As for build; the one that the ITDA names if not given."""
    positions: list[int] = field(default_factory=lambda: [-1])
    """Which tokens of the prompt, negative from the end."""
    n_terms: int = 5
    """How many atoms to name for each token."""


@dataclass(kw_only=True)
class Diff(ColumnOption, TextOptions, ModelOptions):
    """Compare two models by means of a dictionary of the first: which prompts, and which atoms, changed most."""

    itda: Path
    """The folder of an ITDA of the base model."""
    tuned: str
    """The other model: as for build."""
    dataset: str
    """The probe, documents that nothing was built on: as for build."""
    base: str | None = None
    """The base model; the one that the ITDA names if not given."""
    native: Path | None = None
    """The folder of an ITDA of the other model, at the same hook point."""
    second: Path | None = None
    """The folder of another ITDA of the base model, for what is chance in what native shows."""
    tokens: int = 20_000
    """How many tokens of the probe are looked at."""
    rows: int = 15
    """How many prompts, and how many latents, are printed."""
    out: Path | None = None
    """Write the whole tables to this folder, as CSV."""


@dataclass(kw_only=True)
class Compare(TextOptions, ModelOptions, MatchingConfig):
    """Compare models layer by layer, by every measure; or saved dictionaries, by their atoms."""

    models: list[str] = field(default_factory=list)
    """Two or more, as for build, that differ by seed: each layer is matched with those of the others."""
    dataset: str | None = None
    """As for build: what the models read."""
    hooks: list[str] = field(default_factory=list)
    """Hook points that all models have, as for build; the residual stream after each layer if not given."""
    builds: list[Path] = field(default_factory=list)
    """In place of models: two or more folders that build has written on the same text."""
    csv: Path | None = None
    """Write the similarity of every pair of layers to this file too."""
    plot: Path | None = None
    """Write heatmaps to this image file (needs matplotlib)."""


COMMANDS = {kind.__name__.lower(): kind for kind in (Quickstart, Build, Eval, Explain, Compare, Diff)}
