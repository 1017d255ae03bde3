"""Matching pursuit: activations and atoms to sparse codes. Knows nothing of models, text or SAELens."""

from itda_lens.pursuit.api import check_unit_rows, matching_pursuit, unit_rows
from itda_lens.pursuit.codes import SparseCodes, decode_dense
from itda_lens.pursuit.contexts import is_transformed, untraced, without_autocast
from itda_lens.pursuit.eager import pursue_eager
from itda_lens.pursuit.further import pursue_further
from itda_lens.pursuit.gradient import coefficients_on_path
from itda_lens.pursuit.gram import GramCache, GramRows, gram_fits, gram_limit, gram_matrix, set_gram_limit
from itda_lens.pursuit.on_gpu import pursue_on_gpu
from itda_lens.pursuit.orthogonal_eager import pursue_orthogonal_eager
from itda_lens.pursuit.product import inner_products
from itda_lens.pursuit.reference import matching_pursuit_reference
from itda_lens.pursuit.scale import lengths, near_one
from itda_lens.pursuit.solver import pursue, pursue_correlations
from itda_lens.pursuit.threads import in_threads

__all__ = [
    "GramCache",
    "GramRows",
    "SparseCodes",
    "check_unit_rows",
    "coefficients_on_path",
    "decode_dense",
    "gram_fits",
    "gram_limit",
    "gram_matrix",
    "in_threads",
    "inner_products",
    "is_transformed",
    "lengths",
    "matching_pursuit",
    "matching_pursuit_reference",
    "near_one",
    "pursue",
    "pursue_correlations",
    "pursue_eager",
    "pursue_further",
    "pursue_on_gpu",
    "pursue_orthogonal_eager",
    "set_gram_limit",
    "unit_rows",
    "untraced",
    "without_autocast",
]
