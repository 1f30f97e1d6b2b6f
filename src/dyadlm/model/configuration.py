"""The configuration: few fields, the rest derived, everything validated together.

Dimension letters: D hidden_size, L num_hidden_layers, K num_levels, R level_rank; level k has windows of 2^k tokens.
"""

import difflib
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from dyadlm.errors import UserError
from dyadlm.model.presets import PRESETS
from dyadlm.ops.pyramid import ALIGNMENTS, EARLY

LEVEL_FEATURES: dict[str, tuple[str, ...]] = {
    "transport": ("transport",),
    "difference": ("difference",),
    "pair": ("current", "previous"),
    "centroid": ("current",),
    "transport+centroid": ("transport", "current"),
    "transport+pair": ("transport", "current", "previous"),
    "product+pair": ("product", "current", "previous"),
}
TRANSPORT_SPACES = ("level", "model")
HYBRID_SLIDING_WIDTH = 8
WIDEST_SLIDING_LEVEL = 16
BYTE_VOCABULARY = 259
BYTE_SPECIALS = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}


class DyadConfig(PreTrainedConfig):
    """Configuration of a dyadic phase-transport language model.

    Args:
        vocab_size: number of tokens.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: L, blocks.
        intermediate_size: width of the SwiGLU; None: 8/3 of D, rounded up to a multiple of 16.
        max_position_embeddings: the length trained on, in tokens. Longer contexts work; evaluation windows default to
            it.
        tie_word_embeddings: whether the head shares the embedding's weight.
        num_levels: K; None: as many as make the two widest windows span `max_position_embeddings`.
        level_rank: R, the width of each level's bottleneck, one number or one per level; None: as wide as lets a level
            have 3/4 D^2 parameters, whatever its feature.
        level_alignment: `hybrid` (sliding up to 8 tokens, dual beyond), one of sliding | block | dual | prefix for all
            levels, or a list of K of them. dual needs two tokens, so level 0 cannot have it.
        level_feature: what a level says of its current and previous centroid: transport | difference | pair |
            centroid | transport+centroid | transport+pair | product+pair (their elementwise product beside both).
        transport_space: where transport is taken: `level`, after the bottleneck, or `model`, before it.
        early: what counts before a document starts: zero | partial | mask (`dyadlm.ops.pyramid`).
        dropout: on the embedding and on what each block adds.
        pad_token_id, bos_token_id, eos_token_id: None: those of the byte tokenizer if the vocabulary is of its size.

    Raises:
        UserError: a value that does not fit, with the remedy.
    """

    model_type = "dyadlm"

    vocab_size: int = 259
    hidden_size: int = 128
    num_hidden_layers: int = 4
    intermediate_size: int | None = None
    max_position_embeddings: int = 256
    tie_word_embeddings: bool = True
    num_levels: int | None = None
    level_rank: int | list[int] | None = None
    level_alignment: str | list[str] = "hybrid"
    level_feature: str = "product+pair"
    transport_space: str = "level"
    early: str = "zero"
    dropout: float = 0.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            _require_positive(name, getattr(self, name))
        if self.num_levels is None:
            self.num_levels = max(1, (self.max_position_embeddings - 1).bit_length())
        _require_positive("num_levels", self.num_levels)
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 16) * 16
        _require_positive("intermediate_size", self.intermediate_size)
        if self.level_rank is None:
            _require_choice("level_feature", self.level_feature, tuple(LEVEL_FEATURES))
            self.level_rank = max(1, round(0.75 * self.hidden_size / (1 + len(self.feature_parts))))
        if isinstance(self.level_rank, tuple):
            self.level_rank = list(self.level_rank)
        for rank in self.level_rank if isinstance(self.level_rank, list) else [self.level_rank]:
            _require_positive("level_rank", rank)
        for name in ("level_rank", "level_alignment"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.num_levels:
                raise UserError(
                    f"{name} lists {len(value)} levels but num_levels is {self.num_levels}; "
                    f"give {self.num_levels} entries, one value for all levels, or another num_levels."
                )
        if not isinstance(self.level_alignment, (str, list, tuple)):
            raise UserError(
                f"level_alignment is {self.level_alignment!r}; give one alignment or a list of {self.num_levels}."
            )
        if isinstance(self.level_alignment, str):
            _require_choice("level_alignment", self.level_alignment, ("hybrid", *ALIGNMENTS))
        for level, alignment in enumerate(self.alignments):
            _require_choice("level_alignment", alignment, ALIGNMENTS)
            if alignment == "dual" and level == 0:
                raise UserError(
                    "level 0 is one token wide and cannot be dual; start level_alignment with sliding or block."
                )
        widest = max((k for k, a in enumerate(self.alignments) if a == "sliding"), default=0)
        if widest > WIDEST_SLIDING_LEVEL:
            raise UserError(
                f"A sliding level {widest} would keep 2^{widest} sums a block; use hybrid or dual for levels "
                f"above {WIDEST_SLIDING_LEVEL}."
            )
        _require_choice("level_feature", self.level_feature, tuple(LEVEL_FEATURES))
        _require_choice("transport_space", self.transport_space, TRANSPORT_SPACES)
        _require_choice("early", self.early, EARLY)
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout is {self.dropout!r}; it must be at least 0 and below 1.")
        self._settle_specials()
        super().__post_init__(**kwargs)

    def _settle_specials(self) -> None:
        for name, byte_id in BYTE_SPECIALS.items():
            given = getattr(self, name)
            if given is None and self.vocab_size == BYTE_VOCABULARY:
                setattr(self, name, byte_id)
            for number in given if isinstance(given, list) else [given]:
                if number is not None and not 0 <= number < self.vocab_size:
                    raise UserError(f"{name} is {number} but vocab_size is {self.vocab_size}; give an id below that.")

    @property
    def alignments(self) -> list[str]:
        """The alignment of each level."""
        levels = self.num_levels or 0
        if self.level_alignment == "hybrid":
            return ["sliding" if 2**k <= HYBRID_SLIDING_WIDTH else "dual" for k in range(levels)]
        return [self.level_alignment] * levels if isinstance(self.level_alignment, str) else list(self.level_alignment)

    @property
    def ranks(self) -> list[int]:
        """The bottleneck's rank at each level."""
        return (
            self.level_rank if isinstance(self.level_rank, list) else [int(self.level_rank or 1)] * len(self.alignments)
        )

    @property
    def feature_parts(self) -> tuple[str, ...]:
        """The vectors of rank R that make up a level's feature."""
        return LEVEL_FEATURES[self.level_feature]

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DyadConfig":
        """The configuration of a preset, with fields overridden; sizes that derive from them follow.

        Raises:
            UserError: no such preset or field, or a value that does not fit the rest.
        """
        if name not in PRESETS:
            raise UserError(f"There is no preset '{name}'; choose one of {', '.join(PRESETS)}.")
        known = {field.name for field in fields(cls)}
        for key in overrides:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else "see DyadConfig for the fields there are."
                raise UserError(f"The model has no field '{key}'; {hint}")
        return cls(**{**PRESETS[name], **overrides})


def _require_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least 1.")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
