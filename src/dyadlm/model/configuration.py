"""The configuration: few fields, the rest derived, everything validated together.

Dimension letters: D hidden_size, L num_hidden_layers, K num_levels, R level_rank; level k has windows of 2^k tokens.
"""

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from dyadlm.errors import UserError
from dyadlm.model.boundaries import LEARNED, SEMANTIC_LEVELS
from dyadlm.model.presets import PRESETS
from dyadlm.ops import selection, slots
from dyadlm.ops.contexts import tag_words
from dyadlm.ops.pyramid import ALIGNMENTS, EARLY
from dyadlm.values import coerce_fields

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
TOWERS = ("layer", "input")
MIXERS = ("convolution", "delta", "outer")
DELTA_HEAD = 16  # numbers of a key and of a value
SELECTORS = ("none", *selection.KINDS)
CHOOSING = ("topk", "gumbel")
LEARNED_CODE = "code"
CODE_BITS = 16
PLANNERS = ("none", "head", "stack")
SIGHTS = ("forecast", "both")
POOLS = ("product", "learned")
HYBRID_SLIDING_WIDTH = 8
WIDEST_SLIDING_LEVEL = 16
BYTE_VOCABULARY = 259
BYTE_SPECIALS = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}


log = logging.getLogger("dyadlm")

# Fields of every configuration of transformers that change what a dyadlm model returns; the others describe a file.
BASE_FIELDS: dict[str, Any] = {"output_hidden_states": bool | None, "return_dict": bool | None}


class DyadConfig(PreTrainedConfig):
    """Configuration of a dyadlm model.

    The defaults are the plain composition: geometric levels alone, without semantic levels, slots or salience. The
    presets have these; start from one with `DyadConfig.from_preset("tiny", hidden_size=...)`.

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
        tower: `layer`: each block builds its levels from its own input; `input`: one tower from the embedding, read
            by all.
        semantic_levels: levels over segments of meaning, beside the geometric ones: syllable, word, sentence, line,
            paragraph (rules on the tokens' text), learned (a router's boundaries). None: none.
        semantic_memory: how many complete segments a semantic level shows beside the open one: 1 or 2.
        boundary_rate: the share of tokens at which the learned boundary is trained to begin a segment.
        salience: whether tokens count in a centroid by learned weights.
        forgetting: whether the open segments of semantic levels forget at a rate that depends on the token.
        selector: how the levels' contributions are weighed per token and head: none (added up), dense (softmax), or
            exactly sparse: topk, entmax, gumbel (`dyadlm.ops.selection`).
        selector_heads: groups of channels that each choose; they divide D.
        selector_count: levels that topk chooses.
        selector_margin: how much evidence holds a choice of topk or gumbel; 0: none.
        selector_balance: step by which topk and gumbel correct their bias towards an even load; 0: not at all.
        slot_contexts: what identity slots are addressed by: numbers of tokens, `word` (the open word), `code` (a
            learned code of the state). One table each. None: no slots.
        slot_layers: blocks that have slots, if there are contexts; None: the later half.
        slot_entries: entries of each table. Weights do not depend on it: it may be changed when a model is loaded.
        slot_ways: W, entries of a set. slot_width: M, numbers a slot keeps.
        slot_values: how values are kept, float32 | float16. What is read is what is kept. Weights do not depend on it.
        slot_evict: what leaves a full set: `ring`: its oldest entry; `lru`: the one whose context was seen longest ago,
            and each context has one entry. Weights do not depend on it.
        slot_scope: `document`: tables are empty where a document starts; `stream`: they live on. Weights do not depend
            on it: it may be changed after loading.
        slot_gate: whether a learned gate decides what is written.
        ngram_sizes: n-grams whose hashed embeddings are added to that of the token (`dyadlm.model.ngrams`): numbers of
            tokens, `word` (the open word). One table each. None: none.
        ngram_entries: rows of each table. ngram_width: M, numbers of a row.
        mixers: what mixes tokens beside levels and slots (`dyadlm.model.extras`): convolution (short and causal,
            before the tower and the SwiGLU), delta (one more level: a memory under the gated delta rule), outer (one
            more level: linear attention in the windows of the others). None: nothing.
        decision_slots: whether each head of the selector keeps its last decision, its choice and what that said.
        planner: whether the model forecasts the next node of each level of its last block and plans by them
            (`dyadlm.model.extras.planner`), and how it proposes the token after next: none | head (from the hidden
            state and the forecasts) | stack (the last block, run on what is expected).
        planner_width: numbers that the recurrence of each level keeps.
        planner_futures: m, tokens after next that are considered.
        artist_sees: `forecast`: the future as foreseen alone; `both`: the hidden state beside it.
        pool: the weight of the artist in the consensus. `product`: that of the engineer; `learned`: one for each
            token, computed from the hidden state, 0 at first.
        consensus: the mass of the engineer's nucleus inside which the artist chooses; 0: logits are the engineer's.
            In evaluation mode alone; weights do not depend on it: it may be changed after loading.
        early: what counts before a document starts: zero | partial | mask (`dyadlm.ops.pyramid`).
        dropout: on the embedding and on what each block adds.
        pad_token_id, bos_token_id, eos_token_id: None: those of the byte tokenizer if the vocabulary is of its size.

    Raises:
        UserError: a value that does not fit, with the remedy.
    """

    model_type = "dyadlm"
    # Of the outputs Trainer gathers as predictions all but the logits are left out.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values", "hidden_states", "routes", "boundaries", "metrics", "plan",
    ]  # fmt: skip

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
    tower: str = "layer"
    semantic_levels: list[str] | None = None
    semantic_memory: int = 1
    boundary_rate: float = 0.2
    salience: bool = False
    forgetting: bool = False
    selector: str = "none"
    selector_heads: int = 32
    selector_count: int = 3
    selector_margin: float = 0.0
    selector_balance: float = 1e-4
    slot_contexts: list[int | str] | None = None
    slot_layers: list[int] | None = None
    slot_entries: int = 1024
    slot_ways: int = 8
    slot_width: int = 16
    slot_values: str = "float32"
    slot_evict: str = "ring"
    slot_scope: str = "document"
    slot_gate: bool = False
    ngram_sizes: list[int | str] | None = None
    ngram_entries: int = 16_384
    ngram_width: int = 24
    mixers: list[str] | None = None
    decision_slots: bool = False
    planner: str = "none"
    planner_width: int = 32
    planner_futures: int = 1
    artist_sees: str = "forecast"
    pool: str = "product"
    consensus: float = 0.0
    early: str = "zero"
    dropout: float = 0.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, byte_id in BYTE_SPECIALS.items():
            if getattr(self, name) is None and self.vocab_size == BYTE_VOCABULARY:
                setattr(self, name, byte_id)
        self.settle()
        for name in kwargs:
            if near := difflib.get_close_matches(name, self.field_types(), n=1, cutoff=0.8):
                log.warning("DyadConfig has no field %s, so it changes nothing; the nearest is %s.", name, near[0])
        super().__post_init__(**kwargs)

    def settle(self) -> None:
        """Derive what is not given, and check all fields together. Raises `UserError` if they do not fit."""
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
        self.semantic_levels = list(self.semantic_levels or [])
        self.slot_contexts = list(self.slot_contexts or [])
        self.ngram_sizes = list(self.ngram_sizes or [])
        self.mixers = list(self.mixers or [])
        for name in self.semantic_levels:
            _require_choice("semantic_levels", name, SEMANTIC_LEVELS)
        for name in self.mixers:
            _require_choice("mixers", name, MIXERS)
        for field in ("semantic_levels", "slot_contexts", "ngram_sizes", "mixers"):
            if len(set(getattr(self, field))) < len(getattr(self, field)):
                raise UserError(f"{field} names something twice ({getattr(self, field)}); name each once.")
        self.mixers = [name for name in MIXERS if name in self.mixers]  # in whatever order they were named
        for name, levels in (
            ("level_rank", self.num_levels + len(self.semantic_levels)),
            ("level_alignment", self.num_levels),
        ):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != levels:
                raise UserError(
                    f"{name} lists {len(value)} levels but there are {levels}; "
                    f"give {levels} entries, one value for all levels, or another num_levels."
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
        _require_choice("tower", self.tower, TOWERS)
        _require_choice("semantic_memory", self.semantic_memory, (1, 2))
        if self.forgetting and not self.semantic_levels:
            raise UserError("forgetting is of the open segments of semantic levels; set semantic_levels too.")
        _require_between("dropout", self.dropout, 0.0, 1.0)
        _require_between("rms_norm_eps", self.rms_norm_eps, 0.0, 1.0)
        _require_between("initializer_range", self.initializer_range, 0.0, float("inf"))
        _require_between("boundary_rate", self.boundary_rate, 0.01, 1.0)
        self._settle_selector()
        self._settle_slots()
        self._settle_ngrams()
        self._settle_planner()
        self._settle_specials()

    def _settle_selector(self) -> None:
        _require_choice("selector", self.selector, SELECTORS)
        for name in ("selector_heads", "selector_count"):
            _require_positive(name, getattr(self, name))
        if self.selector != "none" and self.hidden_size % self.selector_heads:
            raise UserError(
                f"selector_heads is {self.selector_heads}; choose a divisor of hidden_size {self.hidden_size}."
            )
        if self.selector == "topk" and self.selector_count > len(self.ranks):
            raise UserError(
                f"selector_count is {self.selector_count} but there are {len(self.ranks)} levels; choose fewer."
            )
        _require_between("selector_margin", self.selector_margin, 0.0, float("inf"))
        _require_between("selector_balance", self.selector_balance, 0.0, 1.0)
        if self.selector_margin and self.selector not in CHOOSING:
            raise UserError(f"selector_margin holds choices, and {self.selector} makes none; use topk or gumbel, or 0.")
        if self.decision_slots and self.selector == "none":
            raise UserError("decision_slots keep what a selector chose; set selector too.")

    def _settle_slots(self) -> None:
        assert self.slot_contexts is not None
        if self.read_contexts:
            tag_words(self.read_contexts, self.vocab_size)
        for name in ("slot_entries", "slot_ways", "slot_width"):
            _require_positive(name, getattr(self, name))
        sets, rest = divmod(self.slot_entries, self.slot_ways)
        if rest or sets & (sets - 1):
            raise UserError(
                f"slot_entries {self.slot_entries} in sets of slot_ways {self.slot_ways} make no power of two of sets; "
                f"choose for example slot_entries={self.slot_ways * 2 ** max(0, sets - 1).bit_length()}."
            )
        _require_choice("slot_values", self.slot_values, slots.VALUES)
        _require_choice("slot_evict", self.slot_evict, slots.EVICTIONS)
        _require_choice("slot_scope", self.slot_scope, slots.SCOPES)
        if self.slot_layers is None:
            self.slot_layers = list(range(self.num_hidden_layers // 2, self.num_hidden_layers))
        for layer in self.slot_layers:
            if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < self.num_hidden_layers:
                raise UserError(
                    f"slot_layers names block {layer!r}; give numbers from 0 to {self.num_hidden_layers - 1}."
                )
        if len(set(self.slot_layers)) < len(self.slot_layers):
            raise UserError(f"slot_layers names a block twice ({self.slot_layers}); name each once.")

    def _settle_ngrams(self) -> None:
        for size in self.ngram_sizes or ():
            if size != "word" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise UserError(f"ngram_sizes names {size!r}; give numbers of tokens from 1 on, or 'word'.")
        for name in ("ngram_entries", "ngram_width"):
            _require_positive(name, getattr(self, name))

    def _settle_planner(self) -> None:
        _require_choice("planner", self.planner, PLANNERS)
        _require_choice("artist_sees", self.artist_sees, SIGHTS)
        _require_choice("pool", self.pool, POOLS)
        for name in ("planner_width", "planner_futures"):
            _require_positive(name, getattr(self, name))
        if self.planner_futures > self.vocab_size:
            raise UserError(
                f"planner_futures is {self.planner_futures} but vocab_size is {self.vocab_size}; choose fewer."
            )
        if self.consensus != 1.0:
            _require_between("consensus", self.consensus, 0.0, 1.0)
        if self.consensus and self.planner == "none":
            raise UserError("consensus needs an artist; set planner too, or consensus=0.")
        if self.planner != "none" and self.mixing_levels:
            mixers = " and ".join(self.mixing_levels)
            raise UserError(
                f"A planner forecasts the nodes of levels, and {mixers} (mixers) has none; set planner=none."
            )
        if self.planner == "stack" and self.transport_space == "model":
            raise UserError("planner=stack reads forecasts of levels, not of the model; set transport_space=level.")

    def _settle_specials(self) -> None:
        for name in BYTE_SPECIALS:
            given = getattr(self, name)
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
        windows = len(self.alignments) + len(self.semantic_levels or ())
        given = self.level_rank if isinstance(self.level_rank, list) else [int(self.level_rank or 1)] * windows
        return [*given, *self.mixing_levels.values()]

    @property
    def mixing_levels(self) -> dict[str, int]:
        """The mixers that are levels, each with its rank; they come after all other levels."""
        ranks = {"delta": DELTA_HEAD * max(1, self.hidden_size // 64), "outer": max(4, self.hidden_size // 16)}
        return {name: rank for name, rank in ranks.items() if name in (self.mixers or ())}

    @property
    def level_keys(self) -> list[str]:
        """The names of the levels as parts of names: 1, 2, 4 ..., then those of the semantic levels, then of mixers
        that are levels."""
        windows = [str(2**level) for level in range(len(self.alignments))] + list(self.semantic_levels or ())
        return windows + list(self.mixing_levels)

    @property
    def longest_segment(self) -> int:
        """Tokens after which a segment of a semantic level is cut: 2^K, K counting the semantic levels too."""
        return int(2 ** (len(self.alignments) + len(self.semantic_levels or ())))

    @property
    def read_contexts(self) -> list[int | str]:
        """The slot contexts that are read off the tokens."""
        return [context for context in self.slot_contexts or () if context != LEARNED_CODE]

    @property
    def text_contexts(self) -> list[int | str]:
        """What has to be known of the last tokens: the contexts of slots, then those of n-grams alone."""
        return list(dict.fromkeys([*self.read_contexts, *(self.ngram_sizes or ())]))

    @property
    def word_apart(self) -> bool:
        """Whether slots or n-grams need to know where words begin, and no level is over words."""
        return "word" in self.text_contexts and "word" not in (self.semantic_levels or ())

    @property
    def rules(self) -> list[str]:
        """The boundaries that follow rules: the semantic levels that are not learned, then what no level needs."""
        levels = [name for name in self.semantic_levels or () if name != LEARNED]
        return levels + ["word"] * self.word_apart

    @property
    def feature_parts(self) -> tuple[str, ...]:
        """The vectors of rank R that make up a level's feature."""
        return LEVEL_FEATURES[self.level_feature]

    @classmethod
    def field_types(cls) -> dict[str, Any]:
        """The fields that can be set, each with the type it takes."""
        base = {entry.name for entry in fields(PreTrainedConfig)}
        return {entry.name: entry.type for entry in fields(cls) if entry.name not in base} | BASE_FIELDS

    @classmethod
    def coerce_fields(cls, given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Values as a person writes them (`1e-5` is a text in YAML), as the types of their fields.

        prefix: of a field's name in messages.

        Raises:
            UserError: no such field, or a value of another type.
        """
        return coerce_fields(given, cls.field_types(), f"A {cls.model_type} model", prefix)

    @classmethod
    def require_fields(cls, names: Iterable[str]) -> None:
        """Check that there are such fields.

        Raises:
            UserError: there is no such field; the nearest is named.
        """
        known = cls.field_types()
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else "see DyadConfig for the fields there are."
                raise UserError(f"The model has no field '{name}'; {hint}")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DyadConfig":
        """The configuration of a preset, with fields overridden; sizes that derive from them follow.

        Raises:
            UserError: no such preset or field, or a value that does not fit the rest.
        """
        if name not in PRESETS:
            raise UserError(f"There is no preset '{name}'; choose one of {', '.join(PRESETS)}.")
        cls.require_fields(overrides)
        return cls(**{**PRESETS[name], **overrides})


def _require_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least 1.")


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}.")


def _require_between(name: str, value: object, low: float, below: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value < below:
        raise UserError(f"{name} is {value!r}; it must be at least {low:g} and below {below:g}.")
