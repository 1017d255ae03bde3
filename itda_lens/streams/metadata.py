"""What the metadata of an SAE says of the stream that it belongs to."""

from sae_lens.saes.sae import SAEMetadata


def prepends_bos(metadata: SAEMetadata) -> bool:
    """Whether rows begin with BOS: as TransformerLens does it, unless the metadata says no.

    Example:
        >>> prepends_bos(SAEMetadata()), prepends_bos(SAEMetadata(prepend_bos=False))
        (True, False)
    """
    return metadata.prepend_bos is not False
