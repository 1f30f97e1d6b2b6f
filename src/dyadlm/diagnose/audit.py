"""Is a causal language model what it says? Checks that a model of transformers can fail, for a CI to run.

Dimension letters: B texts, T tokens, V vocabulary.
"""

import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dyadlm.causal_lm import FAULTS, STATE_NAMES, first_state, vocabulary_size
from dyadlm.diagnose.causality import (
    SPARSE_FIELDS,
    chosen_length,
    fixed_chance,
    future_gradient,
    ordinary_tokens,
    perturb,
)
from dyadlm.diagnose.huggingface import HuggingFaceSubject
from dyadlm.errors import UserError, first_line
from dyadlm.model.loading import load_weights, without_bars_of_transformers
from dyadlm.recall.models import build_model
from dyadlm.version import __version__

Status = Literal["passed", "failed", "not applicable"]

LENGTH = 133  # no multiple of any block
PADS = 7  # to the left
STEPS = 12  # tokens read one by one from a state
# In standard deviations of the logits, float32. What is masked is masked exactly but for rounding; another order of
# additions (a state, a larger batch) may round each layer differently, and coarser in a coarser dtype.
EXACT, ROUNDED = 1e-5, 1e-3
WIDE = 1e-9  # the same of float64, far above its rounding and far below any leak
# New models: what is special about these architectures is on within a few dozen tokens.
SMALL: Mapping[str, Mapping[str, Any]] = {
    "big_bird": {"block_size": 8, "num_random_blocks": 1},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "num_attention_heads": 2,
        "attention_head_size": 32,
        "feed_forward_size": 64,
        "is_decoder": True,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "codegen": {"num_attention_heads": 4},
    "lfm3": {"num_hidden_layers": 4},  # the first that attends
    "xlstm": {"num_heads": 2, "num_blocks": 2, "qk_dim_factor": 1.0},
}
WINDOW = 16  # of those that have windows or chunks
VOCABULARY, CONTEXT = 64, 512


@dataclass(frozen=True)
class AuditCheck:
    """One property. figure: how far it is from holding, in standard deviations of the logits (`gradient`: a ratio);
    None where it was not measured. sentence: what the figure means, or why there is none."""

    name: str
    status: Status
    sentence: str
    figure: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Audit:
    """All checks of one model. length: of the texts they read. left_out: what such a text does not show."""

    model: str
    length: int
    checks: Sequence[AuditCheck]
    left_out: str = ""
    circumstances: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "passed": self.passed}


def small_model(architecture: str, fields: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """A small new model of a model type of transformers (or of one of our presets), weights drawn from the seed.

    Raises `UserError` if there is no such model or field.
    """
    known = dataclass_fields(CONFIG_MAPPING[architecture]) if architecture in CONFIG_MAPPING else ()
    windows = {entry.name: WINDOW for entry in known if entry.name in SPARSE_FIELDS and isinstance(entry.default, int)}
    # RoBERTa and its like count positions from the padding on, Reformer pads by itself, and BERT asks to be a decoder.
    wanted = {"pad_token_id": 0, "is_decoder": True}
    needed = {name: value for name, value in wanted.items() if any(entry.name == name for entry in known)}
    given = {**needed, **windows, **SMALL.get(architecture, {}), **fields}
    return build_model(architecture, VOCABULARY, CONTEXT, given, seed)


class Auditor:
    """The checks, on one model in evaluation mode."""

    def __init__(self, model: PreTrainedModel, name: str, length: int | None = None, seed: int = 0):
        """length: of the texts; by default what the model's windows and blocks need, `chosen_length`.

        Raises `UserError` if the model's logits are no numbers, or the length is more than it can read.
        """
        self.model = model.eval()  # type: ignore[no-untyped-call]
        self.name = name
        self.seed = seed
        subject = HuggingFaceSubject(self.model, None, name)
        context = subject.context
        room = None if context is None else context - PADS
        self.length, self.left_out = chosen_length(model.config, room, LENGTH)
        if length is not None:
            if length < 2 * STEPS or (room is not None and length > room):
                raise UserError(f"The length must lie between {2 * STEPS} and {room or 'any'}, not be {length}.")
            needed = chosen_length(model.config, None, 1)[0]
            self.length = length
            self.left_out = "" if length >= needed - 4 else f"its windows and chunks need more than {length} tokens"
        if self.length < 2 * STEPS:
            raise UserError(f"{name} reads only {context} tokens; an audit needs {2 * STEPS + PADS}.")
        self.symbols = ordinary_tokens(subject)
        generator = torch.Generator().manual_seed(seed)
        self.ids = self.symbols[torch.randint(len(self.symbols), (3, self.length), generator=generator)]
        self.whole = self.logits(self.ids)
        if not bool(torch.isfinite(self.whole).all()):
            raise UserError(f"{name} returns values that are not numbers; nothing follows from comparing them.")
        self.scale = max(float(self.whole.std()), 1e-12)
        self.rounded = max(ROUNDED, 8 * torch.finfo(model.dtype).eps)

    def checks(self) -> dict[str, Callable[[], AuditCheck]]:
        """By name, in the order in which they are to be run."""
        return {
            "perturbation": self.perturbation,
            "gradient": self.gradient,
            "cache": self.cache,
            "left padding": self.left_padding,
            "batch": self.batch,
            "save and load": self.save_and_load,
        }

    @torch.no_grad()
    def run(self, ids: Tensor, **options: Any) -> Any:
        """The model's output, all chance fixed."""
        given = {
            name: value.to(self.model.device) if isinstance(value, Tensor) else value for name, value in options.items()
        }
        with fixed_chance(self.seed):
            return self.model(input_ids=ids.to(self.model.device), **given)

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) → (B, T, V) float32 on the CPU, all read at once."""
        read: Tensor = self.run(ids, use_cache=False).logits
        return read.float().cpu()

    def logits_in_float64(self) -> Callable[[Tensor], Tensor]:
        """As `logits`, of a copy of the model in float64."""
        wide: Any = deepcopy(self.model).double()
        if hasattr(wide, "set_experts_implementation"):  # the fast one knows no float64
            wide.set_experts_implementation("eager")

        def logits(ids: Tensor) -> Tensor:
            with torch.no_grad(), fixed_chance(self.seed):
                return cast(Tensor, wide(input_ids=ids.to(wide.device), use_cache=False).logits).cpu()

        return logits

    def compare(self, name: str, found: Tensor, expected: Tensor, tolerance: float, what: str) -> AuditCheck:
        """found, expected: logits of the same shape."""
        differences = (found.float().cpu() - expected).abs()
        figure = float(differences.max()) / self.scale
        status: Status = "passed" if figure <= tolerance else "failed"
        return AuditCheck(name, status, f"{what} differ by up to {figure:.2g} standard deviations", figure, tolerance)

    def perturbation(self) -> AuditCheck:
        """Exchanging what comes after a cut changes nothing before it, nor in other rows."""
        change = perturb(self.logits, self.symbols, self.length, rows=2, seed=self.seed)
        sentence = f"exchanging later tokens changes earlier logits by up to {change.largest:.2g}"
        if change.largest > 0:
            sentence += f" (at {change.position}, tokens exchanged from {change.cut} on)"
        if change.elsewhere > EXACT * self.scale:
            sentence += f", and logits of other rows by up to {change.elsewhere:.2g}"
        figure = change.relative
        if EXACT < figure <= self.rounded:
            # Routed tokens are added up in another order where other tokens go elsewhere; in float64 only a leak stays.
            wide = perturb(self.logits_in_float64(), self.symbols, self.length, rows=2, seed=self.seed).relative
            if wide <= WIDE:
                figure, sentence = wide, f"{sentence}; in float64 by {wide:.2g}, so that it is rounding"
        status: Status = "passed" if figure <= EXACT else "failed"
        return AuditCheck("perturbation", status, sentence, figure, EXACT)

    def gradient(self) -> AuditCheck:
        """No gradient of a logit reaches an embedding after it."""
        positions = [0, self.length // 3, self.length // 2, self.length - 2]
        ratio = future_gradient(self.model, self.ids[:1], positions)
        if ratio is None:
            return AuditCheck("gradient", "not applicable", "no gradient can be had from its logits to its embeddings")
        status: Status = "passed" if ratio <= EXACT else "failed"
        sentence = f"embeddings of later tokens have {ratio:.2g} of the gradient of earlier ones"
        return AuditCheck("gradient", status, sentence, ratio, EXACT)

    def cache(self) -> AuditCheck:
        """Reading on from a state gives what reading all at once gives: early, and late in the text."""
        beginning = first_state(self.model)
        output = self.run(self.ids[:1], use_cache=True, **beginning)
        name = next((name for name in STATE_NAMES if getattr(output, name, None) is not None), None)
        parameters = inspect.signature(self.model.forward).parameters
        if name is None or name not in parameters:
            return AuditCheck("cache", "not applicable", "it keeps no state between calls")
        found, expected = [], []
        for first in (1, self.length - STEPS):
            state: Any = None
            parts = [(0, first), *((t, t + 1) for t in range(first, first + STEPS))]
            for start, stop in parts:
                options = {name: state} if state is not None else first_state(self.model)
                output = self.run(self.ids[:1, start:stop], use_cache=True, **options)
                state = getattr(output, name)
                found.append(output.logits[:, -(stop - start) :].float().cpu())
            expected.append(self.whole[:1, : first + STEPS])
        return self.compare(
            "cache", torch.cat(found, 1), torch.cat(expected, 1), self.rounded, "logits from a state and at once"
        )

    def left_padding(self) -> AuditCheck:
        """Pads to the left, and masked, change nothing."""
        parameters = inspect.signature(self.model.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if "attention_mask" not in parameters and not takes_any:
            return AuditCheck("left padding", "not applicable", "it takes no attention mask")
        own = getattr(self.model.config, "pad_token_id", None)
        if not isinstance(own, int) or not 0 <= own < vocabulary_size(self.model):
            own = int(self.symbols[0])
        pads = torch.full((1, PADS), own)
        padded = torch.cat([pads, self.ids[:1]], 1)
        mask = torch.ones_like(padded)
        mask[:, :PADS] = 0
        options = {"attention_mask": mask, "use_cache": False}
        # As `generate` of transformers hands them over, to a text with pads and to one without.
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if "position_ids" in parameters else {}
        plain = {name: value[:, PADS:] for name, value in positions.items()}
        try:
            found = self.run(padded, **options, **positions).logits[:, PADS:]
            expected = (
                self.run(self.ids[:1], use_cache=False, **plain).logits.float().cpu() if plain else self.whole[:1]
            )
        except FAULTS:  # some take positions that they cannot use
            found, expected = self.run(padded, **options).logits[:, PADS:], self.whole[:1]
        check = self.compare("left padding", found, expected, self.rounded, "logits after masked pads and without")
        if check.status == "failed" and "attention_mask" not in parameters:
            return AuditCheck(
                check.name,
                check.status,
                f"it takes an attention mask and ignores it: {check.sentence}",
                check.figure,
                check.tolerance,
            )
        return check

    def batch(self) -> AuditCheck:
        """A row alone gives what it gives among others."""
        found = torch.cat([self.logits(self.ids[row : row + 1]) for row in range(len(self.ids))])
        return self.compare("batch", found, self.whole, self.rounded, "logits of a row alone and in a batch")

    def save_and_load(self) -> AuditCheck:
        """What was saved and loaded gives what it gave before."""
        with tempfile.TemporaryDirectory() as folder, without_bars_of_transformers():
            self.model.save_pretrained(Path(folder) / "model")
            restored = load_weights(Path(folder) / "model", self.model.dtype)
        mine, self.model = self.model, restored.to(self.model.device)
        try:
            found = self.logits(self.ids)
        finally:
            self.model = mine
        return self.compare("save and load", found, self.whole, EXACT, "logits before saving and after loading")


def audit(
    model: PreTrainedModel,
    name: str = "model",
    length: int | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda check, done, total: None,
) -> Audit:
    """All checks on a model; what a check raises is a fault of the model's. progress: (check, done, total).

    Raises `UserError` if the model cannot be audited at all.
    """
    try:
        auditor = Auditor(model, name, length, seed)
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(f"{name} cannot read a text of random tokens ({first_line(error)}).") from error
    results = []
    checks = auditor.checks()
    for number, (check, run) in enumerate(checks.items()):
        progress(check, number, len(checks))
        try:
            results.append(run())
        except (UserError, *FAULTS) as error:
            results.append(AuditCheck(check, "failed", f"it raises {type(error).__name__}: {first_line(error)}"))
        progress(check, number + 1, len(checks))
    circumstances = {
        "type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "seed": seed,
        "versions": {"dyadlm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    return Audit(name, auditor.length, results, auditor.left_out, circumstances)
