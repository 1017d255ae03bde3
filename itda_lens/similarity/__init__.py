"""How alike two layers, two dictionaries or two models are, and how much of that is chance."""

from itda_lens.similarity.calibration import Calibration, calibrate, calibrate_jaccard
from itda_lens.similarity.declaration import MEASURES, Declaration
from itda_lens.similarity.gathered import MatchingConfig
from itda_lens.similarity.jaccard import jaccard
from itda_lens.similarity.layers import (
    Matching,
    layer_matching_accuracy,
    layer_similarity,
    less_layer_mean,
    matching_interval,
)
from itda_lens.similarity.linear import linear_cka, linear_regression_r2, procrustes
from itda_lens.similarity.matching import LayerMatching
from itda_lens.similarity.membership import MembershipProfiles
from itda_lens.similarity.model_level import (
    convergence,
    match_dictionaries,
    model_jaccard,
    model_similarity,
    plot_convergence,
)
from itda_lens.similarity.moments import CrossMoments
from itda_lens.similarity.neighbours import mutual_knn, relative
from itda_lens.similarity.study import match_layers
from itda_lens.similarity.svcca import svcca

__all__ = [
    "MEASURES",
    "Calibration",
    "CrossMoments",
    "Declaration",
    "LayerMatching",
    "Matching",
    "MatchingConfig",
    "MembershipProfiles",
    "calibrate",
    "calibrate_jaccard",
    "convergence",
    "jaccard",
    "layer_matching_accuracy",
    "layer_similarity",
    "less_layer_mean",
    "linear_cka",
    "linear_regression_r2",
    "match_dictionaries",
    "match_layers",
    "matching_interval",
    "model_jaccard",
    "model_similarity",
    "mutual_knn",
    "plot_convergence",
    "procrustes",
    "relative",
    "svcca",
]
