"""The command `itda-lens`. Each sub-command is a dataclass, whose fields are its options."""

import importlib.util
import re
import sys
import time
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
import transformers
from datasets import Dataset
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from sae_lens import SAE
from simple_parsing import ArgumentParser, DashVariant

from itda_lens import embedded
from itda_lens.building import BuildConfig, build
from itda_lens.evals import evaluate, random_activations, random_directions
from itda_lens.interpret import Explanation, diff, explain
from itda_lens.sae import ITDA
from itda_lens.similarity import MatchingConfig, match_dictionaries, match_layers
from itda_lens.streams import HookedModel, load_model

_EMBEDDED_MODEL = re.compile(r"(?:embedded(?::|$)|itda-embedded-seed)(\d*)$")
_PROMPT_WIDTH = 56
_NAME_WIDTH = 40


class Command(Protocol):
    def run(self, console: Console) -> None: ...


@dataclass
class Quickstart:
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

    def run(self, console: Console) -> None:
        model, train, heldout = _model("embedded"), embedded.dataset("train"), embedded.dataset("heldout")
        console.print(
            f"[b]1. Build[/b]  {self.n_atoms} atoms, L0 = {self.k}, at {self.hook} of the embedded model (d = "
            f"{model.cfg.d_model}),\n   from {self.tokens:,} tokens of Python's own documentation"
        )
        started = time.perf_counter()
        config = BuildConfig(k=self.k, n_atoms=self.n_atoms, tokens=self.tokens)
        itda = build(model, train, self.hook, config)[self.hook]
        console.print(f"   built in {time.perf_counter() - started:.1f} s on {torch.get_num_threads()} CPU threads\n")
        itda.save_model(self.out)

        console.print("[b]2. Evaluate[/b]  SAELens's run_evals on held-out text, beside two baselines of the same size")
        candidates: dict[str, SAE] = {
            "ITDA": itda,
            "random activations": random_activations(itda, model, train),
            "random directions": random_directions(itda),
        }
        console.print(_metrics_table(evaluate(candidates, model, heldout)), "")

        console.print(
            "[b]3. Explain[/b]  what the activations of a prompt are made of; each atom is a «token» of a prompt"
        )
        prompt = self.prompt or " ".join(heldout[0]["text"].split(" ")[:16])
        console.print(f"   the last three tokens of the held-out prompt: {escape(_visible(prompt))}")
        for explanation in explain(itda, model, prompt, [-3, -2, -1], n_terms=4):
            console.print(_explanation_table(explanation))
        console.print(f"\n[b]4. Use it[/b]  saved to {self.out}; these lines load it and hook it into the model:\n")
        console.print(escape(usage_lines(self.out)), highlight=False)


def usage_lines(folder: Path) -> str:
    """The Python that loads the quickstart's ITDA and runs the model with it."""
    return f"""\
import itda_lens                       # registers the architecture with SAELens
from sae_lens import SAE

model = itda_lens.embedded.model()     # any HookedSAETransformer
itda = SAE.load_from_disk("{folder}")
tokens = model.to_tokens("Return the number of items")
logits = model.run_with_saes(tokens, saes=[itda])
_, cache = model.run_with_cache_with_saes(tokens, saes=[itda])
acts = cache[itda.cfg.metadata.hook_name + ".hook_sae_acts_post"]
atom = int(acts[0, -1].abs().argmax())
print(repr(itda.provenance.text(atom)))"""


@dataclass(kw_only=True)
class Build(BuildConfig):
    """Build one ITDA for each hook point and write SAELens folders."""

    model: str
    """A TransformerLens model name, a local Hugging Face folder, or embedded (embedded:1, embedded:2)."""
    dataset: str
    """A dataset name, a text, JSON or Parquet file, a saved dataset, or embedded (embedded:heldout)."""
    hooks: list[str]
    """One or more hook points, such as blocks.4.hook_resid_post."""
    out: Path
    """The folder that gets one folder for each hook point."""
    overwrite: bool = False
    """Replace what is in the way."""

    def run(self, console: Console) -> None:
        taken = [folder for folder in map(self._folder, self.hooks) if (folder / "cfg.json").exists()]
        if taken and not self.overwrite:
            raise ValueError(f"{taken[0]} holds an SAE already: name another --out, or pass --overwrite")
        model = _model(self.model)
        config = BuildConfig(**{f.name: getattr(self, f.name) for f in fields(BuildConfig)})
        config.dataset_name = config.dataset_name or self.dataset
        try:
            itdas = build(model, _dataset(self.dataset), self.hooks, config)
        except BaseException as e:
            for hook, itda in getattr(e, "itdas", {}).items():
                folder = self.out / f"{hook}.partial"
                itda.save_model(folder)
                console.print(f"[red]the build ended early; its {itda.cfg.d_sae} atoms at {hook} are in {folder}[/red]")
            raise
        for hook, itda in itdas.items():
            itda.save_model(self._folder(hook))
            console.print(f"{itda.cfg.d_sae} atoms at {hook}: {self._folder(hook)}")

    def _folder(self, hook: str) -> Path:
        return self.out / hook


@dataclass(kw_only=True)
class Eval:
    """Evaluate saved SAEs, ITDAs or others, side by side with SAELens's run_evals."""

    saes: list[Path]
    """Folders of saved SAEs."""
    dataset: str
    """Held-out text: as for build."""
    model: str | None = None
    """As for build; the one that the first SAE names if not given."""
    column: str | None = None
    """The dataset's column with the text, when it is not called text."""
    built_on: str | None = None
    """The dataset that the first one was built on: then random activations and directions are evaluated too."""
    n_batches: int = 8
    """Batches of tokens."""
    batch_size: int = 16
    """Rows in a batch."""
    csv: Path | None = None
    """Write the table to this file too."""

    def run(self, console: Console) -> None:
        saes = {str(folder): _load(folder) for folder in self.saes}
        first = next(iter(saes.values()))
        model = _model_of(first, self.model, "--model")
        if self.built_on is not None:
            if not isinstance(first, ITDA):
                raise ValueError(f"{self.saes[0]} is no ITDA, so it was built on no stream: leave out --built-on")
            saes["random activations"] = random_activations(first, model, _dataset(self.built_on))
            saes["random directions"] = random_directions(first)
        table = evaluate(
            saes,
            model,
            _dataset(self.dataset),
            column=self.column,
            n_batches=self.n_batches,
            batch_size=self.batch_size,
        )
        console.print(_metrics_table(table))
        if self.csv is not None:
            table.to_csv(self.csv)


@dataclass(kw_only=True)
class Explain:
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

    def run(self, console: Console) -> None:
        itda = _itda(self.itda)
        model = _model_of(itda, self.model, "--model")
        for explanation in explain(itda, model, self.prompt, self.positions, self.n_terms):
            console.print(_explanation_table(explanation))


@dataclass(kw_only=True)
class Diff:
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
    column: str | None = None
    """The dataset's column with the text, when it is not called text."""
    tokens: int = 20_000
    """How many tokens of the probe are looked at."""
    rows: int = 15
    """How many prompts, and how many latents, are printed."""
    out: Path | None = None
    """Write the whole tables to this folder, as CSV."""

    def run(self, console: Console) -> None:
        itda = _itda(self.itda)
        native, second = (None if folder is None else _itda(folder) for folder in (self.native, self.second))
        base, tuned = _model_of(itda, self.base, "--base"), _model(self.tuned)
        found = diff(
            base,
            tuned,
            itda,
            _dataset(self.dataset),
            native=native,
            second=second,
            tokens=self.tokens,
            column=self.column,
        )
        console.print(f"[b]Prompts[/b]  that changed most, of {len(found.prompts)}; q < 0.05 stands out from the bulk")
        console.print(_ranked_table(found.prompts.head(self.rows), "row", ["n_tokens", "shift", "z", "q"]))
        console.print("[b]Latents[/b]  that the other model uses more often")
        console.print(_ranked_table(found.latents.head(self.rows), "latent", ["base_use", "tuned_use", "z"]))
        if native is not None:
            console.print("[b]Atoms[/b]  that only one of the two dictionaries has")
            console.print(_ranked_table(found.atoms.head(self.rows), "", ["model", "atom", "shift", "need"]))
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            for name, table in found._asdict().items():
                if len(table):
                    table.to_csv(self.out / f"{name}.csv")


@dataclass(kw_only=True)
class Compare(MatchingConfig):
    """Compare models layer by layer, by every measure; or saved dictionaries, by their atoms."""

    models: list[str] = field(default_factory=list)
    """Two or more, as for build, that differ by seed: each layer is matched with those of the others."""
    dataset: str | None = None
    """As for build: what the models read."""
    hooks: list[str] = field(default_factory=list)
    """Hook points that all models have; the residual stream after each layer if not given."""
    builds: list[Path] = field(default_factory=list)
    """In place of models: two or more folders that build has written on the same text."""
    csv: Path | None = None
    """Write the similarity of every pair of layers to this file too."""
    plot: Path | None = None
    """Write heatmaps to this image file (needs matplotlib)."""

    def run(self, console: Console) -> None:
        if bool(self.models) == bool(self.builds):
            raise ValueError("pass --models with --dataset, or --builds")
        if self.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install matplotlib")
        if self.builds:
            found = match_dictionaries({str(folder): _load_build(folder) for folder in self.builds})
        else:
            if self.dataset is None:
                raise ValueError("--models needs --dataset, the text that they read")
            config = MatchingConfig(**{f.name: getattr(self, f.name) for f in fields(MatchingConfig)})
            models = {name: _model(name) for name in self.models}
            found = match_layers(models, _dataset(self.dataset), self.hooks or None, config)
        console.print(_metrics_table(found.table()), *found.notes)
        if self.csv is not None:
            found.cells().to_csv(self.csv, index=False)
        if self.plot is not None:
            found.plot().savefig(self.plot, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input ends with its message and exit status 2."""
    parser = ArgumentParser(prog="itda-lens", description="Dictionaries of real activations for SAELens.")
    commands = parser.add_subparsers(dest="command", required=True)
    kinds: list[type] = [Quickstart, Build, Eval, Explain, Compare, Diff]
    for kind in kinds:
        summary = (kind.__doc__ or "").split(".")[0]
        dashes: dict[str, Any] = {"add_option_string_dash_variants": DashVariant.DASH}
        commands.add_parser(kind.__name__.lower(), help=summary, **dashes).add_arguments(kind, dest="run")
    command: Command = parser.parse_args(arguments).run
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Dataset is not tokenized")
    try:
        command.run(Console(width=None if sys.stdout.isatty() else 120))
    except (ValueError, RuntimeError, OSError) as e:
        Console(stderr=True, soft_wrap=True).print(f"[red]itda-lens: error:[/red] {escape(str(e))}")
        sys.exit(2)


def _model_of(sae: SAE, given: str | None, option: str) -> HookedModel:
    """The model that an SAE belongs to, unless another is given."""
    if given is not None:
        return _model(given)
    name = sae.cfg.metadata.model_name
    if name is None:
        raise ValueError(f"the SAE does not say which model it belongs to: pass {option}")
    try:
        return _model(name)
    except ValueError as e:
        raise ValueError(f"the SAE belongs to {name!r}, which can't be loaded by that name: pass {option}. {e}") from e


def _model(name: str) -> HookedModel:
    found = _EMBEDDED_MODEL.match(name)
    return embedded.model(int(found[1] or 0)) if found else load_model(name)


def _dataset(name: str) -> Dataset | str:
    if name == "embedded" or name.startswith("embedded:"):
        return embedded.dataset(name.partition(":")[2] or "train")  # type: ignore[arg-type]
    return name


def _load(folder: Path) -> SAE:
    if not (folder / "cfg.json").is_file():
        raise ValueError(f"{folder} holds no SAE: there is no cfg.json")
    try:
        return SAE.load_from_disk(folder)
    except Exception as e:  # SAELens, safetensors and JSON each have kinds of their own
        raise ValueError(f"{folder} can't be loaded ({type(e).__name__}): {e}") from e


def _itda(folder: Path) -> ITDA:
    itda = _load(folder)
    if not isinstance(itda, ITDA):
        raise ValueError(f"{folder} holds a {itda.cfg.architecture()!r} SAE, whose latents come from no prompt")
    return itda


def _load_build(folder: Path) -> dict[str, ITDA]:
    itdas = {path.parent.name: _load(path.parent) for path in sorted(folder.glob("*/cfg.json"))}
    if not itdas or not all(isinstance(itda, ITDA) for itda in itdas.values()):
        raise ValueError(f"{folder} holds no folders of ITDAs, as itda-lens build --out writes them")
    return {hook: itda for hook, itda in itdas.items() if isinstance(itda, ITDA)}


def _metrics_table(metrics: pd.DataFrame) -> Table:
    table = Table(Column("", no_wrap=True), *(column.replace("_", " ") for column in metrics.columns))
    for name, row in metrics.astype(object).iterrows():
        table.add_row(str(name)[-_NAME_WIDTH:], *map(_number, row))
    return table


def _number(value: float | int) -> str:
    if pd.isna(value):
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3f}"


def _ranked_table(rows: pd.DataFrame, index: str, columns: list[str]) -> Table:
    table = Table(index, *columns, Column("text", no_wrap=True), box=SIMPLE_HEAD)
    for name, row in rows.iterrows():
        values = (f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns)
        table.add_row(str(name), *values, escape(_visible(str(row["text"]))[-_PROMPT_WIDTH:]))
    return table


def _explanation_table(explanation: Explanation) -> Table:
    token, error = escape(_visible(explanation.token)), explanation.relative_error
    title = f"«{token}» at position {explanation.position}, {error:.0%} of its squared norm unexplained"
    table = Table("coefficient", "atom", "its prompt", title=title, title_justify="left", box=SIMPLE_HEAD)
    for term in explanation.terms:
        before, token = _visible(term.before)[-_PROMPT_WIDTH:], _visible(term.token)
        table.add_row(f"{term.coefficient:+11.2f}", str(term.atom), f"{escape(before)}[b]«{escape(token)}»[/b]")
    return table


def _visible(text: str) -> str:
    return re.sub(r" {2,}", " ", text.replace("\n", "↵"))


if __name__ == "__main__":
    main()
