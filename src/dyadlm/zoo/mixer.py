"""A causal language model around one layer that mixes tokens: how families without a model in a library are compared.

Every block is `h += mixer(norm(h))` and then `h += swiglu(norm(h))`; the output matrix is the embedding. A mixer is a
module over (B, T, D) that never looks ahead:

    class Shift(Mixer):
        keeps_state = True

        def forward(self, x, state=None):
            before = x.new_zeros(len(x), 1, x.shape[-1]) if state is None else state
            return torch.cat([before, x], 1)[:, :-1], x[:, -1:]

`register_mixer("shift", Shift)` makes `MixerConfig(mixer="shift")` build it. A mixer that keeps a state returns the one
after its last token, and continues from it; one that keeps none returns None, and its texts are read whole again.

Dimension letters: B batch, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from dyadlm.errors import UserError

MIXERS: dict[str, "str | type[Mixer]"] = {
    name: f"dyadlm.zoo.mixers.{place}"
    for name, place in {
        "linear": "linear_attention:LinearAttention",
        "performer": "linear_attention:PerformerAttention",
        "aft": "aft:AttentionFree",
        "fmm": "fmm:FastMultipole",
        "pattern": "patterns:PatternAttention",
        "s4d": "s4d:DiagonalStateSpace",
        "hyena": "hyena:Hyena",
        "mingru": "min_gru:MinGru",
        "relative": "relative:RelativeAttention",
        "rwkv7": "rwkv7:TimeMixing",
        "s5": "libraries:SimplifiedStateSpace",
        "retention": "libraries:Retention",
    }.items()
}
"""Mixers by name: a class, or where it is imported from when it is asked for."""


class MixerConfig(PreTrainedConfig):
    """mixer: a name in `MIXERS`. options: what else it takes. trained_length: tokens of a training text, for mixers
    whose weights depend on the distance."""

    model_type = "dyadlm_mixer"

    vocab_size: int = 259
    hidden_size: int = 128
    intermediate_size: int = 344
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    max_position_embeddings: int = 2048
    trained_length: int = 256
    mixer: str = "linear"
    options: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class Mixer(nn.Module):
    """A layer that mixes tokens and never looks ahead. keeps_state: whether it can go on from a state."""

    keeps_state: ClassVar[bool] = False

    def __init__(self, config: MixerConfig, **options: Any):
        super().__init__()
        self.width, self.heads, self.length = (
            config.hidden_size,
            config.num_attention_heads,
            config.trained_length,
        )
        if options:
            raise UserError(f"The mixer {config.mixer} takes no option {', '.join(options)}.")

    def reset(self) -> None:
        """Set the weights that are not those of linear maps."""

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """x: (B, T, D). state: after the tokens before; None at the beginning. Returns (B, T, D) and the new state."""
        raise NotImplementedError

    def split(self, x: Tensor) -> Tensor:
        """(B, T, D) as (B, heads, T, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def register_mixers() -> None:
    """Make the Auto classes of transformers know `MixerForCausalLM`."""
    AutoConfig.register(MixerConfig.model_type, MixerConfig, exist_ok=True)
    AutoModelForCausalLM.register(MixerConfig, MixerForCausalLM, exist_ok=True)


def register_mixer(name: str, kind: type[Mixer]) -> None:
    """Make `MixerConfig(mixer=name)` build a mixer of this class. Raises `UserError` where the name is taken."""
    if MIXERS.get(name, kind) is not kind:
        raise UserError(f"There is a mixer {name!r} already; choose another name.")
    MIXERS[name] = kind


def find_mixer(name: str) -> type[Mixer]:
    """The class of a mixer. Raises `UserError` for a name there is not."""
    if name not in MIXERS:
        raise UserError(f"There is no mixer {name!r}; there are {', '.join(MIXERS)}.")
    found = MIXERS[name]
    if isinstance(found, str):
        module, kind = found.split(":")
        found = getattr(import_module(module), kind)
    assert not isinstance(found, str)
    return found


class MixerCache:
    """The states of all mixers after the tokens read so far."""

    is_compileable = False

    def __init__(self) -> None:
        self.states: list[Any] = []
        self.tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows of the batch."""
        self.states = [_each(state, lambda part: part.index_select(0, beam_idx)) for state in self.states]


def _each(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, Tensor):
        return change(state)
    return None if state is None else tuple(_each(part, change) for part in state)


class MixerBlock(nn.Module):
    """A mixer, then SwiGLU, each on a normalised input and added to it."""

    def __init__(self, config: MixerConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.mixer = find_mixer(config.mixer)(config, **(config.options or {}))
        self.mixer_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(self.mixer_norm(hidden), state)
        hidden = hidden + mixed
        normal = self.norm(hidden)
        return hidden + self.down(silu(self.gate(normal)) * self.up(normal)), state


class MixerForCausalLM(PreTrainedModel, GenerationMixin):
    """The model. Padding is possible on the right alone, where no loss is taken."""

    config: MixerConfig
    config_class = MixerConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 - the form transformers reads
    _is_stateful = True

    def __init__(self, config: MixerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MixerBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @property
    def keeps_state(self) -> bool:
        """Whether a text can be continued without reading it again."""
        return find_mixer(self.config.mixer).keeps_state

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linear maps and the embedding as in Llama; what a mixer sets itself stays."""
        if getattr(module, "_is_hf_initialized", False):
            return
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Mixer):
            module.reset()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, V), and the loss if labels are given (shifted inside, -100 is ignored).

        Raises:
            UserError: padding on the left.
        """
        if attention_mask is not None and attention_mask.dim() == 2 and bool((attention_mask.diff(dim=1) > 0).any()):
            raise UserError(f"A {self.config.mixer} mixer knows no padding on the left; pad on the right.")
        embed: Callable[[Any], Tensor] = self.embed_tokens
        hidden = embed(input_ids) if inputs_embeds is None else inputs_embeds
        keeps = self.keeps_state and (
            past_key_values is not None
            or (self.config.use_cache and not self.training if use_cache is None else use_cache)
        )
        cache = (past_key_values or MixerCache()) if keeps else None
        states = cache.states if cache is not None and cache.states else [None] * len(self.layers)
        after = []
        for block, state in zip(self.layers, states, strict=True):
            hidden, state = block(hidden, state)
            after.append(state)
        if cache is not None:
            cache.states, cache.tokens = after, cache.tokens + hidden.shape[1]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.norm(hidden)[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]
        return output if return_dict is not False else output.to_tuple()


register_mixers()
