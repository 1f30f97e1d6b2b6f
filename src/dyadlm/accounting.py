"""What a model will cost, from its configuration alone. Tests assert each figure equal to the real model's.

Dimension letters: T time, V vocabulary, D width, L layers, K levels, R rank, F parts of a level's feature, S semantic
levels, H heads, N tables of slots, M futures, W numbers that a forecaster's recurrence keeps.
"""

from dyadlm.model.boundaries import LEARNED
from dyadlm.model.configuration import CHOOSING, CODE_BITS, LEARNED_CODE, DyadConfig
from dyadlm.ops.contexts import tag_words
from dyadlm.ops.pyramid import HISTORY, granularity
from dyadlm.ops.segments import TILE


def parameters(config: DyadConfig) -> int:
    """Trainable numbers, tied weights counted once."""
    width, layers = config.hidden_size, config.num_hidden_layers
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    norms_and_identity = 4 * width
    block = norms_and_identity + (_written(config) + _blockwise(config)) * width
    reading = (sum(config.ranks) + _weighing(config)) * width + _weighing_biases(config)
    slots = _slot_readings(config) * width + len(config.slot_contexts or ()) * config.slot_gate
    blocks = layers * (block + config.selector_heads * config.decision_slots)
    reading_and_slots = _listeners(config) * reading + _slot_layers(config) * slots
    return embeddings + width + blocks + reading_and_slots + _planner_parameters(config)


def _planner_parameters(config: DyadConfig) -> int:
    if config.planner == "none":
        return 0
    width, keep, channels, levels = config.hidden_size, config.planner_width, sum(config.ranks), len(config.ranks)
    proposal = _gated(width + channels, width // 2, width) * (config.planner == "head")
    artist = width * width * (config.artist_sees == "both") + _artist(config)
    return 3 * keep * channels + proposal + levels + artist + 2 * width


def _gated(inputs: int, inner: int, outputs: int) -> int:
    return inner * (2 * inputs + outputs)


def _artist(config: DyadConfig) -> int:
    """Numbers of the artist's units, each level's and the token's."""
    width, inner = config.hidden_size, config.planner_width
    levels = sum(_gated(width + 2 * rank, inner, width) for rank in config.ranks)
    return levels + _gated(2 * width, inner, width)


def _listeners(config: DyadConfig) -> int:
    """Blocks whose tower listens, with bottlenecks of its own."""
    return config.num_hidden_layers if config.tower == "layer" else 1


def _slot_layers(config: DyadConfig) -> int:
    return len(config.slot_layers or ()) if config.slot_contexts else 0


def _parts(config: DyadConfig, level: int) -> int:
    """F of a level: semantic ones may show one more segment."""
    return len(config.feature_parts) + (config.semantic_memory - 1) * (level >= len(config.alignments))


def _written(config: DyadConfig) -> int:
    """Numbers a token's features have, of all levels: rows of the up-projections."""
    return sum(_parts(config, level) * rank for level, rank in enumerate(config.ranks))


def _semantic(config: DyadConfig) -> list[str]:
    return config.semantic_levels or []


def _ruled(config: DyadConfig) -> int:
    """Semantic levels that follow rules."""
    return sum(name != LEARNED for name in _semantic(config))


def _weighing(config: DyadConfig) -> int:
    """Numbers that salience, forgetting and the learned boundary read off a token."""
    router = 2 * max(config.ranks) * (LEARNED in _semantic(config))
    return _weighing_biases(config) + router


def _weighing_biases(config: DyadConfig) -> int:
    sliding, semantic = config.alignments.count("sliding"), len(_semantic(config))
    alone = min(sliding, 1) if config.transport_space == "model" else sliding
    salience = alone + (sliding < len(config.alignments)) + semantic
    return salience * config.salience + semantic * config.forgetting


def _blockwise(config: DyadConfig) -> int:
    """Numbers per channel of what every block has beside its levels: gate, selector, decisions, SwiGLU."""
    width, heads, levels = config.hidden_size, config.selector_heads, len(config.ranks)
    aged = 2 * sum(alignment != "sliding" for alignment in config.alignments) + _ruled(config)
    selector = heads * levels * (config.selector != "none")
    decision = (heads + width + heads * levels) * config.decision_slots
    return width + aged + selector + decision + 3 * (config.intermediate_size or 0)


def _slot_readings(config: DyadConfig) -> int:
    """Numbers per channel of one block's slots."""
    contexts = config.slot_contexts or []
    gate, code = len(contexts) * config.slot_gate, CODE_BITS * (LEARNED_CODE in contexts)
    return config.slot_width + len(contexts) * (config.slot_width + 1) + gate + code


def training_flops_per_token(config: DyadConfig, sequence_length: int) -> float:
    """Floating-point operations of the matrix products of one training step, forward and backward, per token.

    A multiplication and an addition count as two. The pyramid's additions, T log T in number, are not products and are
    not counted; they are a few hundredths of it. Of companions, only the lessons of a planner are counted, without a
    teacher.
    """
    time = sequence_length
    products = 3 * _stack_products(config, time)
    if not config.forgetting:  # of what needs no gradient, there is one product: which tokens share a segment
        products -= _listeners(config) * _segment_products(config, time)
    if config.planner != "none":
        width, keep, channels = config.hidden_size, config.planner_width, sum(config.ranks)
        products += 3 * (_memory_products(config, time) + _plan_products(config, time))
        # What tokens are to the levels has no gradient at all; nor have nodes, and forecasters on a hypothesis.
        meaning = time * (1 + config.planner_futures) * width * channels
        products -= 2 * (meaning + _node_sum_products(config, time))
        products -= time * keep * channels * (2 + 3 * config.planner_futures)
        if config.planner == "stack":
            products -= time * width * (2 * config.vocab_size + _written(config))
    return 2 * products / time


def forward_flops(config: DyadConfig, sequence_length: int) -> int:
    """Floating-point operations of the matrix products over one sequence from a fresh start.

    One token on its own costs less than that where a selector leaves out levels. The plan is counted where there is
    consensus; the state of a planner goes on in any case.
    """
    products = _stack_products(config, sequence_length)
    if config.planner != "none":
        products += _memory_products(config, sequence_length)
        products += _plan_products(config, sequence_length) * bool(config.consensus)
    return 2 * products


def _stack_products(config: DyadConfig, sequence_length: int) -> int:
    """Products of the blocks and the head."""
    time, width = sequence_length, config.hidden_size
    in_model_space = config.transport_space == "model"
    semantic = ["semantic"] * len(_semantic(config))
    heard = written = 0
    for level, (alignment, rank) in enumerate(zip([*config.alignments, *semantic], config.ranks, strict=True)):
        parts, rows = _parts(config, level), time
        windows = time * (2 if alignment == "prefix" else 1)  # both windows of a prefix level are projected
        if alignment in ("block", "dual"):
            rows = time // 2 ** granularity(level, alignment) + 1
            windows = rows + (2 if alignment == "dual" else 1)
        heard += (parts * rows if in_model_space else windows) * rank
        written += rows * parts * rank
    listening = (heard + time * _weighing(config)) * width + _segment_products(config, time)
    block = written * width + time * width * _blockwise(config)
    slots = time * width * _slot_readings(config)
    products = _listeners(config) * listening + config.num_hidden_layers * block + _slot_layers(config) * slots
    return products + time * width * config.vocab_size


def _memory_products(config: DyadConfig, time: int) -> int:
    """Products that carry on what forecasters remember: nodes, and what is read off them."""
    channels = sum(config.ranks)
    reading = config.hidden_size * channels + 2 * config.planner_width * channels
    return time * reading + _node_sum_products(config, time)


def _node_sum_products(config: DyadConfig, time: int) -> int:
    return _tile_products(time) * len(config.ranks) * max(config.ranks)


def _plan_products(config: DyadConfig, time: int) -> int:
    """Products of forecasts, proposal, hypotheses and artist."""
    width, keep, channels, vocabulary = config.hidden_size, config.planner_width, sum(config.ranks), config.vocab_size
    forecasts = (time + 1) * keep * channels
    proposal = width * vocabulary
    if config.planner == "head":
        proposal += _gated(width + channels, width // 2, width)
    else:
        proposal += width * (vocabulary + _written(config) + width + 3 * (config.intermediate_size or 0))
    future = width * channels + 3 * keep * channels + _artist(config) + width * vocabulary
    start = width * width * (config.artist_sees == "both")
    return forecasts + time * (proposal + start + config.planner_futures * future)


def _tile_products(time: int) -> int:
    """Products, for one channel, of sums over segments: a triangular matrix for each tile, then for tiles of tiles."""
    products = 0
    while time > 1:
        size = min(TILE, time)
        time = -(-time // size)
        products += time * size * size
    return products


def _segment_products(config: DyadConfig, time: int) -> int:
    """Products of the sums over the segments of semantic levels."""
    products = _tile_products(time)
    widths, ruled = [width + 1 for width in _segment_widths(config)], [name != LEARNED for name in _semantic(config)]
    together = [[w for w, by in zip(widths, ruled, strict=True) if by == rule] for rule in (True, False)]
    return products * sum(len(group) * max(group, default=0) for group in together)  # as wide as the widest


def _segment_widths(config: DyadConfig) -> list[int]:
    """Numbers that each semantic level sums, beside their weight."""
    in_model_space = config.transport_space == "model"
    return [config.hidden_size if in_model_space else rank for rank in config.ranks[len(config.alignments) :]]


def state_bytes(config: DyadConfig, bytes_per_number: int = 4) -> int:
    """Bytes of the streaming state of one row: constant in the number of tokens seen."""
    numbers, integers, flags = _text_state(config)
    for count, part in (
        (_listeners(config), _listening_state(config)),
        (config.num_hidden_layers, _choosing_state(config)),
        (_slot_layers(config), _slot_state(config)),
    ):
        numbers, integers, flags = numbers + count * part[0], integers + count * part[1], flags + count * part[2]
    if config.planner != "none":  # three nodes of each level, and what its recurrence keeps; two counts
        numbers += 3 * sum(config.ranks) + len(config.ranks) * config.planner_width
        integers += 2 * len(config.ranks)
    return numbers * bytes_per_number + integers * 8 + flags


State = tuple[int, int, int]  # numbers, integers of 64 bits, flags of a byte


def _text_state(config: DyadConfig) -> State:
    """Position, marks and counts of the rules, and the tokens that contexts need."""
    contexts = config.read_contexts
    longest = max((context for context in contexts if isinstance(context, int)), default=1)
    return 0, 1 + 2 * _ruled(config) + longest - 1 + 3 * ("word" in contexts), 2 * len(config.rules)


def _listening_state(config: DyadConfig) -> State:
    numbers, integers, weight = 0, 0, int(config.salience)
    sliding = [k for k, alignment in enumerate(config.alignments) if alignment == "sliding"]
    for j in range(max(sliding, default=-1) + 1):
        own = [config.ranks[k] + weight for k in sliding if k >= j]
        numbers += 2**j * (config.hidden_size + weight if config.transport_space == "model" else sum(own))
    deep = [
        k if alignment == "prefix" else granularity(k, alignment)
        for k, alignment in enumerate(config.alignments)
        if alignment != "sliding"
    ]
    numbers += (max(deep, default=-1) + 1) * HISTORY * (config.hidden_size + weight)
    numbers += sum(3 * width + 1 for width in _segment_widths(config))
    if LEARNED in _semantic(config):  # the key, and the count of segments
        numbers, integers = numbers + max(config.ranks), integers + 2
    return numbers, integers, 0


def _choosing_state(config: DyadConfig) -> State:
    choices = config.selector_heads * len(config.ranks)
    held = choices * (config.selector in CHOOSING and config.selector_margin > 0)
    return (choices + config.hidden_size) * config.decision_slots, 0, held


def _slot_state(config: DyadConfig) -> State:
    """Entries with their tags, and the tag that is still to be written."""
    tables, contexts = len(config.slot_contexts or ()), config.read_contexts
    parts = tag_words(contexts, config.vocab_size) if contexts else 1
    return tables * config.slot_entries * config.slot_width, tables * (config.slot_entries + 1) * parts, 0
