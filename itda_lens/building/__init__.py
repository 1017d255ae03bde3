"""From activations to a dictionary."""

from itda_lens.building.builder import BuildStats, DictionaryBuilder

__all__ = ["BuildStats", "DictionaryBuilder"]
