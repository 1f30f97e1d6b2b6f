"""The records of settings that are ours: one for each namespace of keys (`data.FIELD`, `train.FIELD`, …)."""

import math
from dataclasses import dataclass
from typing import Literal

from dyadlm.errors import UserError


def require(holds: bool, what: str) -> None:
    """Raise `UserError` with a sentence that says what has to hold, where it does not."""
    if not holds:
        raise UserError(f"{what}.")


@dataclass(frozen=True)
class DataOptions:
    """Keys `data.FIELD`.

    sequence_length: tokens of a training window.
    document_reset: send `position_ids` that restart at 0 with every document: nothing crosses its edge.
    tokenizer: for a new model: "byte", a Hugging Face name or a folder; none takes what the data says.
    canaries: random strings planted for each number of repetitions (`dyadlm.data.canaries`); 0 is none.
    validation_tokens: tokens of the validation split scored during training, spread evenly over it.
    text_field: the field with the text in JSON and Parquet.
    most_decompressed: how many bytes of text one byte of a compressed file may stand for.
    stream: read the sources while training, in their own order, without preparing them (`dyadlm.data.streaming`).
        Weights are shares of passages (documents, or a megabyte of longer ones). The beginning of each source, of
        validation_tokens in all, is held out for validation.
    """

    sequence_length: int = 256
    document_reset: bool = False
    tokenizer: str | None = None
    canaries: int = 0
    validation_tokens: int = 65_536
    text_field: str = "text"
    most_decompressed: float = 250.0
    stream: bool = False

    def __post_init__(self) -> None:
        require(self.sequence_length >= 2, "data.sequence_length must be at least 2")
        require(self.canaries >= 0, "data.canaries must be 0 or more")
        require(self.validation_tokens >= 1, "data.validation_tokens must be at least 1")
        require(self.most_decompressed > 0, "data.most_decompressed must be above 0")


@dataclass(frozen=True)
class TrainOptions:
    """Keys `train.FIELD`.

    optimizer: adamw, or muon for matrices and AdamW for all else (`dyadlm.train.muon`), with the same learning_rate and
        weight_decay.
    base_width: the `hidden_size` of the narrower model that learning_rate was found with. The rate of the linear
        maps inside the model then falls with the width: as base_width / hidden_size with AdamW (as in muP, Yang et al.
        2022, arXiv 2203.03466), as the square root of this ratio with Muon. 0: one rate for all weights.
    ema: decay of an exponential average of the weights, which is evaluated and published in their place; 0: none.
    schedule: the learning rate after its linear warm-up; wsd is stable and then decays linearly.
    final_learning_rate: the fraction of `learning_rate` at which the schedule ends, one step after the last.
    decay_fraction: the fraction of all steps that the decay of wsd takes.
    log_spaced_checkpoints: also save at steps 1, 2, 4 … 512; `save_total_limit` does not touch these.
    divergence_rise: nats by which the mean loss between two logs may exceed the lowest one; 0: no check.
    carry_state: rows of a batch are lanes through the text: each window goes on where its row stood in the step before,
        with the state the model had there, through which no gradient flows. For dyadlm models alone.
    carry_lanes: with carry_state, lanes for each row, which take turns, so that a lane goes on after so many steps.
        With one lane the steps after each other read the same places of the text, and the model learns these. The
        states of all lanes are kept in memory.
    carry_from: with carry_state, the share of the steps that come before, in windows that begin anew. It counts from
        max_steps, so that a run goes on with the max_steps it was started with.
    history_weight: p: a token after h tokens that the model has seen (of its document or lane, carried ones included)
        counts (h / data.sequence_length)^p, at most 1, in the loss that is minimised, over the mean of these weights;
        0: all count alike. The `loss` that is logged stays the mean over all tokens alike.
    goldfish: k: one target in k counts for nothing, by a hash of the tokens before it, so that the same text always
        loses the same ones (Hans et al. 2024, arXiv 2406.10209); 0: all count.
    compile: compile the model with torch.compile, which takes a minute at first and needs a C++ compiler on a CPU.
    windows_per_step: of all processes together. per_device_train_batch_size follows from it and the number of
        processes, so that a run goes on with another number of them; 0: the batches of all processes.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    base_width: int = 0
    ema: float = 0.0
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    final_learning_rate: float = 0.1
    decay_fraction: float = 0.2
    log_spaced_checkpoints: bool = False
    divergence_rise: float = 2.0
    carry_state: bool = False
    carry_lanes: int = 1
    carry_from: float = 0.0
    history_weight: float = 0.0
    goldfish: int = 0
    compile: bool = False
    windows_per_step: int = 0

    def __post_init__(self) -> None:
        require(self.windows_per_step >= 0, "train.windows_per_step must be 0 or more")
        require(self.base_width >= 0, "train.base_width must be 0 or more")
        require(0 <= self.ema < 1, "train.ema must be 0 or more and below 1")
        require(0 <= self.final_learning_rate <= 1, "train.final_learning_rate must lie between 0 and 1")
        require(0 < self.decay_fraction <= 1, "train.decay_fraction must lie above 0 and at most at 1")
        require(self.divergence_rise >= 0, "train.divergence_rise must be 0 or more")
        require(self.carry_lanes >= 1, "train.carry_lanes must be 1 or more")
        require(0 <= self.carry_from < 1, "train.carry_from must be 0 or more and below 1")
        for name, given in (("carry_lanes", self.carry_lanes != 1), ("carry_from", self.carry_from != 0)):
            require(self.carry_state or not given, f"train.{name} needs train.carry_state=true; leave it out")
        require(self.history_weight >= 0, "train.history_weight must be 0 or more")
        require(self.goldfish == 0 or self.goldfish >= 2, "train.goldfish must be 0 or at least 2")

    def steps_before_carrying(self, max_steps: int) -> int:
        """How many of the steps read windows that begin anew, before states are carried."""
        return math.floor(self.carry_from * max_steps)


@dataclass(frozen=True)
class TwinOptions:
    """Keys `twin.FIELD`: a stack on the reversed text that shares the bottlenecks, in training alone.

    conditioning: what shapes the bottlenecks. joint: both losses; reverse: the twin's alone; detached: the twin's
        alone, and no credit of the model's loss flows through the tower to what it reads; off: there is no twin.
    weight: of the twin's loss beside the model's.
    """

    conditioning: Literal["off", "joint", "reverse", "detached"] = "off"
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight > 0, "twin.weight must be above 0; twin.conditioning=off leaves the twin out")


@dataclass(frozen=True)
class FingerprintOptions:
    """Keys `fingerprint.FIELD`: where each token stands in the corpus, shown in training at times and never after.

    shown: whether there are fingerprints at all.
    dropout: the chance that a sequence goes without. token_dropout: that a token of the others does.
    tags: whether document, section and kind are shown beside the index.
    cooldown: the last part of training, without any.
    """

    shown: bool = False
    dropout: float = 0.75
    token_dropout: float = 0.1
    tags: bool = True
    cooldown: float = 0.1

    def __post_init__(self) -> None:
        for name in ("dropout", "token_dropout", "cooldown"):
            require(0 <= getattr(self, name) < 1, f"fingerprint.{name} must be 0 or more and below 1")


@dataclass(frozen=True)
class PlannerOptions:
    """Keys `planner.FIELD`: how a model that plans (`model.planner`) is taught to.

    forecast, proposal, artist, teacher: weights of the losses of its parts beside the engineer's.
    teacher_until: the part of training after which the teacher is done; until then it shows the true future of fewer
        and fewer windows, of all at first.
    """

    forecast: float = 0.1
    proposal: float = 0.2
    artist: float = 0.2
    teacher: float = 0.0
    teacher_until: float = 0.5

    def __post_init__(self) -> None:
        for name in ("forecast", "proposal", "artist", "teacher"):
            require(getattr(self, name) >= 0, f"planner.{name} must be 0 or more")
        require(0 < self.teacher_until <= 1, "planner.teacher_until must lie above 0 and at most at 1")
        idle = self.teacher == 0 and self.teacher_until != PlannerOptions.teacher_until
        require(
            not idle,
            "planner.teacher_until does nothing without planner.teacher; set planner.teacher too, or leave it out",
        )


@dataclass(frozen=True)
class LoraOptions:
    """Keys `lora.FIELD`: train a small adapter beside the frozen weights of `--model`, and save that alone.

    rank: of the two matrices beside each adapted map; 0: there is no adapter, all weights are trained.
    alpha: their product is scaled by alpha / rank; 0: by 2.
    dropout: the chance that an input of the adapter is left out in training.
    """

    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank must be 0 or more")
        require(self.alpha >= 0, "lora.alpha must be 0 or more")
        require(0 <= self.dropout < 1, "lora.dropout must be 0 or more and below 1")
        idle = self.rank == 0 and (self.alpha, self.dropout) != (0.0, 0.0)
        require(not idle, "lora.alpha and lora.dropout do nothing without lora.rank; set it too, or leave them out")


NAMESPACES: dict[str, type] = {
    "data": DataOptions,
    "train": TrainOptions,
    "twin": TwinOptions,
    "fingerprint": FingerprintOptions,
    "planner": PlannerOptions,
    "lora": LoraOptions,
}
"""The records of settings by the name before the dot. A mechanism with settings of its own adds its record here."""
