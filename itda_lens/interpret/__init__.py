"""What atoms and activations mean, in one model and in another."""

from itda_lens.interpret.decompose import Decomposition, decompose
from itda_lens.interpret.diff import Diff, diff
from itda_lens.interpret.explain import Explanation, Term, explain
from itda_lens.interpret.layers import best_layer, transfer_table
from itda_lens.interpret.transfer import source_atoms, transfer, transfer_all

__all__ = [
    "Decomposition",
    "Diff",
    "Explanation",
    "Term",
    "best_layer",
    "decompose",
    "diff",
    "explain",
    "source_atoms",
    "transfer",
    "transfer_all",
    "transfer_table",
]
