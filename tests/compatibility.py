"""A pytest plugin: `--compatibility FILE` writes what the tests found of each surface where an SAE is used.

A run covers only what is installed. Lines of surfaces that were not run here stay as they are in the file.
"""

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

WORKS, NOT_FOR_ITDA, NOT_TRIED = "works", "does not apply", "not tried"
PACKAGES = ("sae-lens", "transformer-lens", "torch", "sae-bench", "sae-dashboard")
_LINE = re.compile(r"^\| (?P<name>.+?) \| (works|works, with a note|does not apply|not tried|fails) \|")


@dataclass(frozen=True)
class Surface:
    """Something that people do with an SAE."""

    name: str
    tests: str
    """A pattern of the names of the tests that show it, `file::test`."""
    note: str = ""
    verdict: str = WORKS
    """What it means that these tests pass."""


SURFACES = [
    # SAELens
    Surface(
        "SAELens: `SAE.load_from_disk`, `save_model`, the registry",
        r"test_saelens::test_(01|02|04|13|15|16)_",
        "only after `import itda_lens`: SAELens has no plugin entry points, and raises `KeyError: 'itda'` without it",
    ),
    Surface(
        "SAELens: its training runner and command lines",
        r"test_saelens::test_03_",
        "they train by gradients and don't see plugins; `itda-lens build` and `itda_lens.build` take their place",
        NOT_FOR_ITDA,
    ),
    Surface(
        "SAELens: `W_enc`, `W_dec`, `b_dec`, weight-based metrics",
        r"test_saelens::test_0[567]_",
        "`W_enc` is `W_dec.T` and no weight of its own; there is no `b_enc`",
    ),
    Surface(
        "SAELens: `encode`, `decode`, `forward` for any shape and dtype", r"test_saelens::test_(08|12)_|test_pursuit::"
    ),
    Surface(
        "SAELens: sparse activations",
        r"test_saelens::test_09_",
        "`ITDAConfig(use_sparse_activations=True)`, float32 for speed, as `TopKTrainingSAE` has it",
    ),
    Surface(
        "SAELens: gradients, attribution through the codes", r"test_saelens::test_10_|test_hooked_models::.*attrib"
    ),
    Surface(
        "SAELens: `hook_sae_acts_pre`, `hook_sae_acts_post` and the other hooks",
        r"test_saelens::test_11_",
        "`hook_sae_acts_pre` holds the correlations that pursuit starts from",
    ),
    Surface("SAELens: `fold_W_dec_norm`, `fold_activation_norm_scaling_factor`", r"test_saelens::test_1[89]_"),
    Surface(
        "SAELens: `fold_activation_whitening`, `covariance_whitening`",
        r"test_saelens::test_20_|test_saelens::test_04_invalid.*covariance",
        "the encoder is tied to the atoms, so a whitening can't be folded into it: build on whitened activations",
        NOT_FOR_ITDA,
    ),
    Surface(
        "SAELens: `normalize_activations`",
        r"test_saelens::test_21_",
        "with atoms of the normalised space; `constant_norm_rescale` makes zero vectors NaN, as for any SAE",
    ),
    Surface("SAELens: `ActivationsStore`, metadata", r"test_saelens::test_2[24]_"),
    Surface("SAELens: casts, copies and moves of an SAE", r"test_saelens::test_27_"),
    Surface(
        "SAELens: `run_evals`",
        r"test_hooked_models::test_evals|test_saelens::test_26_|test_evals::|test_hook_points::test_evals|"
        r"test_evaluate::",
        "on a `TransformerBridge` with the bridge's own hook names and not for attention heads, which SAELens's evals "
        "can't follow for any SAE; `evals.evaluate` gives the same figures there, too",
    ),
    Surface(
        "SAELens: hub, `SAE.from_pretrained`, `upload`",
        r"test_hub::|test_saelens::test_1[347]_",
        "tested with a folder in place of the hub; `itda_lens.upload` writes a page of its own",
    ),
    # Models
    Surface(
        "`HookedSAETransformer`: run, cache, error term, steering, ablation",
        r"test_hooked_models::.*(model|reload|heads)",
    ),
    Surface(
        "`SAETransformerBridge`: the same",
        r"test_hooked_models::.*bridge",
        "once an SAE was attached to a point of a bridge and removed, SAELens leaves its hooks dead: boot it anew",
    ),
    Surface(
        "Hook points: residual stream, MLP, attention, `hook_z`, final norm",
        r"test_hook_points::(?!test_evals|test_heads)",
        "`run_with_saes` would put an SAE of one head on all heads, which an ITDA refuses; on a bridge "
        "`hook_resid_mid` is the input of the MLP's norm, so what is hooked in there reaches the MLP alone",
    ),
    # Other tools
    *(
        Surface(f"SAEBench: {name}", rf"test_saebench::.*({pattern})", note)
        for name, pattern, note in [
            ("core", "core|schema", "`l1` and densities take positive codes alone"),
            ("sae_probes", "sae_probes", "for models with 1,024 positions or short texts, as for any SAE"),
            ("sparse_probing", "sparse_probing", "its data sets come from the hub"),
            ("scr", r"\[scr", "not to be relied on (arXiv 2605.18229)"),
            ("tpp", r"\[tpp", "through `nonnegative_view()`; not to be relied on (arXiv 2605.18229)"),
            ("meta_structure", "meta_structure", ""),
        ]
    ),
    Surface(
        "SAEBench: absorption, autointerp, unlearning, ravel",
        r"test_saebench::test_bad_arguments",
        "`evals.saebench` passes them on, and says what they need: a model that can spell, an OpenAI key, an "
        "instruction-tuned model and its corpus, gemma-2-2b or pythia-160m-deduped",
        NOT_TRIED,
    ),
    Surface(
        "sae-dashboard: `SaeVisRunner`, feature-centric pages",
        r"test_dashboard::",
        "what it declares to need can't be met beside SAELens 6: install it with `--no-deps`; it shows positive "
        "codes, and negative ones through `nonnegative_view()`",
    ),
    Surface("The paper's artifacts: `atoms.pt`, `atom_indices.pt`, `metadata.yaml`", r"test_artifacts::"),
]


@dataclass
class Tally:
    passed: int = 0
    failed: int = 0
    skipped: int = 0


class Compatibility:
    def __init__(self, path: Path):
        self.path = path
        self.tallies = {surface: Tally() for surface in SURFACES}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        name = re.sub(r"^.*/|\.py", "", report.nodeid)
        for surface, tally in self.tallies.items():
            if re.search(surface.tests, name):
                setattr(tally, report.outcome, getattr(tally, report.outcome) + 1)

    def pytest_sessionfinish(self) -> None:
        before = {}
        if self.path.exists():
            before = {m["name"]: line for line in self.path.read_text().splitlines() if (m := _LINE.match(line))}
        lines = [
            _line(surface, tally) if tally.passed or tally.failed else before.get(surface.name)
            for surface, tally in self.tallies.items()
        ]
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(_HEAD + "\n".join(filter(None, lines)) + "\n")


def _line(surface: Surface, tally: Tally) -> str:
    works = f"{WORKS}, with a note" if surface.verdict == WORKS and surface.note else surface.verdict
    return f"| {surface.name} | {'fails' if tally.failed else works} | {surface.note} | {tally.passed} |"


def _version(package: str) -> str | None:
    try:
        return f"{package} {version(package).split('+')[0]}"
    except PackageNotFoundError:
        return None


_HEAD = f"""\
# Where an SAE is used, and whether an ITDA does there

Written by `make compatibility` from what the tests found: with {", ".join(filter(None, map(_version, PACKAGES)))}.

| surface | verdict | note | tests passed |
|---|---|---|---|
"""
