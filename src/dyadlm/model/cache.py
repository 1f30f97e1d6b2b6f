"""The state of a model between chunks, and all that depends on the Hugging Face cache interface.

The state mirrors the modules: one `BlockState` per block, what is read off the text for all blocks together, and what
forecasters remember. Its size depends on the configuration alone.

Dimension letters: B batch, D width, R rank; ring j holds 2^j sums, level j of the block tree the last four.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from dyadlm.errors import UserError
from dyadlm.model.boundaries import TextState
from dyadlm.model.configuration import DyadConfig
from dyadlm.ops.clock import Clock, next_position
from dyadlm.ops.slots import SlotState, SlotWrite, slot_put
from dyadlm.state_file import read_state, require_fitting, state_signature, write_state


class BlockState(NamedTuple):
    """What one block carries: float32 (float64 in a float64 model) beside int64 tags and counts.

    Every part is a tuple of tensors (B, ...), empty at the start and for what a model does not have.
    """

    # Each sum has its sum of weights beside it.
    rings: tuple[Tensor, ...] = ()  # ring j: (B, 2^j, sum of R + 1 of the sliding levels >= j)
    blocks: tuple[Tensor, ...] = ()  # level j of the tree: (B, 4, D + 1)
    segments: tuple[Tensor, ...] = ()  # SegmentState of the semantic levels that follow rules
    learned: tuple[Tensor, ...] = ()  # of the learned boundary: its key, SegmentCount, SegmentState
    held: tuple[Tensor, ...] = ()  # the selector's last choice (B, heads, K), where choices persist
    # SlotState, tags and pending the same tensors in all blocks that share a plan; on its way to the cache, of one
    # token, a SlotWrite.
    slots: tuple[Tensor, ...] = ()
    decision: tuple[Tensor, ...] = ()  # one (B, heads, K + D / heads): the choice last made, and what it said
    convolved: tuple[Tensor, ...] = ()  # of short convolutions, before the tower and before the SwiGLU: (B, 3, D) each
    memory: tuple[Tensor, ...] = ()  # of the gated delta rule: one (B, heads, 16, 16)
    outer: tuple[Tensor, ...] = ()  # of sums of outer products: rings, blocks, segments, as `OuterState` has them


class PlannerState(NamedTuple):
    """What the forecasters carry; empty at the start and for models without them."""

    nodes: tuple[Tensor, ...] = ()  # SegmentState of all levels: (B, ranks) each
    counts: tuple[Tensor, ...] = ()  # SegmentCount: (B, levels) int64 each
    memory: tuple[Tensor, ...] = ()  # one (B, levels x planner_width)


Record = TypeVar("Record", BlockState, TextState, PlannerState)


class Carried(NamedTuple):
    """What a model reads of a cache before a chunk."""

    layers: list[BlockState]
    text: TextState
    planner: PlannerState


def carried_by(cache: "DyadCache | None", layers: int) -> Carried:
    """What a cache carries for a model of so many blocks; empty at the start."""
    if cache is None or cache.is_empty:
        return Carried([BlockState()] * layers, TextState(), PlannerState())
    return Carried(cache.layers, cache.text, cache.planner)


class Rows(Protocol):
    """States of single rows, held in another layout while tokens are decoded one by one (`dyadlm.engine`)."""

    def tensors(self) -> dict[str, Tensor]:
        """All rows as `DyadCache.tensors` names them."""
        ...

    def copy(self) -> "Rows":
        """Rows that stand where these do and go on by themselves."""
        ...

    def skip_slot_write(self) -> None:
        """As `DyadCache.skip_slot_write`."""
        ...

    def __len__(self) -> int: ...


class DyadCache:
    """The `past_key_values` of a dyadlm model: pass it back with the next tokens to continue where it stands.

    It is updated in place by each forward pass. Its size is independent of how many tokens it has seen. Where gradients
    are on, it keeps their graph, so that training can reach back over chunks; stream under `torch.no_grad()`.
    """

    is_compileable = False
    layers: list[BlockState]
    text: TextState
    planner: PlannerState
    position: Tensor | None  # (B,) int64, tokens of each row's open document
    columns_seen: int  # columns read so far, padding included: what `generate` counts
    may_begin: bool  # whether some row may stand at the start of a document; False only where that is known

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.columns_seen = 0
        self._set({}, 0)

    def _set(self, tensors: dict[str, Tensor], layers: int) -> None:
        self.position, self.may_begin = tensors.get("position"), True
        self.text = _read(TextState, tensors, "text")
        self.planner = _read(PlannerState, tensors, "planner")
        self.layers = [_read(BlockState, tensors, f"layers.{i}") for i in range(layers)]
        self._owns_tables = True  # of slots; a fork and what it was forked from share theirs, until one is written to

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the state as tensors, whoever holds it."""
        if self.rows is None:
            return vars(self)
        twin = DyadCache()
        twin._set(self.rows.tensors(), self._depth)
        twin.columns_seen = self.columns_seen
        return vars(twin)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DyadCache":
        """As `copy`, also where tensors belong to a graph of gradients, which Python's own copy refuses."""
        return self.copy()

    def __repr__(self) -> str:
        return f"DyadCache(rows={self.batch_size}, columns_seen={self.columns_seen})"

    def hand_over(self, rows: Rows) -> None:
        """Keep the state in `rows` from now on. Reading any tensor of the cache converts all of it back."""
        self._depth = len(self.layers)
        for name in ("layers", "text", "planner", "position"):
            delattr(self, name)
        self.rows = rows

    def __getattr__(self, name: str) -> Any:
        rows = self.__dict__.get("rows")
        if rows is None or name not in ("layers", "text", "planner", "position"):
            raise AttributeError(name)
        self.rows = None
        self._set(rows.tensors(), self._depth)
        return self.__dict__[name]

    def update(self, layers: list[BlockState], text: TextState, planner: PlannerState, clock: Clock) -> None:
        """Take the state after the chunk of a clock. Copies, so that no view keeps a whole chunk alive; but
        what one token changes in the tables of slots is put into them."""
        copied = once(torch.clone)
        tables = [layer.slots for layer in self.layers] or [()] * len(layers)
        if not self._owns_tables and any(_writes_to_tables(layer) for layer in layers):
            tables = [tuple(map(copied, own)) for own in tables]
        self._owns_tables = True
        self.layers = [_taken(layer, own, copied) for layer, own in zip(layers, tables, strict=True)]
        self.text = _map_tensors(text, copied)
        self.planner = _map_tensors(planner, copied)
        self.position = next_position(clock)
        self.columns_seen += clock.index.shape[1]
        # A row of padding alone stays where it was.
        self.may_begin = self.may_begin and clock.padded

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been seen."""
        return self.rows is None and self.position is None

    @property
    def batch_size(self) -> int:
        """Rows; 0 if empty."""
        if self.rows is not None:
            return len(self.rows)
        return 0 if self.position is None else self.position.shape[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, as `generate` counts them."""
        return self.columns_seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: there is no limit."""
        return -1

    def select_rows(self, rows: Tensor) -> "DyadCache":
        """A new cache of the given rows (M,) int64, in that order; rows may repeat."""
        chosen = DyadCache()
        if self.position is not None:
            select = once(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
            chosen.layers = [_map_tensors(layer, select) for layer in self.layers]
            chosen.text, chosen.planner = _map_tensors(self.text, select), _map_tensors(self.planner, select)
            chosen.position = self.position.index_select(0, rows.to(self.position.device))
            chosen.may_begin = self.may_begin
        chosen.columns_seen = self.columns_seen
        return chosen

    def crop(self, max_length: int) -> None:
        """Raises `UserError`: sums over the past cannot be taken back. Assisted generation asks for this."""
        raise UserError("The state of a dyadlm model cannot be cut back; generate without assistant_model.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows in place, as beam search asks."""
        self.__dict__.update(self.select_rows(beam_idx).__dict__)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times in place."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows in place."""
        self.reorder_cache(indices)

    def start_document(self) -> None:
        """Let the next token start a new document: of the open one only the tables of slots are kept.

        They are read on where `config.slot_scope` is `stream`, and emptied by the model where it is `document`.
        """
        if self.position is not None:
            self.layers = [BlockState(slots=layer.slots) for layer in self.layers]
            self.text, self.planner = TextState(), PlannerState()
            self.position, self.may_begin = torch.zeros_like(self.position), True
            self.columns_seen = 0

    def skip_slot_write(self) -> None:
        """Let the next token leave the tables of slots as they are."""
        if self.rows is not None:
            self.rows.skip_slot_write()
            return
        nothing = once(lambda pending: torch.full_like(pending, -1))
        kept = [layer.slots and (*layer.slots[:-1], nothing(layer.slots[-1])) for layer in self.layers]
        self.layers = [layer._replace(slots=own) for layer, own in zip(self.layers, kept, strict=True)]

    def copy(self) -> "DyadCache":
        """A cache that stands where this one does and goes on by itself.

        They share tensors, which nobody writes to; the tables of slots are copied when one of the two reads on.
        """
        self._owns_tables = False
        twin = object.__new__(DyadCache)
        twin.__dict__.update(self.__dict__)
        twin.rows = None if self.rows is None else self.rows.copy()
        return twin

    __copy__ = copy  # else both would write to the same tables

    def reset(self) -> None:
        """Forget everything."""
        self.__dict__.update(DyadCache().__dict__)

    def to(self, device: torch.device | str) -> "DyadCache":
        """Move every tensor to a device, in place."""
        move = once(lambda tensor: tensor.to(device))
        self.layers = [_map_tensors(layer, move) for layer in self.layers]
        self.text, self.planner = _map_tensors(self.text, move), _map_tensors(self.planner, move)
        self.position = None if self.position is None else self.position.to(device)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name: `position`, `text.marks.J`, `planner.nodes.J`, `layers.I.rings.J` and so on."""
        named = {} if self.position is None else {"position": self.position}
        records: list[tuple[str, BlockState | TextState | PlannerState]] = [("text", self.text)]
        records.append(("planner", self.planner))
        records += [(f"layers.{i}", layer) for i, layer in enumerate(self.layers)]
        for prefix, record in records:
            for field, group in zip(record._fields, record, strict=True):
                named.update({f"{prefix}.{field}.{j}": tensor for j, tensor in enumerate(group)})
        return named

    def state_bytes(self) -> int:
        """Bytes of all tensors; those that several blocks share count once."""
        different = {id(tensor): tensor for tensor in self.tensors().values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in different.values())

    def save(
        self,
        path: str | Path,
        config: DyadConfig,
        weights: str | None = None,
        beside: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Write the state as safetensors, atomically. The file names the shape of the model it belongs to.

        weights: what tells the model's weights from others (`identity_of`), for `load` to compare. beside: other
        numbers that are kept in the file (`dyadlm.state_file.read_beside`).
        """
        array = once(lambda tensor: tensor.detach().cpu().numpy())
        tensors = {name: array(tensor) for name, tensor in self.tensors().items()}
        write_state(Path(path), tensors, signature_of(config), self.columns_seen, weights, beside)

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: DyadConfig,
        device: torch.device | str = "cpu",
        weights: str | None = None,
    ) -> "DyadCache":
        """Read a state written by `save`. weights: of the model (`identity_of`); None: they are not compared.

        Raises:
            UserError: no such file, no state file, a damaged one, or the state of another model.
        """
        from dyadlm.model.empty_state import empty_state  # which runs a model, and so imports this module

        arrays, columns_seen = read_state(path, signature_of(config), weights)
        require_fitting(arrays, empty_state(config))
        tensor = once(lambda array: torch.from_numpy(array).to(device))
        tensors = {name: tensor(array) for name, array in arrays.items()}
        cache = cls()
        cache.columns_seen = columns_seen
        cache._set(tensors, config.num_hidden_layers if "position" in tensors else 0)
        return cache


def signature_of(config: DyadConfig) -> str:
    """What two models must share for a state to fit both."""
    return state_signature(vars(config), config.alignments, config.ranks)


def _writes_to_tables(layer: BlockState) -> bool:
    """Whether a block says what one token changes of its slots, not what they are."""
    return len(layer.slots) == len(SlotWrite._fields)


def _taken(layer: BlockState, tables: tuple[Tensor, ...], copied: Callable[[Tensor], Tensor]) -> BlockState:
    """What a block says to carry, with the tables of its slots as they were before."""
    if not _writes_to_tables(layer):
        return _map_tensors(layer, copied)
    # Tags that blocks share are written once for each of them, and stay the same.
    slots = slot_put(SlotState(*tables), SlotWrite(*layer.slots), owned=True)
    rest = _map_tensors(layer._replace(slots=()), copied)
    return rest._replace(slots=(slots.tags, slots.values, copied(slots.pending)))


def once(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function that gives the same for the same object, so that blocks go on sharing what they share."""
    made: dict[int, tuple[Any, Any]] = {}  # with what it was made of, whose id nothing else may take meanwhile

    def of(given: Any) -> Any:
        if id(given) not in made:
            made[id(given)] = given, function(given)
        return made[id(given)][1]

    return of


def _map_tensors(state: Record, function: Callable[[Tensor], Tensor]) -> Record:
    return type(state)(*(tuple(function(tensor) for tensor in group) for group in state))


def _read(kind: type[Record], tensors: dict[str, Tensor], prefix: str) -> Record:
    groups = []
    for field in kind._fields:
        count = sum(name.startswith(f"{prefix}.{field}.") for name in tensors)
        groups.append(tuple(tensors[f"{prefix}.{field}.{j}"] for j in range(count)))
    return kind(*groups)
