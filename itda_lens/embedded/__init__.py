"""Language models and text that come with the package, so that everything runs offline."""

from itda_lens.embedded.models import SEEDS, model, path
from itda_lens.embedded.text import dataset

__all__ = ["SEEDS", "dataset", "model", "path"]
