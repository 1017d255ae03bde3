"""How alike two layers, two dictionaries or two models are, and how much of that is chance."""

from itda_lens.similarity.calibration import Calibration, calibrate, calibrate_jaccard
from itda_lens.similarity.declaration import MEASURES, Declaration
from itda_lens.similarity.jaccard import jaccard
from itda_lens.similarity.layers import Matching, layer_matching_accuracy, layer_similarity, matching_interval
from itda_lens.similarity.linear import linear_cka, linear_regression_r2, procrustes
from itda_lens.similarity.moments import CrossMoments
from itda_lens.similarity.neighbours import mutual_knn, relative
from itda_lens.similarity.svcca import svcca

__all__ = [
    "MEASURES",
    "Calibration",
    "CrossMoments",
    "Declaration",
    "Matching",
    "calibrate",
    "calibrate_jaccard",
    "jaccard",
    "layer_matching_accuracy",
    "layer_similarity",
    "linear_cka",
    "linear_regression_r2",
    "matching_interval",
    "mutual_knn",
    "procrustes",
    "relative",
    "svcca",
]
