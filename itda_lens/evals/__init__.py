"""How well a dictionary does, beside others and beside chance."""

from itda_lens.evals.baselines import random_activations, random_directions
from itda_lens.evals.evaluate import evaluate
from itda_lens.evals.saebench import saebench

__all__ = ["evaluate", "random_activations", "random_directions", "saebench"]
