"""ITDA: dictionaries of real activations for SAELens and TransformerLens.

Importing this package registers the architecture `"itda"` with SAELens, so that `SAE.load_from_disk` knows it.
"""

from itda_lens import embedded, evals, interpret, similarity
from itda_lens.artifacts import load_paper_artifact
from itda_lens.building import BuildConfig, BuildStats, DictionaryBuilder, build
from itda_lens.hub import upload
from itda_lens.provenance import Provenance
from itda_lens.pursuit import SparseCodes, matching_pursuit
from itda_lens.sae import ITDA, ITDAConfig
from itda_lens.streams import load_model

__version__ = "0.1.0"

__all__ = [
    "ITDA",
    "BuildConfig",
    "BuildStats",
    "DictionaryBuilder",
    "ITDAConfig",
    "Provenance",
    "SparseCodes",
    "build",
    "embedded",
    "evals",
    "interpret",
    "load_model",
    "load_paper_artifact",
    "matching_pursuit",
    "similarity",
    "upload",
]
