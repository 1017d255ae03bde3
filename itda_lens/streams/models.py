"""Language models by name or folder, with hooks: loaded, compared with Hugging Face's own, and told apart."""

import contextlib
import copy
import difflib
import io
import itertools
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import NEED_REMOTE_CODE_MODELS, get_official_model_name
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from itda_lens.provenance import tokenizer_digest
from itda_lens.streams import agreement
from itda_lens.streams.bridge import LastingBridge
from itda_lens.streams.processing import check_processing, normalization_type
from itda_lens.streams.state import check_state

HookedModel: TypeAlias = HookedTransformer | TransformerBridge

_OWN_FORMAT = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")
"""Owners of models that TransformerLens alone can read: there is no Hugging Face model to compare them with."""
_PATH = "itda_model_path"
_FINGERPRINT = "itda_model_fingerprint"


def is_bridge(model: object) -> TypeGuard[TransformerBridge]:
    """Whether a model is a `TransformerBridge`, and no `HookedTransformer`."""
    return isinstance(model, TransformerBridge)


def load_model(
    name_or_folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    bridge: bool = False,
) -> HookedSAETransformer | SAETransformerBridge:
    """Any causal language model of Hugging Face, as one to which SAEs can be attached, with unprocessed weights.

    Its logits on a few tokens are compared with those of Hugging Face's own model. A `HookedSAETransformer` is taken
    where it agrees, else a `SAETransformerBridge`. Long rows are compared too where the configuration treats later
    positions in another way.

    Args:
        name_or_folder: a Hugging Face folder, also a snapshot of its cache, or a name on the hub or of TransformerLens.
        device: where the weights go.
        dtype: of the weights, such as `torch.bfloat16` or `"bfloat16"`.
        bridge: take a `SAETransformerBridge` also where a `HookedSAETransformer` computes the same.

    Raises:
        ValueError: there is no such model, it is not a causal language model, it lacks weights or a tokenizer, or
            neither kind of model computes what Hugging Face's does.

    Example:
        >>> from itda_lens import embedded
        >>> load_model(embedded.path(0), dtype="bfloat16").cfg.n_ctx
        128
        >>> isinstance(load_model(embedded.path(0), bridge=True), SAETransformerBridge)
        True
    """
    dtype = _dtype(dtype)
    check_device(device)
    source, name = _locate(os.fspath(name_or_folder))
    if source.startswith(_OWN_FORMAT):
        if bridge:
            raise ValueError(f"{source} is in a format of its own, which no bridge reads: leave out bridge=True")
        with _quiet():
            model = HookedSAETransformer.from_pretrained_no_processing(source, device=str(device), dtype=dtype)
        return cast(HookedSAETransformer, model)
    model = _verified(source, name, dtype, bridge)
    model.cfg.model_name = name
    model.cfg.tokenizer_name = source
    if Path(source).is_dir():
        vars(model)[_PATH] = source
    with _quiet():
        model = cast(Any, model).to(device)
    _fingerprint(model)  # now, before hooks and SAEs are on it
    return model


def hooked_model_from_folder(
    folder: str | os.PathLike[str], *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> HookedSAETransformer:
    """`load_model` of a local folder for which only a `HookedSAETransformer` will do.

    Raises:
        ValueError: it can't be loaded, or only as a bridge.
    """
    model = load_model(folder, device=device, dtype=dtype)
    if not isinstance(model, HookedSAETransformer):
        raise ValueError(f"{folder} can only be loaded as a bridge: use load_model")
    return model


def load_model_of(
    metadata: SAEMetadata, *, device: str | torch.device = "cpu", dtype: torch.dtype | str = torch.float32
) -> HookedSAETransformer | SAETransformerBridge:
    """The model that a dictionary was built on: from the local folder that it came from, else by its name.

    Raises:
        ValueError: the metadata name no model, or it can't be found or loaded any more.
    """
    path, name = metadata.model_path, metadata.model_name
    if path and (Path(path) / "config.json").is_file():
        return load_model(path, device=device, dtype=dtype)
    if not name:
        raise ValueError("the metadata of this dictionary name no model: pass the model that it was built on")
    try:
        return load_model(name, device=device, dtype=dtype)
    except ValueError as e:
        where = f", and there is no model in {path} any more" if path else ""
        raise ValueError(f"the model {name!r} of this dictionary can't be loaded: {e}{where}. Pass the model") from e


def model_width(name_or_folder: str | os.PathLike[str]) -> int:
    """The width of a model's residual stream, from its configuration alone; 0 where that does not say."""
    source, name = _locate(os.fspath(name_or_folder))
    if source.startswith(_OWN_FORMAT):
        return 0
    return getattr(_configuration(source, name).get_text_config(), "hidden_size", 0)


def check_device(device: str | torch.device) -> None:
    """Raise a ValueError where nothing can be computed on a device."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as e:  # torch asserts that it was compiled for a device
        raise ValueError(f"device {str(device)!r} can't be used here: {_first_line(e)}. Pass cpu") from e


def model_metadata(model: HookedModel) -> dict[str, Any]:
    """What the metadata of an SAE says of the model that it belongs to."""
    return {
        "model_name": model.cfg.model_name,
        "model_class_name": "TransformerBridge" if is_bridge(model) else "HookedTransformer",
        "model_normalization": normalization_type(model),
        "model_path": vars(model).get(_PATH),
        "model_fingerprint": _fingerprint(model),
        "model_dtype": str(model.cfg.dtype).removeprefix("torch."),
        "tokenizer_digest": tokenizer_digest(model.tokenizer),
    }


def check_model(metadata: SAEMetadata, model: HookedModel, what: str = "this dictionary") -> None:
    """Raise a ValueError when an SAE belongs to another model than this one; metadata without a name pass.

    Models are told apart by their logits on a few tokens, so that a fine-tune is another model, and one model stays
    itself in another kind, dtype or processing and under another name. Metadata without these logits are compared by
    name: owner, folder and alias count for nothing, so `gpt2-small` is `openai-community/gpt2`.
    """
    check_state(model)
    check_processing(metadata, model, what)
    recorded: Any = metadata.model_fingerprint
    own = _fingerprint(model) if recorded and metadata.model_name else None
    if own is None:
        check_model_name(metadata, model.cfg.model_name, what)
        return
    apart = agreement.difference(torch.tensor(own), torch.tensor(recorded))
    allowed = max(
        2e-3 if dtype in (torch.float32, torch.float64) else 2 * agreement.tolerance(dtype)
        for dtype in (model.cfg.dtype, _dtype(str(metadata.model_dtype or "float32")))
    )
    if not apart <= allowed:
        raise ValueError(
            f"{what} belongs to the model {metadata.model_name!r}, but was given {model.cfg.model_name!r}, whose "
            f"logits on the same tokens differ by {apart:.1%} of their spread: pass the model that it was built on, or "
            "set metadata.model_name to None (in code; save it again to keep that) to use it with this one all the same"
        )


def check_model_name(metadata: SAEMetadata, given: str, what: str = "this dictionary") -> None:
    """As `check_model`, for a model that is known by name or folder alone."""
    named = metadata.model_name
    if not named or not given or _plain_name(str(named)) == _plain_name(given):
        return
    if metadata.model_path and Path(given).expanduser().resolve() == Path(metadata.model_path):
        return
    raise ValueError(
        f"{what} belongs to the model {named!r}, but was given {given!r}: pass the model that it was built on, "
        "or, where both are names of one model, set metadata.model_name (in code; save it again to keep that)"
    )


@contextlib.contextmanager
def listed(folder: str | os.PathLike[str], alias: str | None = None) -> Iterator[str]:
    """Inside, TransformerLens loads a local Hugging Face folder by the path that this gives, or by `alias`."""
    with _listed(AutoConfig.from_pretrained(folder, trust_remote_code=False), alias) as plain:
        for file in Path(folder).resolve().iterdir():
            if file.name != "config.json":
                (Path(plain) / file.name).symlink_to(file)
        yield plain


@contextlib.contextmanager
def _listed(config: Any, alias: str | None = None) -> Iterator[str]:
    # TransformerLens reads the configuration only of a folder that its list of names holds, takes parts of the path for
    # the architecture, and wants what transformers 5 leaves out of the configuration.
    with tempfile.TemporaryDirectory() as plain:
        config = copy.deepcopy(config)
        if not hasattr(config, "n_ctx") and (n_ctx := _positions(config)):
            config.n_ctx = n_ctx
        config.save_pretrained(plain)
        OFFICIAL_MODEL_NAMES.append(plain)
        MODEL_ALIASES[plain] = [] if alias is None else [alias]
        try:
            yield plain
        finally:
            OFFICIAL_MODEL_NAMES.remove(plain)
            del MODEL_ALIASES[plain]


def _positions(config: Any) -> int | None:
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)


def official_name(name: str) -> str:
    """TransformerLens's own name of a model. Raises ValueError, with the nearest names, where it has none."""
    try:
        return get_official_model_name(name)
    except ValueError:
        raise ValueError(
            f"{name!r} is neither a model that TransformerLens knows nor a local Hugging Face folder.{_near(name)}"
        ) from None


def _verified(source: str, name: str, dtype: torch.dtype, bridge: bool) -> HookedSAETransformer | SAETransformerBridge:
    """The first kind of model that computes what Hugging Face's own does."""
    config = _configuration(source, name)
    tokenizer = _tokenizer(source, name)
    hf_model = _hf_model(source, name, dtype)
    text = config.get_text_config()
    n_ctx = _positions(config)
    probes = agreement.probes(text, n_ctx, tokenizer.bos_token_id, tokenizer.all_special_ids)
    n_layers = text.num_hidden_layers
    head = hf_model.get_output_embeddings()
    expected = [agreement.run(hf_model, head, n_layers, probe) for probe in probes]
    _check_causal(expected[0], name, dtype)
    found: list[str] = []
    # Where the border is too far to compare, only Hugging Face's own code is safe.
    bridge = bridge or agreement.border(text, n_ctx) > agreement.LONGEST
    kinds = {"TransformerBridge": _bridged} if bridge else _kinds(name)
    for kind, make in kinds.items():
        try:
            model = make(hf_model, tokenizer, source, dtype, n_ctx)
            logits = [agreement.run(model, model.unembed, n_layers, probe) for probe in probes]
        except Exception as e:
            found.append(f"{kind} fails ({_first_line(e)})")
            continue
        apart = max(map(agreement.difference, logits, expected))
        if apart <= agreement.tolerance(dtype):
            return model
        found.append(f"the logits of {kind} differ by {apart:.3g} of their spread")
    raise ValueError(
        f"{name} can't be given hooks: {' and '.join(found)}, where {agreement.tolerance(dtype):.1g} may be rounding. "
        "Try a newer transformer-lens or another dtype"
    )


def _kinds(name: str) -> dict[str, Callable[..., Any]]:
    """The ways to give a model hooks, the preferred one first."""
    by_configuration = {"HookedTransformer": _hooked_by_configuration, "TransformerBridge": _bridged}
    # TransformerLens knows Gemma by its names alone, and runs the code of some others.
    known = name in OFFICIAL_MODEL_NAMES and not name.startswith(NEED_REMOTE_CODE_MODELS)
    return {f"HookedTransformer as {name}": partial(_hooked, name), **by_configuration} if known else by_configuration


def _hooked(
    known_as: str, hf_model: Any, tokenizer: Any, source: str, dtype: torch.dtype, n_ctx: int | None
) -> HookedSAETransformer:
    with _quiet():
        model = HookedSAETransformer.from_pretrained_no_processing(
            known_as,
            hf_model=hf_model,
            tokenizer=tokenizer,
            device="cpu",
            dtype=dtype,
            n_ctx=n_ctx,
            default_padding_side="right",
        )
    return cast(HookedSAETransformer, model)


def _hooked_by_configuration(
    hf_model: Any, tokenizer: Any, source: str, dtype: torch.dtype, n_ctx: int | None
) -> HookedSAETransformer:
    with _listed(hf_model.config) as folder:
        return _hooked(folder, hf_model, tokenizer, source, dtype, n_ctx)


def _bridged(hf_model: Any, tokenizer: Any, source: str, dtype: torch.dtype, n_ctx: int | None) -> SAETransformerBridge:
    hf_model.set_attn_implementation("eager")  # the others give no patterns to the hooks
    with _quiet():
        model = LastingBridge.boot_transformers(
            source, hf_model=hf_model, tokenizer=tokenizer, dtype=dtype, trust_remote_code=False
        )
    if n_ctx is not None:
        model.cfg.n_ctx = n_ctx
    return model


def _locate(given: str) -> tuple[str, str]:
    """Where Hugging Face finds a model, and what it is called."""
    path = Path(given).expanduser()
    if (path / "config.json").is_file():
        return str(path.resolve()), _folder_name(path.resolve())
    if path.exists() or given.startswith((".", "/", "~")):
        raise ValueError(f"{given} is no Hugging Face model folder: it has no config.json")
    with contextlib.suppress(ValueError):
        given = get_official_model_name(given)
    return given, given


def _configuration(source: str, name: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as e:
        if Path(source).is_dir():
            raise ValueError(f"the configuration of {name} can't be read: {_first_line(e)}") from e
        raise ValueError(
            f"{name!r} is neither a model that Hugging Face's hub gives ({_first_line(e)}) nor a local Hugging Face "
            f"folder.{_near(name)}"
        ) from e
    if config.is_encoder_decoder:
        raise ValueError(f"{name} ({config.model_type}) is an encoder-decoder: only causal language models can be used")
    if config.get_text_config() is not config:  # the bridge would install packages to read images
        raise ValueError(
            f"{name} ({config.model_type}) reads more than text: save its language model alone in a folder"
        )
    return config


def _tokenizer(source: str, name: str) -> Any:
    problem = ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        # Where its files are missing, transformers makes one that knows special tokens alone.
        if len(set(tokenizer.get_vocab()).difference(tokenizer.all_special_tokens)) > 0:
            return tokenizer
    except Exception as e:
        problem = f" ({_first_line(e)})"
    raise ValueError(
        f"{name} has no tokenizer{problem}: put the files of its tokenizer (tokenizer.json, tokenizer_config.json) "
        f"where its weights are, {source}"
    )


def _hf_model(source: str, name: str, dtype: torch.dtype) -> Any:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        model, report = loaded
    except Exception as e:
        raise ValueError(f"Hugging Face can't load {name} as a causal language model: {_first_line(e)}") from e
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"the weights of {name} lack {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}, which "
            f"{type(model).__name__} needs: it was saved as another kind of model, or not as a whole"
        )
    # What the folder says can be another class of the family, or nothing.
    model.config.architectures = [type(model).__name__]
    return model.eval()


def _check_causal(logits: Tensor, name: str, dtype: torch.dtype) -> None:
    if not bool(logits.isfinite().all()):
        raise ValueError(f"the logits of {name} in {dtype} hold NaN or infinite values: load it in a wider dtype")
    if (apart := agreement.difference(*logits[:, : logits.shape[1] // 2])) > agreement.tolerance(dtype):
        raise ValueError(
            f"{name} is not causal: logits change by {apart:.3g} of their spread with the tokens that follow. An atom "
            "is a prompt up to its token, so only causal language models can be used"
        )


def _fingerprint(model: HookedModel) -> list[float] | None:
    """Some logits, up to a constant; None where they are not finite. Run again only when the weights have changed."""
    state = [_state(parameter) for parameter in model.parameters()]
    known = vars(model).get(_FINGERPRINT)
    if known is None or known[0] != state:
        known = vars(model)[_FINGERPRINT] = (state, _some_logits(model))
    return known[1]


@torch.no_grad()
def _some_logits(model: HookedModel) -> list[float] | None:
    n = min(8, model.cfg.n_ctx)
    spaced = [i * model.cfg.d_vocab // (n + 1) for i in range(1, n + 1)]
    logits = model(torch.tensor([spaced], device=model.cfg.device), prepend_bos=False)[0, -1].float()
    chosen = logits[:: max(1, len(logits) // 32)][:32]
    values = [float(f"{value:.5g}") for value in (chosen - chosen.mean()).tolist()]
    return values if all(map(math.isfinite, values)) else None


def _state(parameter: Tensor) -> tuple[int | float, ...]:
    # Edits of `.data` don't bump the version, so some values stand for the rest.
    sample = parameter.detach().flatten()[:: 1 + parameter.numel() // 64]
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, sample.double().nansum().item()


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be one of float32, bfloat16, float16 and float64, got {dtype!r}")
    return found


def _folder_name(folder: str | Path) -> str:
    """What the model in a folder is called: by the folder, or as on the hub in a snapshot of Hugging Face's cache."""
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$", str(folder))
    return f"{cached[1]}/{cached[2]}" if cached else Path(folder).name


def _plain_name(name: str) -> str:
    last = _folder_name(name).rpartition("/")[2]
    with contextlib.suppress(ValueError):
        last = get_official_model_name(last).rpartition("/")[2]
    return last.lower().removeprefix("itda-embedded-")  # the folders of the embedded models are named by seed alone


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, [*OFFICIAL_MODEL_NAMES, *itertools.chain(*MODEL_ALIASES.values())])
    return f" Near it: {', '.join(near)}" if near else ""


def _first_line(error: BaseException) -> str:
    if "trust_remote_code=True" in str(error):
        return "it needs code that comes with it, and no such code is run"
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TransformerLens prints what it has loaded, and warns of long contexts that are the model's own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
