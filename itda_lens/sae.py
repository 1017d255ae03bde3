"""ITDA as a SAELens SAE: pursuit for an encoder, real activations for a decoder."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.sae import SAEMetadata, _disable_hooks
from sae_lens.saes.topk_sae import SparseHookPoint, TopK, act_times_W_dec
from sae_lens.util import dtype_to_str
from torch import Tensor, nn

from itda_lens import integrity, saving
from itda_lens.metadata import with_defaults
from itda_lens.provenance import Provenance
from itda_lens.pursuit import (
    GramCache,
    SparseCodes,
    check_unit_rows,
    coefficients_on_path,
    decode_dense,
    is_transformed,
    lengths,
    matching_pursuit,
    pursue,
    pursue_correlations,
    pursue_further,
    unit_rows,
    untraced,
    without_autocast,
)
from itda_lens.streams.massive import is_massive

ARCHITECTURE = "itda"
_HALF = (torch.bfloat16, torch.float16)
_ENOUGH_FOR_A_MEDIAN = 16


@no_type_check  # SAELens itself passes a plain dict for metadata, and modes that its annotation lacks
@dataclass
class ITDAConfig(SAEConfig):
    """The configuration of an `ITDA`: SAELens's own fields, and the pursuit's.

    Raises:
        ValueError: `k`, `d_in` or `d_sae` below 1, a value of another type, or a normalisation that pursuit can't
            follow.
    """

    k: int = 32
    """L0: the steps of pursuit, so at most this many different atoms for each activation."""
    orthogonal: bool = False
    """After each step all coefficients are the least-squares fit to the chosen atoms."""
    nonnegative: bool = False
    """Only positive coefficients."""
    use_sparse_activations: bool = False
    """`encode` returns a sparse COO tensor in place of a dense one."""

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "d_in", "d_sae"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("orthogonal", "nonnegative", "use_sparse_activations", "apply_b_dec_to_input"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        if self.reshape_activations not in ("none", "hook_z"):
            raise ValueError(f"reshape_activations must be 'none' or 'hook_z', got {self.reshape_activations!r}")
        if self.normalize_activations == "covariance_whitening":
            raise ValueError(
                "normalize_activations='covariance_whitening' does not fit an ITDA, whose encoder is tied to its "
                "atoms: use 'none', 'layer_norm' or 'expected_average_only_in'"
            )


class ITDA(SAE[ITDAConfig]):
    """A dictionary of real activations, encoded by matching pursuit (arXiv 2505.17769), as a SAELens SAE.

    `x - b_dec` is decomposed into `k` atoms; the coefficients are signed; `b_dec` is added back.
    With `apply_b_dec_to_input=False` the bias is neither subtracted nor added.

    Example:
        >>> itda = ITDA.from_atoms(torch.eye(3), k=1)
        >>> itda(torch.tensor([[0.5, -2.0, 0.0]])).tolist()
        [[0.0, -2.0, 0.0]]
    """

    provenance: Provenance | None

    def __init__(self, cfg: ITDAConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.provenance = None
        self._gram = GramCache()
        self._half: torch.dtype | None = None
        self.hook_sae_acts_post = SparseHookPoint(cfg.d_sae)
        self.setup()

    @staticmethod
    def from_atoms(
        atoms: Float[Tensor, "n d"],
        k: int,
        *,
        bias: Float[Tensor, " _"] | None = None,
        provenance: Provenance | None = None,
        metadata: SAEMetadata | dict[str, Any] | None = None,
        **cfg: Any,
    ) -> "ITDA":
        """An ITDA of given atoms.

        Args:
            atoms: unit rows.
            k: L0, at most `n`.
            bias: subtracted before pursuit and added after it; zeros if not given.
            provenance: where the atoms come from.
            metadata: what SAELens should know: `model_name`, `hook_name`, `context_size`, `prepend_bos`, ...
            cfg: other fields of `ITDAConfig`.

        Raises:
            ValueError: no atoms, atoms that are not finite or not of unit length, `k` out of range, or a bias or
                provenance of another size.

        Example:
            >>> ITDA.from_atoms(torch.eye(3), k=2).cfg.d_sae
            3
        """
        n, d = atoms.shape
        if n == 0:
            raise ValueError("atoms is empty: an ITDA needs at least one atom")
        _check_k(k, n)
        saving.check_atoms(atoms, provenance)
        if bias is not None and bias.shape != (d,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, but atoms of width {d} need ({d},)")
        if isinstance(metadata, dict):
            metadata = SAEMetadata(**metadata)
        metadata = with_defaults(metadata or SAEMetadata())
        whole_hook_z = (metadata.hook_name or "").endswith("hook_z") and metadata.hook_head_index is None
        cfg = {
            "dtype": str(atoms.dtype).removeprefix("torch."),
            "device": str(atoms.device),
            "reshape_activations": "hook_z" if whole_hook_z else "none",
        } | cfg
        itda = ITDA(ITDAConfig(d_in=d, d_sae=n, k=k, metadata=metadata, **cfg))
        itda.W_dec.data = unit_rows(atoms.detach().to(itda.device, itda.dtype)).clone(
            memory_format=torch.contiguous_format
        )
        if bias is not None:
            itda.b_dec.data = bias.detach().to(itda.device, itda.dtype, copy=True)
        itda.provenance = provenance
        return itda

    @classmethod
    def get_sae_config_class_for_architecture(cls, architecture: str) -> type[SAEConfig]:
        """The first that SAELens asks for when it loads. Raises ValueError for what is no ITDA."""
        if architecture != ARCHITECTURE:
            raise ValueError(
                f"this holds a {architecture!r} SAE, not an ITDA: use SAE.load_from_disk or SAE.from_pretrained"
            )
        return ITDAConfig

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # SAELens's functions for this would go on keeping their statistics in the SAE that was copied.
        self._setup_activation_normalization()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ITDA":
        # `.half()`, `.cuda()` and a model that is moved all come here, past SAELens's `to`.
        super()._apply(fn, recurse)
        self.dtype, self.device = self.W_dec.dtype, self.W_dec.device
        self.cfg.dtype, self.cfg.device = dtype_to_str(self.dtype), str(self.device)
        return self

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        """The encoder's directions are the atoms: `W_dec.T`."""
        return self.W_dec.T

    @property
    def atoms(self) -> Float[Tensor, "n d"]:
        """The dictionary: `W_dec`."""
        return self.W_dec

    def initialize_weights(self) -> None:
        """Unit rows in random directions, from a fixed seed; to be replaced by real activations."""
        shape = (self.cfg.d_sae, self.cfg.d_in)
        if self.device.type == "meta":
            rows = torch.empty(shape, dtype=self.dtype, device=self.device)
        else:
            rows = torch.randn(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
            rows = nn.functional.normalize(rows, dim=-1).to(self.device, self.dtype)
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_in, dtype=self.dtype, device=self.device))

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        # Never called here; tools that look for a TopK (sae-dashboard) then leave the encoder whole.
        return TopK(self.cfg.k)

    @without_autocast
    def encode(self, x: Float[Tensor, "*dims"]) -> Tensor:
        """The coefficient of each atom, `[..., d_sae]`, dense unless `use_sparse_activations`.

        `hook_sae_acts_pre` gets the correlations that pursuit starts from and `hook_sae_acts_post` the coefficients.

        Raises:
            ValueError: the activations have another width than the atoms.
        """
        sae_in = self._preprocess(x)
        hook = self.hook_sae_acts_pre
        hooked = getattr(hook, "_forward_hooks", None) or getattr(hook, "_backward_hooks", None)
        codes = self._pursue_hooked(sae_in) if hooked else self._pursue(sae_in)
        codes = codes._replace(values=codes.values.to(self.dtype))
        n = self.cfg.d_sae
        return self.hook_sae_acts_post(codes.to_coo(n) if self.cfg.use_sparse_activations else codes.to_dense(n))

    @without_autocast
    def encode_sparse(self, x: Float[Tensor, "*dims"]) -> SparseCodes:
        """The path of pursuit, `k` pairs in order of choice, in float32; preprocesses as `encode`, fires no hooks."""
        with _disable_hooks(self):
            return self._pursue(self._preprocess(x))

    @without_autocast
    def decode(self, feature_acts: Tensor) -> Tensor:
        """The weighted sum of the atoms, plus the bias."""
        acts, atoms = feature_acts, self.W_dec
        if acts.is_sparse and acts.dtype in _HALF:
            acts, atoms = acts.float(), atoms.float()  # torch has no sparse product in half precision
        recons = act_times_W_dec(acts, atoms, False) if acts.is_sparse else decode_dense(acts, atoms)
        recons = self.hook_sae_recons(recons.to(self.dtype) + self.b_dec * self.cfg.apply_b_dec_to_input)
        recons = self.run_time_activation_norm_fn_out(recons).to(self._half or recons.dtype)
        return recons if self.d_head is None else recons.unflatten(-1, (-1, self.d_head))

    def crop(self, n: int) -> "ITDA":
        """An ITDA of the first `n` atoms, as the paper does to compare at a fixed size."""
        if not 1 <= n <= self.cfg.d_sae:
            raise ValueError(f"n must be between 1 and the {self.cfg.d_sae} atoms of this dictionary, got {n}")
        provenance = None if self.provenance is None else self.provenance.select(range(n))
        return self.with_atoms(self.W_dec[:n], provenance)

    def with_k(self, k: int) -> "ITDA":
        """The same dictionary with another L0."""
        return self.with_pursuit(k=k)

    def with_pursuit(self, **settings: Any) -> "ITDA":
        """The same dictionary with another `k`, `orthogonal` or `nonnegative`; what is not named stays.

        Example:
            >>> ITDA.from_atoms(torch.eye(3), k=2).with_pursuit(orthogonal=True).cfg.orthogonal
            True
        """
        if unknown := settings.keys() - {"k", "orthogonal", "nonnegative"}:
            raise TypeError(f"{', '.join(sorted(unknown))}: pursuit has the settings k, orthogonal and nonnegative")
        return self.with_atoms(self.W_dec, self.provenance, **settings)

    def with_atoms(self, atoms: Float[Tensor, "n d"], provenance: Provenance | None = None, **changes: Any) -> "ITDA":
        """An ITDA of other atoms, as many as there are, in which everything else stays: bias, settings, metadata.

        Args:
            atoms: unit rows of the same width.
            provenance: where they come from.
            changes: other values for fields of `ITDAConfig`.

        Example:
            >>> ITDA.from_atoms(torch.eye(3), k=2, nonnegative=True).with_atoms(-torch.eye(3)).cfg.nonnegative
            True
        """
        own = {f.name: getattr(self.cfg, f.name) for f in fields(self.cfg)} | changes
        for name in ("d_in", "d_sae"):
            del own[name]
        own["metadata"] = copy.deepcopy(self.cfg.metadata)
        return ITDA.from_atoms(atoms, bias=self.b_dec, provenance=provenance, **own)

    def nonnegative_view(self) -> "NonnegativeView":
        """The same dictionary with `2 n` latents, `[c+, c-]` over the atoms `[D, -D]`, for tools that test `> 0`.

        Example:
            >>> itda = ITDA.from_atoms(torch.eye(2), k=1)
            >>> itda.nonnegative_view().encode(torch.tensor([[0.5, -2.0]])).tolist()
            [[0.0, 0.0, 0.0, 2.0]]
        """
        own = {f.name: copy.deepcopy(getattr(self.cfg, f.name)) for f in fields(self.cfg)}
        view = NonnegativeView(ITDAConfig(**own | {"d_sae": 2 * self.cfg.d_sae, "nonnegative": True}))
        view.signed = not self.cfg.nonnegative
        view.W_dec.data = torch.cat([self.W_dec.data, -self.W_dec.data])
        view.b_dec.data = self.b_dec.data.clone()
        if self.provenance is not None:
            view.provenance = self.provenance.select([*range(self.cfg.d_sae)] * 2)
        return view

    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Float[Tensor, " n"]:
        """The rows' norms, all 1: there is nothing to fold. Raises NotImplementedError when they are not."""
        norms = self.get_W_dec_norm()
        try:
            check_unit_rows(norms)
        except ValueError as e:
            raise NotImplementedError(f"an ITDA's norms can't be folded, since pursuit needs unit rows: {e}") from e
        return norms

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Take raw activations from now on: pursuit scales with its input, so only the bias moves."""
        self.b_dec.data /= scaling_factor
        self.cfg.normalize_activations = "none"

    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        raise NotImplementedError(
            "whitening can't be folded into an ITDA, whose encoder is tied to its atoms: "
            "build it on whitened activations"
        )

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save `sae_weights.safetensors` and `cfg.json` to a folder; gives their paths.

        An ITDA that was there is replaced at once: if saving fails or is killed, the folder holds the one or the other.
        """
        return saving.save(self, path)

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        saving.pack(state_dict, self.cfg, self.provenance)

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        contents = saving.take_out(state_dict)
        if contents.note and (own := integrity.interrupted(contents.note, self.cfg, state_dict)):
            self._configure(own)
        self.provenance = saving.check(state_dict, self.cfg, contents)

    def _configure(self, own: dict[str, Any]) -> None:
        # Once more from the beginning: SAELens began with the configuration of the ITDA that this one replaces.
        dtype, device = self.cfg.dtype, self.cfg.device
        metadata = SAEMetadata(**own.pop("metadata"))
        ITDA.__init__(self, ITDAConfig(**own, metadata=metadata, dtype=dtype, device="meta"))
        self.cfg.device = device

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        # SAELens's own joins heads at hook_z alone; here `encode` sees by itself whether activations have some.
        self.turn_off_forward_pass_hook_z_reshaping()

    def _preprocess(self, x: Tensor) -> Tensor:
        may_have_heads = x.ndim > 3 or (x.ndim > 1 and self.cfg.reshape_activations == "hook_z")
        split = may_have_heads and x.shape[-1] != self.cfg.d_in
        joined = x.flatten(-2) if split else x
        width = joined.shape[-1] if x.ndim else 0
        if width != self.cfg.d_in:
            raise ValueError(
                f"the activations have shape {tuple(x.shape)}, hence width {width}, but this dictionary's atoms have "
                f"width {self.cfg.d_in}: they come from {self.cfg.metadata.hook_name or 'another hook point'} of "
                f"{self.cfg.metadata.model_name or 'another model'}"
            )
        if x.ndim > 3 and (head := self.cfg.metadata.hook_head_index) is not None:
            raise ValueError(
                f"this dictionary is of head {head} of {self.cfg.metadata.hook_name} alone, but got all heads (shape "
                f"{tuple(x.shape)}), as SAELens's run_with_saes and add_sae do: replace that head in run_with_hooks, "
                f"x[:, :, {head}] = itda(x[:, :, {head}])"
            )
        # What `decode` gives back is shaped and typed as what came in: a model takes no other.
        self.d_head = x.shape[-1] if split else None
        self._half = x.dtype if x.dtype in _HALF else None
        return self.process_sae_in(joined)

    def _pursue(self, sae_in: Tensor) -> SparseCodes:
        return self._decompose(sae_in, self.W_dec, self.cfg.nonnegative)

    def _decompose(self, sae_in: Tensor, atoms: Tensor, nonnegative: bool) -> SparseCodes:
        gram, k, orthogonal = self._gram, self.cfg.k, self.cfg.orthogonal
        codes = matching_pursuit(sae_in, atoms, k, gram=gram, nonnegative=nonnegative, orthogonal=orthogonal)
        if not self._knows_no_usual_norm:
            return codes
        massive, usual = self._massive(sae_in)
        if not massive.any():
            return codes
        flat = SparseCodes(*(part.reshape(-1, k) for part in codes))
        rows = sae_in.reshape(-1, sae_in.shape[-1])
        found = pursue_further(rows, flat, atoms, massive.flatten(), usual, gram=gram, nonnegative=nonnegative)
        return SparseCodes(*(part.reshape(*massive.shape, -1) for part in found))

    @property
    def _knows_no_usual_norm(self) -> bool:
        record: Any = self.cfg.metadata.itda_build or {}
        from_model = self.cfg.metadata.hook_name is not None and self.cfg.normalize_activations == "none"
        return from_model and record.get("typical_norm") is None

    def _massive(self, sae_in: Tensor) -> tuple[Tensor, Tensor]:
        """Which activations are massive and have no atoms of their own, and the usual norm.

        Dictionaries from before such tokens got atoms hold none that explain BOS, and the model is lost without it.
        They do not know what norm is usual, either: it is taken from the activations that come together.
        """
        norms = lengths(sae_in.detach().float())
        if not self._knows_no_usual_norm or norms.numel() < _ENOUGH_FOR_A_MEDIAN:
            return torch.zeros_like(norms, dtype=torch.bool), norms.new_zeros(())
        usual = norms.median()
        return is_massive(norms, usual), usual

    @untraced
    def _pursue_hooked(self, sae_in: Tensor) -> SparseCodes:
        if is_transformed():
            raise NotImplementedError(
                "torch.vmap and torch.func can't follow what a hook makes of correlations: take the hooks off "
                "hook_sae_acts_pre (itda.reset_hooks())"
            )
        # What a hook makes of the correlations is where pursuit starts.
        dtype = torch.promote_types(self.dtype, torch.float32)
        start = sae_in.to(dtype) @ self.W_dec.to(dtype).T
        edits = None if start.is_inference() else start._version
        correlations = self.hook_sae_acts_pre(start)
        seen = correlations is start and edits is not None and edits == start._version
        x = sae_in.to(dtype) if seen else None  # a hook that only looks on costs no precision
        codes = self._pursue_from(correlations, self.W_dec, self.cfg.nonnegative, x)
        massive, _ = self._massive(sae_in)
        if not massive.any():
            return codes
        unhooked = self._pursue(sae_in)  # codes of massive tokens are longer than correlations can tell
        more = unhooked.values.shape[-1] - codes.values.shape[-1]
        own = (nn.functional.pad(part, (0, more)) for part in codes)
        return SparseCodes(*(torch.where(massive[..., None], *both) for both in zip(unhooked, own, strict=True)))

    def _pursue_from(self, correlations: Tensor, atoms: Tensor, nonnegative: bool, x: Tensor | None) -> SparseCodes:
        gram, k, orthogonal = self._gram.get(atoms), self.cfg.k, self.cfg.orthogonal
        atoms, start = atoms.to(correlations.dtype), correlations.detach().reshape(-1, len(atoms))
        solve = pursue_correlations
        if orthogonal and x is not None:
            solve, start = pursue, x.detach().reshape(-1, x.shape[-1])
        values, indices = solve(start, atoms.detach(), gram, k, nonnegative=nonnegative, orthogonal=orthogonal)
        if torch.is_grad_enabled():
            on_path = correlations.reshape(-1, len(atoms)).gather(-1, indices)
            replayed = coefficients_on_path(on_path, atoms[indices], values != 0, orthogonal)
            values = values + (replayed - replayed.detach())  # their gradients alone
        shape = (*correlations.shape[:-1], k)
        return SparseCodes(values.reshape(shape), indices.reshape(shape))


class NonnegativeView(ITDA):
    """What `ITDA.nonnegative_view` gives: the signed codes `c` as `[c+, c-]`, over the atoms `[D, -D]`.

    It encodes, decodes and is hooked as any SAE. It is not saved: save the ITDA, and take its view again.
    """

    signed: bool = True

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError("a non-negative view is not saved: save the ITDA itself, and take its view again")

    def _pursue(self, sae_in: Tensor) -> SparseCodes:
        n = self.cfg.d_sae // 2
        return self._split(*self._decompose(sae_in, self.W_dec[:n], not self.signed))

    def _pursue_from(self, correlations: Tensor, atoms: Tensor, nonnegative: bool, x: Tensor | None) -> SparseCodes:
        n = self.cfg.d_sae // 2
        if self.cfg.orthogonal:  # a fit over [D, -D] is another where a coefficient changes its sign on the way
            return self._split(*super()._pursue_from(correlations[..., :n], atoms[:n], not self.signed, x))
        values, indices = super()._pursue_from(correlations, atoms, nonnegative, x)
        return self._split(torch.where(indices < n, values, -values), indices % n)

    def _split(self, values: Tensor, indices: Tensor) -> SparseCodes:
        values, indices = SparseCodes(values, indices).merge()
        return SparseCodes(values.abs(), torch.where(values < 0, indices + self.cfg.d_sae // 2, indices))


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the number of atoms, {n}, got {k}")


def _register() -> None:
    held = SAE_CLASS_REGISTRY.get(ARCHITECTURE)
    if held is not None and held[0].__module__ != __name__:
        raise RuntimeError(
            f"SAELens already has an architecture {ARCHITECTURE!r}, from {held[0].__module__}: "
            "itda_lens can't be used beside it"
        )
    SAE_CLASS_REGISTRY.pop(ARCHITECTURE, None)  # our own class, from before a reload
    register_sae_class(ARCHITECTURE, ITDA, ITDAConfig)


_register()
