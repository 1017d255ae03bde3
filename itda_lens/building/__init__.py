"""From activations to a dictionary."""

from itda_lens.building.builder import BuildStats, DictionaryBuilder
from itda_lens.building.runner import BuildConfig, build

__all__ = ["BuildConfig", "BuildStats", "DictionaryBuilder", "build"]
