"""The metadata of an SAE: what SAELens's code asks for, what a file can hold, and what it says of the stream."""

import copy
import json
from typing import Any

from sae_lens.saes.sae import SAEMetadata

_DEFAULTS: dict[str, Any] = {
    "model_name": None,
    "model_class_name": None,
    "hook_name": None,
    "hook_head_index": None,
    "prepend_bos": None,
    "context_size": None,
    "dataset_path": None,
    "seqpos_slice": None,
    "exclude_special_tokens": None,
    "neuronpedia_id": None,
    "model_from_pretrained_kwargs": {},
}


def with_defaults(metadata: SAEMetadata) -> SAEMetadata:
    """All that SAELens reads, None where it is not known; raises a ValueError for what JSON can't hold."""
    complete = {**copy.deepcopy(_DEFAULTS), **metadata.to_dict()}
    for key, value in complete.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise ValueError(f"metadata[{key!r}] is {value!r}, and can't be saved as JSON ({e})") from e
    return SAEMetadata(**complete)


def prepends_bos(metadata: SAEMetadata) -> bool:
    """Whether rows begin with BOS: as TransformerLens does it, unless the metadata says no.

    Example:
        >>> prepends_bos(SAEMetadata()), prepends_bos(SAEMetadata(prepend_bos=False))
        (True, False)
    """
    return metadata.prepend_bos is not False
