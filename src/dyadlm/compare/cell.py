"""One cell: a model of a family is built, trained and scored. It runs in a process of its own, here or on a cluster."""

import contextlib
import io
import json
import math
import resource
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.torch import save
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dyadlm.causal_lm import continues
from dyadlm.compare.cost import circumstances, decoding_cost, training_cost
from dyadlm.data import byte_tokenizer, resolve_data
from dyadlm.data.encoding import prefix_token
from dyadlm.data.resolve import ResolvedData
from dyadlm.errors import Diverged, RunFailed, UserError
from dyadlm.evaluate.protocols import CARRIED, TARGETS, carried_scores, fresh, measure, three_protocols
from dyadlm.memory import MemoryOptions
from dyadlm.model import DyadForCausalLM
from dyadlm.peer_ngrams import add_ngrams
from dyadlm.train import TrainSettings
from dyadlm.train.checkpoint import last_complete, read_manifest
from dyadlm.train.compiler import compiling, require_compiler
from dyadlm.train.prepared_run import prepare_run
from dyadlm.train.training_data import TrainingData
from dyadlm.zoo import build, count_parameters, find_family
from dyadlm.zoo.check import check
from dyadlm.zoo.floors import FLOORS
from dyadlm.zoo.plugins import blaming, load_plugins
from dyadlm.zoo.positions import MULTIPLES, length_losses

OWN_TABLES = {family.name for family in FLOORS}  # families that n-gram tables are not added to
LENGTH_WINDOWS = 64  # in which a longer past is tried
POINTS = 8  # of a learning curve, evenly in tokens


@dataclass(frozen=True)
class Recipe:
    """What all models of a study share.

    data: sources, as `dyadlm train --data` takes them. parameters: of each model, n-gram tables aside. length: T, of
    training texts; batch: of them a step. optimizer: adamw or muon. ngrams: sizes of hashed n-grams beside the
    embedding, the same tables for all. scale: of the numbers of scored tokens. text: the identity of the data, which a
    worker's must have; empty asks for none. dtype: float32 or bfloat16 (autocast) in training; losses are measured in
    float32. compiled: families that are trained with torch.compile. plugins: files and modules that register families
    (`dyadlm.zoo.plugins`); code: the checksum of their code, which a worker's must have.

    Raises:
        UserError: a scale that is no number above 0, or an optimizer or a type of numbers that there is not.
    """

    data: tuple[str, ...]
    parameters: int = 1_000_000
    length: int = 256
    batch: int = 4
    optimizer: str = "muon"
    ngrams: tuple[int | str, ...] = ()
    final_learning_rate: float = 0.0
    scale: float = 1.0
    text: str = ""
    dtype: str = "float32"
    compiled: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    code: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise UserError(f"--scale is a number above 0, not {self.scale}.")
        for field, known in (("optimizer", ("adamw", "muon")), ("dtype", ("float32", "bfloat16"))):
            if getattr(self, field) not in known:
                raise UserError(f"--{field} is {' or '.join(known)}, not {getattr(self, field)!r}.")


class Done(NamedTuple):
    """A cell that has ended. found: as JSON can hold it; weights: safetensors, empty where nothing was trained."""

    cell: "Cell"
    found: dict[str, Any]
    weights: bytes


@dataclass(frozen=True)
class Cell:
    """One training. tokens: to train on, whole steps; 0 measures speed and cost alone. final: scored in all protocols,
    with a learning curve; a cell of a sweep is scored only in fresh windows."""

    family: str
    tokens: int = 0
    rate: float = 0.0
    seed: int = 0
    final: bool = False

    def __str__(self) -> str:
        return f"the cell {self.name!r}"

    @property
    def name(self) -> str:
        kind = "final" if self.final else "sweep"
        return f"{self.family} {kind} {self.tokens} {self.rate:g} {self.seed}" if self.tokens else f"{self.family} cost"

    @property
    def file_name(self) -> str:
        """The stem of the cell's files: readable and unique."""
        return f"{self.name.replace(' ', '_')}-{sha256(self.name.encode()).hexdigest()[:8]}"


def new_model(recipe: Recipe, cell: Cell) -> PreTrainedModel:
    """The model before training, n-gram tables included."""
    model = build(cell.family, length=recipe.length, parameters=recipe.parameters, seed=cell.seed)
    if recipe.ngrams and cell.family not in OWN_TABLES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cell.seed)
            if isinstance(model, DyadForCausalLM):
                config = type(model.config).from_dict(model.config.to_dict() | {"ngram_sizes": list(recipe.ngrams)})
                return DyadForCausalLM(config)
            add_ngrams(model, list(recipe.ngrams))
    return model


def run_cell(recipe: Recipe, cell: Cell, unfinished: Path | None = None) -> tuple[dict[str, Any], bytes]:
    """Train and score; what was found, as JSON can hold it, and the weights as safetensors (empty without training).

    unfinished: a folder for the last checkpoint of each training of the whole budget, where a stopped one goes on; it
    stays there. None: a stopped training begins again.

    Raises:
        UserError: data or a family that there is not, another text or code than the study's, or what the code of a
            user's own family raises.
        RunFailed: a checkpoint cannot be written or read.
    """
    if load_plugins(recipe.plugins) != recipe.code:
        raise UserError(f"{', '.join(recipe.plugins)} is other code here than where the study began; copy it anew.")
    with blaming(cell.family):
        return _run(recipe, cell, unfinished)


def _run(recipe: Recipe, cell: Cell, unfinished: Path | None) -> tuple[dict[str, Any], bytes]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    compiles = cell.family in recipe.compiled
    if not cell.tokens:
        model = new_model(recipe, cell)
        with _compiling(compiles):
            training = training_cost(model, recipe.batch, recipe.length, recipe.optimizer, recipe.dtype, compiles)
        return {
            "cell": asdict(cell),
            "recipe": asdict(recipe),
            "parameters": count_parameters(model),
            **training,
            **decoding_cost(model, find_family(cell.family).decodes != "nothing"),
            "faults": check(cell.family, recipe.parameters).faults,
            "circumstances": circumstances(recipe.dtype),
        }, b""
    data = resolve_data(list(recipe.data), byte_tokenizer())
    if recipe.text not in ("", data.identity):
        raise UserError(f"{', '.join(recipe.data)} holds another text here than where the study began; copy it anew.")
    found: dict[str, Any] = {
        "cell": asdict(cell),
        "recipe": asdict(recipe),
        "circumstances": circumstances(recipe.dtype),
    }
    try:
        with tempfile.TemporaryDirectory() as scratch:
            saves = unfinished is not None and cell.final
            folder = unfinished / cell.file_name if unfinished is not None and saves else Path(scratch)
            model, curve = trained(recipe, cell, data, folder, saves)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        scores = scored(recipe, cell, model, data)
    except Diverged as error:  # a result, too: a sweep is there to find it out
        return found | {"diverged": error.reason}, b""
    except RunFailed as error:  # its remedy is that of `dyadlm train`
        raise RunFailed(str(error).replace("go on with --resume", "give the same command again")) from error
    found |= {
        "parameters": count_parameters(model),
        "curve": curve,
        "peak_mebibytes": round(peak, 1),
        **scores,
    }
    if not cell.final:
        return found, b""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    once: dict[int, str] = {}  # a tied matrix is kept under its first name
    for name, tensor in weights.items():
        once.setdefault(tensor.data_ptr(), name)
    return found, save({name: weights[name] for name in once.values()})


def _compiling(compiles: bool) -> contextlib.AbstractContextManager[None]:
    """Around what may compile a model."""
    if not compiles:
        return contextlib.nullcontext()
    require_compiler("--compile")
    return compiling("--compile", UserError)


def scored(recipe: Recipe, cell: Cell, model: PreTrainedModel, data: ResolvedData) -> dict[str, Any]:
    """The loss in each protocol, of a cell of a sweep in fresh windows alone.

    carried: whether a state was handed on through the stream. A model without a state, and one whose state does worse,
    reads it in overlapping windows, of the trained length or of 1,024 tokens: whichever suits the model better.
    lengths: the loss of equal tokens after pasts of some multiples of the trained length; None where the model has no
    positions for so many, or the loss is no number.
    """
    prefix, streams = prefix_token(data.tokenizer), data.validation
    if not cell.final:
        windows = fresh(streams, recipe.length, int(TARGETS * recipe.scale))
        return {"scores": {"fresh": measure(model, windows, prefix)._asdict()}}
    carry = find_family(cell.family).decodes == "state" and continues(model) != "from the beginning"
    memory = MemoryOptions.of_vocabulary(len(data.tokenizer))
    scores = three_protocols(model, streams, recipe.length, prefix, carry, recipe.scale, memory)
    if carry:
        read = partial(carried_scores, model, streams, recipe.length, prefix, False, int(CARRIED * recipe.scale))
        if read()["carried"].nats < scores["carried"].nats:
            scores, carry = scores | read(memory), False
    found = {"carried": carry, "scores": {name: score._asdict() for name, score in scores.items()}}
    return found | {"lengths": _lengths(recipe, model, data)}


def _lengths(recipe: Recipe, model: PreTrainedModel, data: ResolvedData) -> list[dict[str, Any]]:
    """The loss after pasts of 1, 2, 4 and 8 trained lengths, as far as the longest validation stream goes."""
    stream = max(data.validation, key=len)
    multiples = [multiple for multiple in MULTIPLES if multiple * recipe.length <= len(stream)]
    if not multiples:
        return []
    tokens = torch.from_numpy(stream.tokens(0, len(stream)).astype(np.int64))
    windows = max(1, round(LENGTH_WINDOWS * recipe.scale))
    found = length_losses(model, tokens, recipe.length, multiples=multiples, windows=windows)
    # A model may break down far beyond its trained length; JSON has no NaN.
    kept = [one.loss if one.loss is not None and math.isfinite(one.loss) else None for one in found]
    return [{"multiple": one.multiple, "nats": loss} for one, loss in zip(found, kept, strict=True)]


class Curve(TrainerCallback):
    """Seconds of training alone, and the loss on fresh windows at some points.

    plain: the model as it was built, which takes the weights of the trained one to be measured. Training in bfloat16
    leaves autocast around the trained one, and hides from others which arguments it takes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plain: PreTrainedModel,
        parts: Any,
        prefix: int,
        points: set[int],
        tokens_per_step: int,
        saves: bool,
    ):
        self.saves = saves
        self.model, self.plain, self.parts, self.prefix = model, plain, parts, prefix
        self.points, self.tokens_per_step = points, tokens_per_step
        self.seconds, self._begun, self.found = 0.0, 0.0, list[dict[str, float]]()

    def take_weights(self) -> PreTrainedModel:
        """The plain model with the weights of the trained one, in evaluation mode."""
        self.plain.load_state_dict(self.model.state_dict())
        return self.plain.eval()  # type: ignore[no-untyped-call, no-any-return]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        history: list[dict[str, Any]] = state.log_history
        self.found = [entry["curve"] for entry in history if "curve" in entry]  # of a checkpoint
        self.seconds = self.found[-1]["seconds"] if self.found else 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.thread_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.thread_time() - self._begun
        if state.global_step in self.points:
            nats = measure(self.take_weights(), self.parts, self.prefix).nats
            tokens = state.global_step * self.tokens_per_step
            self.found.append({"tokens": tokens, "seconds": round(self.seconds, 3), "nats": round(nats, 5)})
            history: list[dict[str, Any]] = state.log_history
            history.append({"curve": self.found[-1]})  # which checkpoints hold
            control.should_save = self.saves and state.global_step < state.max_steps


def trained(
    recipe: Recipe, cell: Cell, data: ResolvedData, folder: Path, saves: bool = False
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """The model after training by the trainer of `dyadlm train`, and its learning curve. saves: at each point of it,
    into the folder; what is there already goes on."""
    steps = max(1, cell.tokens // (recipe.length * recipe.batch))
    compiles = cell.family in recipe.compiled
    settings = TrainSettings.create(
        folder / "run",
        preset="tiny",  # which is not built: the model is given
        data=recipe.data,
        device="cpu",
        dtype=recipe.dtype,
        assignments=[
            f"max_steps={steps}", f"learning_rate={cell.rate}", f"seed={cell.seed}", f"save_steps={steps + 1}",
            "save_total_limit=1", "eval_steps=0",
            f"per_device_train_batch_size={recipe.batch}", f"data.sequence_length={recipe.length}",
            f"train.optimizer={recipe.optimizer}", f"train.compile={str(compiles).lower()}",
            f"train.final_learning_rate={recipe.final_learning_rate}",
        ],
    )  # fmt: skip
    given = TrainingData(data.tokenizer, data.train, data.validation, "compare")
    model = new_model(recipe, cell)
    plan = prepare_run(settings, given, folder / "run", model)
    # Another version, or another study in this folder, begins anew.
    plan.identity.update(json.loads(json.dumps({"recipe": asdict(recipe), **circumstances(recipe.dtype)})))
    points = {max(1, round(steps * point / POINTS)) for point in range(1, POINTS + 1)} if cell.final else set()
    prefix = prefix_token(data.tokenizer)
    parts = fresh(data.validation, recipe.length, int(16_384 * recipe.scale))
    curve = Curve(model, new_model(recipe, cell), parts, prefix, points, recipe.length * recipe.batch, saves)
    begun = last_complete(folder / "run")
    if begun is not None and (read_manifest(begun) or {}).get("identity") != plan.identity:
        shutil.rmtree(folder / "run")
        begun = None
    with contextlib.redirect_stdout(io.StringIO()), _compiling(compiles):  # Trainer prints there
        plan.trainer(settings, curve).train(resume_from_checkpoint=None if begun is None else str(begun))
    return curve.take_weights(), curve.found
