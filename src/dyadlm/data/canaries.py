"""Canaries: random strings planted in the training text, to measure later what a model memorises.

Each member is planted a known number of times; its twin is drawn the same way and never shown to the model,
so that exposure can be told from chance. Everything follows from the seed.
"""

import random
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dyadlm.data.batches import ChangedWindows
from dyadlm.errors import UserError

CANARIES_NAME = "canaries.json"  # where a run keeps its plan
REPETITIONS = (1, 4, 16, 64)
# Letters and digits are text under every tokenizer; 24 of them carry 124 bits.
ALPHABET = string.ascii_lowercase + string.digits
LENGTH = 24


@dataclass(frozen=True)
class Canary:
    """text and its tokens; windows: the training windows that hold it at `offsets` (none for a twin)."""

    text: str
    tokens: list[int]
    repetitions: int
    windows: list[int]
    offsets: list[int]


@dataclass(frozen=True)
class CanaryPlan:
    """members[i] and twins[i] are drawn alike; only members are planted."""

    seed: int
    members: list[Canary]
    twins: list[Canary]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "CanaryPlan":
        """What `to_dict` made; raises KeyError or TypeError on anything else."""
        members, twins = ([Canary(**canary) for canary in content[name]] for name in ("members", "twins"))
        return cls(content["seed"], members, twins)


def plan_canaries(
    count: int, seed: int, tokenizer: PreTrainedTokenizerBase, windows: int, sequence_length: int
) -> CanaryPlan:
    """Draw `count` canaries and twins for each number of repetitions and place them, at most one in a window.

    Raises `UserError` if the run has fewer windows than plantings, or windows too short for a canary.
    """
    needed = count * sum(REPETITIONS)
    if needed > windows:
        raise UserError(
            f"data.canaries={count} needs {needed} training windows and the run has {windows}; "
            "plant fewer or train for more steps."
        )
    draw = random.Random(f"canaries {seed}")
    places = draw.sample(range(windows), needed)
    members: list[Canary] = []
    twins: list[Canary] = []
    for repetitions in REPETITIONS:
        for _ in range(count):
            texts = [_text(draw) for _ in range(2)]
            tokens = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
            room = sequence_length - max(map(len, tokens))
            if room < 1:
                needed = sequence_length - room + 1
                raise UserError(f"Canaries need windows of {needed} tokens; set data.sequence_length to that.")
            mine, places = sorted(places[:repetitions]), places[repetitions:]
            offsets = [draw.randint(1, room) for _ in mine]
            members.append(Canary(texts[0], tokens[0], repetitions, mine, offsets))
            twins.append(Canary(texts[1], tokens[1], repetitions, [], []))
    return CanaryPlan(seed, members, twins)


def draw_references(count: int, seed: int, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of `count` strings drawn as canaries are, but planted nowhere: what exposure is a rank among."""
    draw = random.Random(f"references {seed}")
    return [tokenizer.encode(_text(draw), add_special_tokens=False) for _ in range(count)]


def _text(draw: random.Random) -> str:
    return "".join(draw.choices(ALPHABET, k=LENGTH))


class PlantedWindows(ChangedWindows):
    """The windows of `base` with the members of a plan written over the text at their places."""

    def __init__(self, base: Dataset[dict[str, torch.Tensor]], plan: CanaryPlan):
        super().__init__(base)
        self._planted = {
            window: (offset, canary.tokens)
            for canary in plan.members
            for window, offset in zip(canary.windows, canary.offsets, strict=True)
        }

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.base[index]
        if index not in self._planted:
            return item
        offset, tokens = self._planted[index]
        planted = {name: value.clone() for name, value in item.items()}
        place = slice(offset, offset + len(tokens))
        ignored = item["labels"] < 0  # goes on not counting
        if "position_ids" in item:
            # A canary is one piece: a document that began within it begins no more.
            begins = item["position_ids"] == 0
            within = slice(offset + 1, offset + len(tokens))
            ignored[within] &= ~begins[within]
            begins[within] = False
            at = torch.arange(len(begins))
            begin = torch.where(begins, at, 0).cummax(0).values
            # What stood open before the window goes on.
            planted["position_ids"] = at - begin + item["position_ids"][0] * (begin == 0)
        planted["input_ids"][place] = torch.tensor(tokens)
        planted["labels"][place] = torch.where(ignored[place], item["labels"][place], torch.tensor(tokens))
        return planted
