"""Language models and text that come with the package, so that everything runs offline."""

from itda_lens.embedded.models import SEEDS, model, path
from itda_lens.embedded.text import code, dataset
from itda_lens.embedded.tune import fine_tuned

__all__ = ["SEEDS", "code", "dataset", "fine_tuned", "model", "path"]
