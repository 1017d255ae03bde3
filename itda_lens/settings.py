"""Settings: what functions take, and the options of the command line.

The command line reads them before torch is imported, which takes seconds: nothing heavy is imported here.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from itda_lens.building.builder import DictionaryBuilder

LossName = Literal["relative", "cosine", "paper"]


@dataclass
class BuildConfig:
    """How dictionaries are built. Give `n_atoms` and `tokens`, or a `threshold`."""

    k: int = 32
    """L0: atoms for each activation."""
    n_atoms: int | None = None
    """Atoms wanted, 4096 if not given; with a threshold, where to stop (nowhere if not given)."""
    tokens: int | None = None
    """Budget: how many tokens of the stream are judged, a million if not given; with a threshold, all of them."""
    threshold: float | None = None
    """Loss above which a token becomes an atom; if not given it moves by itself to meet n_atoms."""
    loss: LossName = "relative"
    """Loss of a reconstruction: relative, cosine or paper."""
    center: bool = True
    """Subtract the mean of the first tokens before pursuit."""
    center_tokens: int = 2048
    """How many tokens the mean is taken over."""
    orthogonal: bool = True
    """Encode by orthogonal pursuit: less is lost at equal L0; the paper's is plain."""
    context_size: int = 128
    """Tokens in a row."""
    batch_size: int = 32
    """Rows in a forward pass."""
    prepend_bos: bool = True
    """Whether each row begins with BOS."""
    pack: bool = True
    """Join documents and cut them (as SAELens does); otherwise one document is one row."""
    exclude_special_tokens: bool = True
    """Never take BOS, EOS or padding for an atom, but for massive ones (attention sinks)."""
    hook_head_index: int | None = None
    """Take this attention head alone, at hooks that have heads."""
    seqpos_slice: tuple[int | None, ...] = (None,)
    """Take only positions in this slice."""
    column: str | None = None
    """The dataset's column with the text, when it is not called text."""
    dataset_name: str | None = None
    """What the metadata calls the dataset; known by itself for names and files."""
    device: str | None = None
    """Where dictionaries are held while they are built; the model's device if not given."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        if self.threshold is None:
            self.n_atoms = 4096 if self.n_atoms is None else self.n_atoms
            self.tokens = 1_000_000 if self.tokens is None else self.tokens

    def builder(self, d_in: int, **settings: Any) -> "DictionaryBuilder":
        """A builder of these settings for activations of one width."""
        from itda_lens.building.builder import DictionaryBuilder

        return DictionaryBuilder(
            d_in,
            self.k,
            threshold=self.threshold,
            n_atoms=self.n_atoms,
            tokens=self.tokens,
            loss=self.loss,
            center=self.center,
            center_tokens=self.center_tokens,
            orthogonal=self.orthogonal,
            **settings,
        )


@dataclass
class MatchingConfig:
    """How layers are matched."""

    tokens: int = 100_000
    """How many tokens of the stream are used."""
    sample: int = 4096
    """A fixed sample of them, for neighbours, anchors and permutations: better several times the model's width."""
    n_atoms: int = 1000
    """The size of dictionaries that are compared at equal size."""
    threshold: float = 0.2
    """The loss above which a token becomes an atom, for dictionaries that are compared at equal threshold."""
    k: int = 8
    """L0."""
    dictionaries: int = 24
    """Graded membership is a mean over this many small dictionaries."""
    small_atoms: int = 100
    """Atoms of each of those."""
    beginning: int = 10_000
    """Their atoms are drawn from this many tokens at the beginning."""
    permutations: int = 100
    """How many permutations similarities are calibrated against; 0 for none."""
    context_size: int = 128
    """Tokens in a row."""
    batch_size: int = 32
    """Rows in a forward pass."""
    column: str | None = None
    """The dataset's column with the text, when it is not called text."""
    seed: int = 0
    """Of the sample, of anchors, prompts and permutations."""
    progress: bool = True
    """Show progress bars."""
