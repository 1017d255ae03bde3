"""Text to tokens to activations at hook points, in a fixed order."""

from itda_lens.streams.activations import Batch, activation_batches
from itda_lens.streams.datasets import load_text
from itda_lens.streams.documents import tokenize
from itda_lens.streams.hooks import canonical_hooks, expand_hooks
from itda_lens.streams.models import HookedModel, check_model, hooked_model_from_folder, load_model
from itda_lens.streams.tokens import special_token_ids, token_batches

__all__ = [
    "Batch",
    "HookedModel",
    "activation_batches",
    "canonical_hooks",
    "check_model",
    "expand_hooks",
    "hooked_model_from_folder",
    "load_model",
    "load_text",
    "special_token_ids",
    "token_batches",
    "tokenize",
]
