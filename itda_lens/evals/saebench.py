"""SAEBench in one call, for ITDAs and any other SAE of SAELens side by side (arXiv 2503.09532)."""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jaxtyping
import pandas as pd
import torch
from sae_lens import SAE

from itda_lens.sae import ITDA
from itda_lens.streams.models import check_model, check_model_name, is_bridge, listed, load_model, official_name


@dataclass(frozen=True)
class _Eval:
    """One eval of SAEBench."""

    module: str
    config: str | None = None
    """The class of its configuration; `core` takes arguments instead."""
    signed: bool = True
    """Whether it takes signed codes fairly. Where it does not, an ITDA comes as its non-negative view."""
    seeded: bool = True
    own: Mapping[str, Any] = field(default_factory=dict)
    """The settings that it starts from."""

    def load(self) -> Any:
        return importlib.import_module(f"sae_bench.evals.{self.module}.main")

    def settings(self) -> set[str]:
        """The names that it can be set by."""
        module = self.load()
        if self.config is None:
            return set(inspect.signature(module.multiple_evals).parameters) - {"selected_saes", "output_folder"}
        return {f.name for f in dataclasses.fields(getattr(module, self.config))}


# What SAEBench's own run of all evals asks of core.
_CORE = {
    "n_eval_reconstruction_batches": 200,
    "n_eval_sparsity_variance_batches": 2000,
    "compute_featurewise_density_statistics": True,
    "compute_featurewise_weight_based_metrics": True,
    "exclude_special_tokens_from_reconstruction": True,
}
_EVALS = {
    "core": _Eval("core", seeded=False, own=_CORE),
    "sae_probes": _Eval("sparse_probing_sae_probes", "SparseProbingSaeProbesEvalConfig"),
    "sparse_probing": _Eval("sparse_probing", "SparseProbingEvalConfig"),
    "meta_structure": _Eval("meta_structure", "MetaStructureEvalConfig"),
    "scr": _Eval("scr_and_tpp", "ScrAndTppEvalConfig", own={"perform_scr": True}),
    "tpp": _Eval("scr_and_tpp", "ScrAndTppEvalConfig", own={"perform_scr": False}, signed=False),
    "absorption": _Eval("absorption", "AbsorptionEvalConfig", signed=False),
    "autointerp": _Eval("autointerp", "AutoInterpEvalConfig", signed=False),
    "unlearning": _Eval("unlearning", "UnlearningEvalConfig", signed=False),
    "ravel": _Eval("ravel", "RAVELEvalConfig"),
}


def saebench(
    saes: SAE[Any] | Mapping[str, SAE[Any]],
    evals: Sequence[str] = ("core", "sae_probes"),
    *,
    output: str | Path = "eval_results",
    model: str | Path | None = None,
    seeds: Sequence[int] = (42, 43, 44),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    device: str | None = None,
    dtype: str = "float32",
    artifacts: str | Path | None = None,
) -> pd.DataFrame:
    """Run evals of SAEBench. Where one tests `> 0`, an ITDA comes as its non-negative view.

    SAEBench comes with `itda-lens[saebench]`, which wants an environment of its own: it needs older versions of numpy
    and datasets. By default it runs what the field trusts: `core`, and `sae_probes` with several seeds; `scr` and `tpp`
    come with a warning (arXiv 2605.18229). Two figures of `core`, `l1` and the densities, take only positive codes
    for active; `evaluate` counts all.

    Besides SAEs, evals need: `core` text (openwebtext from the hub, if its setting `dataset` names nothing else);
    `sae_probes` and `meta_structure` nothing; `sparse_probing`, `scr` and `tpp` data sets from the hub; `absorption` a
    model that can spell (2B parameters or more); `autointerp` text from the hub and `OPENAI_API_KEY`; `unlearning` an
    instruction-tuned model, and a corpus for which one must ask its authors; `ravel` gemma-2-2b or pythia-160m-deduped.

    Args:
        saes: an ITDA or any other SAE of SAELens, or several by name.
        evals: which to run.
        output: SAEBench's own JSON files come to lie here, by eval and seed. What is there already for the same
            weights and settings is not run again.
        model: a local Hugging Face folder or a TransformerLens name, if the SAEs' metadata do not name what can be
            loaded. SAEBench itself loads it, as a `HookedTransformer`.
        seeds: the `random_seed` of each run. `core` has none and runs once.
        settings: by eval, what its configuration in SAEBench shall hold, such as
            `{"sae_probes": {"dataset_names": ["119_us_state_TX"]}, "core": {"dataset": "folder/with/text"}}`.
        batch_size: rows in a forward pass.
        device: where models and SAEs run; each SAE's own if not given.
        dtype: of models and SAEs.
        artifacts: a folder that keeps the model's activations for later calls; a temporary one if not given.

    Returns:
        One number a row, with the columns `sae`, `eval`, `seed`, `metric` and `value`.

    Raises:
        ImportError: SAEBench is not installed.
        ValueError: an eval, setting or model that is not known, a model that an SAE was not built on or that a
            `HookedTransformer` does not compute right, or metadata or a key that is missing; before any work.
        RuntimeError: an eval has ended without a result.
    """
    named = saes if isinstance(saes, Mapping) else {saes.cfg.architecture(): saes}
    settings = settings or {}
    _check(named, evals, model, seeds, settings)
    _check_models(named, model, dtype)
    rows = []
    with contextlib.ExitStack() as stack:
        workplace = Path(artifacts or stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        for name in evals:
            for label, sae in named.items():
                for seed in seeds if _EVALS[name].seeded else [None]:
                    run = _Run(name, seed, settings.get(name, {}), batch_size, device or str(sae.device), dtype)
                    metrics = run.metrics(label, sae, model, Path(output).resolve(), workplace)
                    rows += [(label, name, seed, metric, value) for metric, value in metrics.items()]
    table = pd.DataFrame(rows, columns=["sae", "eval", "seed", "metric", "value"])
    return table.astype({"seed": "Int64"})


@dataclass(frozen=True)
class _Run:
    """One eval with one seed."""

    name: str
    seed: int | None
    settings: Mapping[str, Any]
    batch_size: int
    device: str
    dtype: str

    def metrics(
        self, label: str, sae: SAE[Any], model: str | Path | None, output: Path, workplace: Path
    ) -> dict[str, float]:
        """What SAEBench's file of this run says, which is written now if it is not there."""
        signed = _EVALS[self.name].signed
        # A copy, because SAEBench casts what it is given and writes to its configuration.
        sae = sae.nonnegative_view() if isinstance(sae, ITDA) and not signed else copy.deepcopy(sae)
        if getattr(sae.cfg, "use_sparse_activations", False):
            sae.cfg.use_sparse_activations = False  # SAEBench reshapes and edits codes, which torch can't do with COO
        source = str(model or sae.cfg.metadata.model_name)
        alias = sae.cfg.metadata.model_name = _alias(sae, source)
        here = _digest(json.dumps([source, dataclasses.asdict(self)], sort_keys=True, default=str))
        release = f"{label}_{_digest(here, json.dumps(sae.cfg.to_dict(), default=str), *sae.state_dict().values())}"
        folder = output / self.name / ("" if self.seed is None else f"seed_{self.seed}")
        pattern = f"{release.replace('/', '_')}_*.json"
        if not list(folder.rglob(pattern)):
            folder.mkdir(parents=True, exist_ok=True)
            by_name = listed(source, alias) if Path(source).is_dir() else contextlib.nullcontext()
            # Each run in a place of its own: SAEBench names the activations that it keeps by model and dataset alone.
            with by_name, _visiting(workplace / self.name / here), _logged_errors() as errors:
                self._evaluate([(release, sae)], alias, folder, here, workplace / f"model_{_digest(source)}")
            if not list(folder.rglob(pattern)):
                raise RuntimeError(
                    f"{self.name} has ended without a result for {label!r}: {' '.join(errors) or 'see what it printed'}"
                )
        [found] = folder.rglob(pattern)
        categories = json.loads(found.read_text())["eval_result_metrics"].values()
        return {key: value for metrics in categories for key, value in metrics.items() if value is not None}

    def _evaluate(
        self, selected: list[tuple[str, SAE[Any]]], model: str, folder: Path, here: str, activations: Path
    ) -> None:
        spec = _EVALS[self.name]
        module, known = spec.load(), spec.settings()
        common = {
            "model_name": model,
            "random_seed": self.seed,
            "llm_batch_size": self.batch_size,
            "eval_batch_size_prompts": self.batch_size,
            "llm_dtype": self.dtype,
            "dtype": self.dtype,
            "results_path": str(folder / "by_dataset" / here),
            "model_cache_path": str(activations),
        }
        settings = {key: value for key, value in common.items() if key in known} | dict(spec.own) | dict(self.settings)
        if spec.config is None:
            module.multiple_evals(selected, output_folder=str(folder), **{"device": self.device} | settings)
            return
        extra = {"api_key": os.environ["OPENAI_API_KEY"]} if self.name == "autointerp" else {}
        config = getattr(module, spec.config)(**settings)
        module.run_eval(config, selected, self.device, output_path=str(folder), **extra)


def _check(
    named: Mapping[str, SAE[Any]],
    evals: Sequence[str],
    model: str | Path | None,
    seeds: Sequence[int],
    settings: Mapping[str, Mapping[str, Any]],
) -> None:
    if not evals or not seeds:
        raise ValueError(f"there is nothing to run with evals={evals} and seeds={seeds}: name at least one of each")
    if unknown := [name for name in [*evals, *settings] if name not in _EVALS]:
        raise ValueError(f"{unknown[0]!r} is no eval that is known here: {', '.join(_EVALS)} are")
    for label, sae in named.items():
        metadata = sae.cfg.metadata
        missing = [key for key in ("hook_name", "model_name") if metadata[key] is None]
        if missing and not (model and missing == ["model_name"]):
            raise ValueError(f"the metadata of {label!r} lacks {', '.join(missing)}: set sae.cfg.metadata.{missing[0]}")
        source = str(model or metadata.model_name)
        check_model_name(metadata, source, repr(label))
        if not Path(source).is_dir():
            official_name(source)
    if "autointerp" in evals and not os.environ.get("OPENAI_API_KEY"):
        raise ValueError("autointerp asks a language model of OpenAI: set OPENAI_API_KEY in the environment")
    if importlib.util.find_spec("sae_bench") is None:
        raise ImportError(
            "SAEBench is not installed: pip install 'itda-lens[saebench]', in an environment of its own, because it "
            "needs older versions of numpy and datasets"
        )
    for name, own in settings.items():
        if unknown := sorted(own.keys() - _EVALS[name].settings()):
            known = ", ".join(sorted(_EVALS[name].settings()))
            raise ValueError(f"{name} has no setting {unknown[0]!r}. It has {known}")
    for name in {"scr", "tpp"}.intersection(evals):
        warnings.warn(
            f"{name} does not rank SAEs reliably and should not be used (arXiv 2605.18229): look at sae_probes",
            stacklevel=3,
        )


def _check_models(named: Mapping[str, SAE[Any]], given: str | Path | None, dtype: str) -> None:
    """SAEBench loads models by itself, and looks neither at what they compute nor at which model an SAE belongs to."""
    models: dict[str, Any] = {}
    for label, sae in named.items():
        source = str(given or sae.cfg.metadata.model_name)
        if source not in models:
            models[source] = load_model(source, dtype=dtype)
        if is_bridge(models[source]):
            raise ValueError(
                f"SAEBench runs models as a HookedTransformer, and that computes another model than {source} is: "
                "evaluate it with itda_lens.evals.evaluate"
            )
        check_model(sae.cfg.metadata, models[source], repr(label))


def _alias(sae: SAE[Any], source: str) -> str:
    """A name for the model that can be part of a path."""
    own = sae.cfg.metadata.model_name
    if not Path(source).is_dir():
        return source
    return own if own and not Path(own).is_dir() else Path(source).name


def _digest(*parts: str | torch.Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else bytes(part.detach().cpu().view(torch.uint8).numpy()))
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _visiting(folder: Path) -> Iterator[None]:
    """SAEBench leaves files where it stands and gradients on or off; its own probes break its shape annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    before, checked = Path.cwd(), jaxtyping.config.jaxtyping_disable
    os.chdir(folder)
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", checked)
        os.chdir(before)


@contextlib.contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """SAEBench's core logs its errors and goes on."""
    messages: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("sae_bench")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
