"""From a model and a dataset to one ITDA for each hook point, in one pass."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from itda_lens.building.builder import DictionaryBuilder
from itda_lens.sae import ITDA
from itda_lens.settings import BuildConfig
from itda_lens.streams import HookedModel, activation_batches, canonical_hooks, expand_hooks, load_text
from itda_lens.streams.datasets import AnyDataset
from itda_lens.streams.hooks import hook_widths
from itda_lens.streams.models import model_metadata


def build(
    model: HookedModel,
    dataset: AnyDataset | str | Path,
    hook_names: str | Sequence[str],
    config: BuildConfig | None = None,
) -> dict[str, ITDA]:
    """Build an ITDA for each hook point, from one pass of the model over the data.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`.
        dataset: rows with a column `text`, `tokens` or `input_ids`; or a file, folder or name (see `load_text`).
        hook_names: one or more hook points, such as `blocks.4.hook_resid_post`; or patterns (see `expand_hooks`).
        config: size, L0 and the shape of the stream.

    Returns:
        For each hook name an ITDA whose metadata SAELens's stores and evals understand.

    Raises:
        ValueError: bad settings, an unknown hook, an empty dataset or one without text; all before any long work.
            Whatever ends a build later (an activation that is not finite, a lost connection, Ctrl-C) is raised
            as it is, and its attribute `itdas` holds the dictionaries as far as they had come.

    Example:
        >>> from itda_lens import embedded
        >>> hook = "blocks.2.hook_resid_post"
        >>> config = BuildConfig(k=8, n_atoms=100, tokens=2000, progress=False)
        >>> build(embedded.model(), embedded.dataset(), hook, config)[hook].cfg.d_sae
        100
    """
    config = config or BuildConfig()
    hooks = canonical_hooks(model, expand_hooks(model, hook_names))
    _check_stream(model, config)
    device = config.device or str(model.cfg.device)
    builders = {
        hook: config.builder(width, tokenizer=model.tokenizer, device=device)
        for hook, width in hook_widths(model, hooks, config.hook_head_index).items()
    }
    data = load_text(dataset, column=config.column)
    name = config.dataset_name or (str(dataset) if isinstance(dataset, str | Path) else None)
    metadata = _metadata(model, data, name, config)
    batches = activation_batches(
        model,
        data,
        hooks,
        context_size=config.context_size,
        batch_size=config.batch_size,
        prepend_bos=config.prepend_bos,
        pack=config.pack,
        exclude_special_tokens=config.exclude_special_tokens,
        head_index=config.hook_head_index,
        seqpos_slice=config.seqpos_slice,
    )
    try:
        _consume(batches, builders, config)
    except BaseException as e:
        e.itdas = _finish(builders, hooks, metadata, [])  # type: ignore[attr-defined]
        raise
    failures: list[tuple[str, ValueError]] = []
    itdas = _finish(builders, hooks, metadata, failures)
    for hook, failure in failures:
        error = ValueError(f"{hook}: {failure}")
        error.itdas = itdas  # type: ignore[attr-defined]
        raise error from failure
    return itdas


def _consume(batches: Iterable[Any], builders: dict[str, DictionaryBuilder], config: BuildConfig) -> None:
    with tqdm(total=config.tokens, unit=" tokens", unit_scale=True, disable=not config.progress) as bar:
        for tokens, mask, activations, real in batches:
            others = real & ~mask
            stats = [builders[hook].update(x, tokens, mask, others) for hook, x in activations.items()]
            bar.update(min(int(mask.sum()), (config.tokens or 2**62) - bar.n))
            bar.set_postfix(atoms=sum(s.atoms for s in stats), loss=f"{stats[0].loss:.3f}", refresh=False)
            if all(s.done for s in stats):
                break


def _finish(
    builders: dict[str, DictionaryBuilder],
    hooks: dict[str, str],
    metadata: dict[str, Any],
    failures: list[tuple[str, ValueError]],
) -> dict[str, ITDA]:
    itdas: dict[str, ITDA] = {}
    for hook, builder in builders.items():
        try:
            itdas[hook] = builder.to_itda({**metadata, "hook_name": hooks[hook]})
        except ValueError as e:
            failures.append((hook, e))
    return itdas


def _check_stream(model: HookedModel, config: BuildConfig) -> None:
    if not 2 <= config.context_size <= model.cfg.n_ctx:
        raise ValueError(
            f"context_size must be between 2 and the {model.cfg.n_ctx} positions of {model.cfg.model_name}, "
            f"got {config.context_size}"
        )
    if config.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {config.batch_size}")
    if len(range(config.context_size)[slice(*config.seqpos_slice)]) == 0:
        raise ValueError(f"seqpos_slice {config.seqpos_slice} leaves no position of {config.context_size}")


def _metadata(model: HookedModel, data: Any, name: str | None, config: BuildConfig) -> dict[str, Any]:
    info = getattr(data, "info", None)
    return {
        **model_metadata(model),
        "hook_head_index": config.hook_head_index,
        "prepend_bos": config.prepend_bos,
        "context_size": config.context_size,
        "pack": config.pack,
        "dataset_path": name or getattr(info, "dataset_name", None),
        "dataset_column": config.column,
        "dataset_version": str(revision) if (revision := getattr(info, "version", None)) else None,
        "dataset_fingerprint": getattr(data, "_fingerprint", None),
        "seqpos_slice": list(config.seqpos_slice),
        "exclude_special_tokens": config.exclude_special_tokens,
        "versions": {p: version(p) for p in ("itda-lens", "sae-lens", "transformer-lens", "torch")},
    }
