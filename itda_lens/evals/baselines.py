"""What a dictionary must beat: atoms taken at random."""

from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.saes.sae import SAEMetadata

from itda_lens.sae import ITDA
from itda_lens.streams import HookedModel, activation_batches, canonical_hooks, check_model, load_text
from itda_lens.streams.datasets import AnyDataset


def random_directions(itda: ITDA, *, seed: int = 0) -> ITDA:
    """An ITDA of as many random unit vectors, with the same bias and L0.

    Example:
        >>> random_directions(ITDA.from_atoms(torch.eye(3), k=2)).atoms.shape
        torch.Size([3, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    return _like(itda, torch.randn(itda.atoms.shape, dtype=torch.float32, generator=generator))


def random_activations(
    itda: ITDA, model: HookedModel, dataset: AnyDataset | str | Path, *, seed: int = 0, batch_size: int = 32
) -> ITDA:
    """An ITDA of as many activations drawn at random from the stream that `itda` was built on.

    Args:
        itda: built by `build`, whose metadata says how the stream was cut.
        model: the model that it was built on.
        dataset: the dataset that it was built on.
        seed: which tokens are drawn.
        batch_size: rows in a forward pass.

    Raises:
        ValueError: the metadata does not say how the stream was cut or names another model, or the stream is too
            short.
    """
    n, metadata = itda.cfg.d_sae, cast(Any, itda.cfg.metadata)
    record = metadata.itda_build
    if record is None:
        raise ValueError("this ITDA was not made by build(), so its metadata does not say how the stream was cut")
    check_model(metadata, model)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(record["tokens_judged"], generator=generator)[:n].sort().values
    seen, parts = 0, []
    batches = activation_batches(
        model,
        load_text(dataset, column=metadata.dataset_column),
        canonical_hooks(model, [metadata.hook_name]),
        context_size=metadata.context_size,
        batch_size=batch_size,
        prepend_bos=metadata.prepend_bos,
        pack=metadata.pack,
        exclude_special_tokens=metadata.exclude_special_tokens,
        head_index=metadata.hook_head_index,
        seqpos_slice=tuple(metadata.seqpos_slice),
    )
    for batch in batches:
        x = batch.activations[metadata.hook_name][batch.mask.to(model.cfg.device)]
        inside = drawn[(drawn >= seen) & (drawn < seen + len(x))] - seen
        parts.append(x[inside.to(x.device)].float())
        seen += len(x)
        if seen > int(drawn[-1]):
            return _like(itda, torch.cat(parts).to(itda.device) - itda.b_dec)
    raise ValueError(f"the stream has {seen:,} tokens, but the dictionary was built on {record['tokens_judged']:,}")


def _like(itda: ITDA, rows: torch.Tensor) -> ITDA:
    atoms = torch.nn.functional.normalize(rows.detach().float(), dim=-1).to(itda.device)
    metadata = SAEMetadata(**itda.cfg.metadata.to_dict())
    like = ITDA.from_atoms(atoms, itda.cfg.k, bias=itda.b_dec, metadata=metadata)
    return like.with_pursuit(orthogonal=itda.cfg.orthogonal, nonnegative=itda.cfg.nonnegative)
