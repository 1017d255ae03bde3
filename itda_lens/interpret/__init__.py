"""What atoms and activations mean."""

from itda_lens.interpret.explain import Explanation, Term, explain

__all__ = ["Explanation", "Term", "explain"]
