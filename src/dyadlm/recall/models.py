"""Models to ask, by name: ours, and any causal language model of transformers, built alike and read alike.

Dimension letters: B batch, T time, V vocabulary, D width, N questions.
"""

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dyadlm.causal_lm import first_state, state_bytes
from dyadlm.errors import UserError, first_line
from dyadlm.model import PRESETS, DyadCache, DyadConfig, DyadForCausalLM
from dyadlm.model.loading import load_weights
from dyadlm.recall.tasks import UNSCORED
from dyadlm.shipped import place_of_model
from dyadlm.values import coerce, parse_assignment

WIDTH, LAYERS = 64, 2


def small_fields(name: str, width: int = WIDTH, layers: int = LAYERS) -> dict[str, Any]:
    """Fields of a small model of an architecture; those that it does not have are to be left out."""
    small: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "encoder_layers": layers,
        "encoder_attention_heads": 1,
        "decoder_attention_heads": 1,
        "decoder_layers": layers,  # of models whose layers are counted for both halves
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": width,
        "intermediate_size": -(-width * 8 // 3 // 16) * 16,
        "initializer_range": width**-0.5,  # the usual 0.02 is made for wide models
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    gated_delta = {
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": width,
        "linear_value_head_dim": width,
    }
    own: dict[str, dict[str, Any]] = {
        "mamba2": {"state_size": width, "num_heads": 2, "n_groups": 1, "chunk_size": 64},
        "olmo_hybrid": gated_delta,  # one of its layers must attend
        "qwen3_next": {
            **gated_delta,
            "layer_types": ["linear_attention"] * layers,
            "mlp_only_layers": list(range(layers)),
        },
    }
    return small | own.get(name, {})


def parse_fields(assignments: Iterable[str]) -> dict[str, Any]:
    """`FIELD=VALUE` texts, values as in YAML. Raises `UserError` for what is none."""
    return dict(parse_assignment(text, "FIELD=VALUE") for text in assignments)


def build_model(name: str, vocabulary: int, length: int, given: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """A model over `vocabulary` tokens for items of up to `length`, float32 on the CPU.

    name: one of our presets, an architecture by its model type (both new: 2 layers of width 64, weights drawn from
        `seed`), a folder with weights to begin with, or a name of `dyadlm.shipped`.
    given: fields of its configuration.
    Raises `UserError` if there is no such model or field, or the model cannot be what is asked.
    """
    if name not in PRESETS and Path(place_of_model(name)).exists():
        model = load_weights(name, torch.float32, given)
        if model.config.vocab_size < vocabulary:
            raise UserError(
                f"{name} has {model.config.vocab_size} tokens but the task {vocabulary}; lower the task's vocabulary."
            )
        return model
    config = _new_config(name, vocabulary, length, given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if isinstance(config, DyadConfig):
                return DyadForCausalLM(config)
            made: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, RuntimeError, ImportError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"There can be no {name} with these fields ({first_line(error)}); set others.") from error
    return made.float()  # type: ignore[no-untyped-call, no-any-return]


def _new_config(name: str, vocabulary: int, length: int, given: Mapping[str, Any]) -> PreTrainedConfig:
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": length}
    if name in PRESETS or name == DyadConfig.model_type:
        # The symbols of a task are no text: no words or sentences, and slots addressed by the last symbol.
        small = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "level_rank": None}
        DyadConfig.require_fields(given)
        own = {"semantic_levels": [], "slot_contexts": [1], "slot_layers": [0]}
        return DyadConfig.from_preset(
            name if name in PRESETS else "tiny", **sizes | small | own | DyadConfig.coerce_fields(given)
        )
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(name, [*PRESETS, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES], n=1)
        hint = f"the nearest is {near[0]}" if near else "give a preset, a folder or a model type such as llama"
        raise UserError(f"There is no model {name!r}; {hint}.")
    kind = CONFIG_MAPPING[name]
    standard = kind.attribute_map  # some architectures have names of their own for what others call hidden_size
    hints = {entry.name: entry.type for entry in fields(kind) if entry.init}
    checked = {}
    for key, value in given.items():
        field = standard.get(key, key)
        if field not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise UserError(f"A {name} has no field {key!r}{f'; the nearest is {near[0]}' if near else ''}.")
        # Fields that are lists or mappings have types of their own; the model checks them.
        simple = isinstance(value, (bool, int, float, str))
        checked[field] = coerce(value, hints[field], key) if simple else value
    width, layers = (standard.get(key, key) for key in ("hidden_size", "num_hidden_layers"))
    try:
        defaults = small_fields(name, checked.get(width, WIDTH), checked.get(layers, LAYERS)) | sizes
        small = {standard.get(key, key): value for key, value in defaults.items()}
        small |= {
            key: 0 for key, value in small.items() if value is None and key in hints and not _may_be_none(hints[key])
        }
        return AutoConfig.for_model(name, **{key: value for key, value in small.items() if key in hints} | checked)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"There can be no {name} with these fields ({first_line(error)}); set others.") from error


def _may_be_none(hint: Any) -> bool:
    try:
        coerce(None, hint, "")
    except UserError:
        return False
    return True


class Reader:
    """A model that reads rows chunk by chunk and is asked at some positions only.

    Logits over a large vocabulary cost more than all else of a small model, so only what is asked for is computed:
    from the hidden states where the head is nothing but a matrix, else from all logits.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self.state_name = "cache_params" if "cache_params" in parameters else "past_key_values"
        self.head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        with self.resting():
            self.plain = self.head is not None and self._head_is_all()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Neither dropout nor gradients."""
        training = self.model.training
        self.model.eval()  # type: ignore[no-untyped-call]
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    def _probe(self, time: int) -> Tensor:
        return torch.arange(time, device=self.model.device)[None] * 7919 % int(self.model.config.vocab_size)

    def _head_is_all(self) -> bool:
        tokens = self._probe(8)
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        logits = self.model(input_ids=tokens, use_cache=False).logits[0]
        self.plain = True
        return torch.allclose(self.ask(tokens, everywhere)[0], logits, rtol=1e-3, atol=1e-5)

    def ask(self, tokens: Tensor, where: Tensor, state: Any = None, keep: bool = False) -> tuple[Tensor, Any]:
        """Logits (N, V) at the positions `where` (B, T) bool of a chunk (B, T), rows first; the state after it if kept.

        state: what the last chunk left, None at the beginning.
        """
        if keep and state is None:
            state = first_state(self.model).get(self.state_name)
        options = {self.state_name: state} if state is not None else {}
        reader = self.model.base_model if self.plain else self.model
        output = reader(input_ids=tokens, use_cache=keep, **options)
        if self.plain:
            assert self.head is not None
            logits = self.head(output.last_hidden_state[where])
        else:
            logits = output.logits[where]
        return logits, getattr(output, self.state_name, None) if keep else None

    def learn(self, tokens: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, V) of what rows (B, T) ask, and the loss to learn from: of the answers, and of all companions."""
        asked = answers >= 0
        if not getattr(self.model, "companions", None):
            logits, _ = self.ask(tokens, asked)
            return logits, cross_entropy(logits, answers[asked])
        # Companions know labels, which stand one column after the question: the last one behind the row.
        labels = nn.functional.pad(answers, (1, 0), value=UNSCORED)
        tokens = torch.cat([tokens, labels[:, -1:].clamp(min=0)], 1)
        output = self.model(input_ids=tokens, labels=labels)
        return output.logits[:, :-1][asked], output.loss

    def continues(self) -> bool:
        """Whether reading in chunks gives what reading at once gives; where not, rows are read whole."""
        with self.resting():
            return self._continues()

    def _continues(self) -> bool:
        tokens = self._probe(24)
        asked = torch.zeros_like(tokens, dtype=torch.bool)
        asked[:, 16:] = True
        whole, _ = self.ask(tokens, asked)
        try:
            _, state = self.ask(tokens[:, :8], asked[:, :8], keep=True)
            _, state = self.ask(tokens[:, 8:16], asked[:, 8:16], state, keep=True)
            parts, _ = self.ask(tokens[:, 16:], asked[:, 16:], state, keep=True)
        except (ValueError, RuntimeError, TypeError, AttributeError, IndexError):
            return False
        return torch.allclose(whole, parts, rtol=1e-2, atol=1e-4)

    def state_numbers(self, length: int) -> int:
        """What one row's state holds after `length` tokens, in numbers of four bytes."""
        with self.resting():
            _, state = self.ask(self._probe(length), torch.zeros(1, length, dtype=torch.bool), keep=True)
        if isinstance(state, DyadCache):
            return state.state_bytes() // 4
        return state_bytes(state) // 4
