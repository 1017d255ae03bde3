"""Publishing dictionaries on the Hugging Face hub, as SAELens does it, with a page that says what they are."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from huggingface_hub import HfApi
from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

from itda_lens.plain_text import markdown, one_line
from itda_lens.provenance import Provenance
from itda_lens.sae import ITDA

Published = Literal["full", "positions", "none"]

_ATOMS_SHOWN = 8
_PROMPT_CHARACTERS = 60


def upload(
    itdas: Mapping[str, ITDA],
    repo_id: str,
    *,
    provenance: Published | str = "full",
    revision: str = "main",
    show_progress: bool = True,
) -> None:
    """Publish ITDAs, so that `SAE.from_pretrained(repo_id, sae_id)` loads them after `import itda_lens`.

    Provenance holds text of the dataset: a warning says how much of it is published.

    Args:
        itdas: by the name (`sae_id`) that each shall have in the repository.
        repo_id: `owner/name` on the hub; made if it does not exist.
        provenance: `"full"` publishes the prompts of the atoms, `"positions"` only row and position, `"none"` neither.
        revision: the branch.
        show_progress: show a progress bar.

    Raises:
        ValueError: no ITDA is given, or `provenance` is none of the three.
    """
    if not itdas:
        raise ValueError("itdas is empty: give at least one ITDA by name")
    if provenance not in ("full", "positions", "none"):
        raise ValueError(f"provenance must be 'full', 'positions' or 'none', got {provenance!r}")
    published = {name: _with_provenance(itda, provenance) for name, itda in itdas.items()}
    characters = sum(_text_size(itda.provenance) for itda in published.values())
    if characters:
        warnings.warn(
            f"the provenance of these atoms holds {characters:,} characters of text from "
            f"{_named(published, 'dataset_path')}, which anyone can read in {repo_id} from now on: "
            "pass provenance='positions' or 'none' to leave it out",
            stacklevel=2,
        )
    upload_saes_to_huggingface(
        dict(published), repo_id, hf_revision=revision, show_progress=show_progress, add_default_readme=False
    )
    api = HfApi()
    if not api.file_exists(repo_id, "README.md", revision=revision):
        api.upload_file(
            path_or_fileobj=readme(published, repo_id).encode(),
            path_in_repo="README.md",
            repo_id=repo_id,
            revision=revision,
            commit_message="Add README.md",
        )


def readme(itdas: Mapping[str, ITDA], repo_id: str) -> str:
    """The page of a repository: what each dictionary is, how to load it, and some of its atoms.

    Names and prompts are literal text in it, whatever they hold.

    Example:
        >>> import torch
        >>> print(readme({"layer_3": ITDA.from_atoms(torch.eye(3), k=2)}, "someone/itdas").splitlines()[6])
        # ITDA dictionaries
    """
    first = next(iter(itdas))
    rows = "\n".join(_row(name, itda) for name, itda in itdas.items())
    return f"""\
---
library_name: saelens
tags:
- itda
---

# ITDA dictionaries

Each latent of an ITDA ([arXiv 2505.17769](https://arxiv.org/abs/2505.17769)) is a real activation of the model: that of
one token of one prompt. Activations are encoded by matching pursuit; coefficients are signed.

| sae_id | model | hook point | atoms | k (L0) | dataset | tokens judged |
|---|---|---|---|---|---|---|
{rows}

```python
import itda_lens                 # registers the architecture "itda" with SAELens: without it, KeyError: 'itda'
from sae_lens import SAE

itda = SAE.from_pretrained({repo_id!r}, {first!r})
```
{"".join(_atoms_section(name, itda.provenance) for name, itda in itdas.items())}"""


def _row(name: str, itda: ITDA) -> str:
    metadata: Any = itda.cfg.metadata
    judged = (metadata.itda_build or {}).get("tokens_judged")
    cells = (name, metadata.model_name, metadata.hook_name, itda.cfg.d_sae, itda.cfg.k, metadata.dataset_path, judged)
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(value: object) -> str:
    if isinstance(value, int | None):
        return "" if value is None else str(value)
    return markdown(str(value))


def _atoms_section(name: str, provenance: Provenance | None) -> str:
    if provenance is None or "text" not in provenance.kinds:
        return ""
    n = len(provenance)
    lines = []
    for atom in range(0, n, max(1, n // _ATOMS_SHOWN)):
        before, token = provenance.prompt(atom)
        lines.append(f"- {atom}: {markdown(f'{before[-_PROMPT_CHARACTERS:]}«{token}»')}")
    return (
        f"\n## Some atoms of {markdown(name)}\n\nThe prompt of each atom, its token in «».\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _with_provenance(itda: ITDA, published: str) -> ITDA:
    copy = itda.with_k(itda.cfg.k)
    copy.cfg.metadata.model_path = None  # a folder on this machine, which says who works here
    if published == "none" or itda.provenance is None:
        copy.provenance = None
    elif published == "positions":
        copy.provenance = replace(itda.provenance, sequences={}, prompts=(), tokenizer_digest=None)
    return copy


def _text_size(provenance: Provenance | None) -> int:
    if provenance is None or not provenance.sequences:
        return 0
    longest: dict[int, int] = {}
    for atom, row in enumerate(provenance.row.tolist()):
        # Without a tokenizer the text is there all the same, as token ids: about four characters each.
        size = len(provenance.text(atom)) if provenance.prompts else 4 * len(provenance.tokens(atom))
        longest[row] = max(longest.get(row, 0), size)
    return sum(longest.values())


def _named(itdas: Mapping[str, ITDA], key: str) -> str:
    names: list[Any] = [itda.cfg.metadata[key] for itda in itdas.values()]
    return ", ".join(sorted({one_line(str(name)) for name in names if name})) or "the dataset"
