"""The dyadic phase-transport language model: embedding → blocks → head. No attention anywhere.

A block reads only what stands at t: its hidden state, its tower of level features, the identity channel. Everything
about the past comes through the tower's state, which never grows; so the same code trains on whole sequences, reads a
prompt in one pass, and decodes token by token.

Dimension letters: B batch, T time, V vocabulary, D width, L layers, K levels.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput

from dyadlm.errors import UserError
from dyadlm.model.cache import DyadCache, TowerState
from dyadlm.model.configuration import DyadConfig
from dyadlm.model.tower import Timing, Tower, chunk_timing
from dyadlm.ops.pyramid import Clock, make_clock, next_position


@dataclass
class DyadOutput(ModelOutput):
    """What a forward pass returns; absent parts are None.

    Args:
        loss: scalar, mean cross-entropy in nats over the labels that are not -100.
        logits: (B, T or logits_to_keep, V).
        past_key_values: the state after the last token.
        hidden_states: L + 1 tensors (B, T, D): the embedding, then each block's output, the last one normalised.
        routes: L × (B, T, heads, K), weights of the levels, from models that select.
        boundaries: (B, T, levels), segment ends, from models with semantic levels.
        metrics: named scalars of the mechanisms that are on.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: DyadCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routes: tuple[Tensor, ...] | None = None
    boundaries: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


class SwiGLU(nn.Module):
    """The feed-forward part of a block (Shazeer 2020): down(silu(gate x) * up x)."""

    def __init__(self, config: DyadConfig):
        super().__init__()
        assert config.intermediate_size is not None
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class DyadBlock(GradientCheckpointingLayer):
    """Tower, then SwiGLU, each reading the normalised hidden state beside the identity channel."""

    def __init__(self, config: DyadConfig):
        super().__init__()
        self.tower_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.tower_identity = nn.Parameter(torch.empty(config.hidden_size))
        self.tower = Tower(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_identity = nn.Parameter(torch.empty(config.hidden_size))
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, identity: Tensor, timing: Timing, state: TowerState) -> tuple[Tensor, TowerState]:
        """hidden, identity (B, T, D) → hidden (B, T, D) and the state after the chunk."""
        read = self.tower_norm(hidden) + self.tower_identity * identity
        mixed, state = self.tower(read, timing, state)
        hidden = hidden + self.dropout(mixed)
        read = self.mlp_norm(hidden) + self.mlp_identity * identity
        return hidden + self.dropout(self.mlp(read)), state


class DyadPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the models of this family."""

    config: DyadConfig
    config_class = DyadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DyadBlock"]  # noqa: RUF012 - the name and form transformers reads
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Everything about initialisation: unit-variance readings, blocks that start silent, a small embedding."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm) and module.weight is not None:
            init.ones_(module.weight)
        elif isinstance(module, DyadBlock):  # parents come after their children: what a block adds starts at zero
            init.constant_(module.tower_identity, 0.1)
            init.constant_(module.mlp_identity, 0.1)
            silent = [*module.tower.ups(), module.mlp.down]
            if module.tower.age is not None:  # and so does the clock's say in the gate
                silent.append(module.tower.age)
            for linear in silent:
                init.zeros_(linear.weight)


class DyadModel(DyadPreTrainedModel):
    """The sequence map without a head: tokens → hidden states."""

    def __init__(self, config: DyadConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.identity_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, elementwise_affine=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(DyadBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: DyadCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states of a chunk: `last_hidden_state` (B, T, D). Arguments as in `DyadForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = past_key_values is not None or (bool(self.config.use_cache) and not self.training)
        cache = past_key_values if past_key_values is not None or not use_cache else DyadCache()
        if cache is not None and not isinstance(cache, DyadCache):
            raise UserError(
                "past_key_values must be the DyadCache that a dyadlm model returned; pass None to start anew."
            )

        batch, time = inputs_embeds.shape[:2]
        require_fitting(batch, time, attention_mask, position_ids, kwargs)
        if cache is not None and cache.batch_size not in (0, batch):
            raise UserError(
                f"The state has {cache.batch_size} rows but the input {batch}; use a state of as many rows."
            )
        order = left_packing(attention_mask, batch, time)
        clock = chunk_clock(batch, time, attention_mask, position_ids, order, cache, inputs_embeds.device)
        if order is not None:
            inputs_embeds = inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds))

        states = cache.layers if cache is not None and not cache.is_empty else [TowerState()] * len(self.layers)
        outputs, states = self.stack(inputs_embeds, clock, states)
        if cache is not None and use_cache:
            cache.update(states, next_position(clock), time)
        if order is not None:
            back = order.argsort(1)[..., None]
            outputs = [output.gather(1, back.expand_as(output)) for output in outputs]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = BaseModelOutputWithPast(
            last_hidden_state=outputs[-1],
            past_key_values=cast(Any, cache if use_cache else None),
            hidden_states=tuple(outputs) if output_hidden_states else None,
        )
        return (
            output.to_tuple() if (self.config.return_dict if return_dict is None else return_dict) is False else output
        )

    def stack(self, embedded: Tensor, clock: Clock, states: list[TowerState]) -> tuple[list[Tensor], list[TowerState]]:
        """The blocks over a chunk (B, T, D) whose real tokens come first in each row; this is the part to compile."""
        identity = self.identity_norm(embedded)  # written by no block
        timing = chunk_timing(clock, self.config, embedded.dtype)
        hidden = self.dropout(embedded)
        outputs, carried = [hidden], []
        for layer, state in zip(self.layers, states, strict=True):
            hidden, state = layer(hidden, identity, timing, state)
            outputs.append(hidden)
            carried.append(state)
        outputs[-1] = self.norm(hidden)
        return outputs, carried

    @torch.no_grad()
    def level_contributions(self, input_ids: Tensor) -> Tensor:
        """How loudly each level speaks: the length of what it adds to the residual stream.

        Args:
            input_ids: (T,) or (1, T) int64, from a fresh start.

        Returns:
            (L, K, T) float.
        """
        embedded = self.embed_tokens(input_ids.view(1, -1))
        clock = make_clock(1, embedded.shape[1], device=embedded.device)
        timing = chunk_timing(clock, self.config, embedded.dtype)
        outputs, _ = self.stack(embedded, clock, [TowerState()] * len(self.layers))
        identity = self.identity_norm(embedded)
        lengths = []
        for layer, hidden in zip(self.layers, outputs[:-1], strict=True):
            assert isinstance(layer, DyadBlock)
            read = layer.tower_norm(hidden) + layer.tower_identity * identity
            lengths.append(layer.tower.contributions(read, timing)[0].T)
        return torch.stack(lengths)


def require_fitting(
    batch: int, time: int, attention_mask: Tensor | None, position_ids: Tensor | None, others: dict[str, Any]
) -> None:
    """Raise `UserError` for an empty chunk, masks or positions of another shape, and packing told in another way."""
    if time == 0:
        raise UserError("The input is empty; give at least one token.")
    for name, given in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if given is not None and (given.dim() != 2 or given.shape[0] not in (1, batch) or given.shape[1] < time):
            raise UserError(
                f"{name} has the shape {tuple(given.shape)}; it must be ({batch}, {time}) or longer in time."
            )
    if position_ids is None and any(others.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx")):
        raise UserError("Packed documents are told by position_ids that restart at 0; let the collator return them.")


def left_packing(attention_mask: Tensor | None, batch: int, time: int) -> Tensor | None:
    """(B, T) int64: the order that brings each row's real tokens to the front; None if they fill the chunk.

    Pads then neither count nor write, wherever they stood.
    """
    if attention_mask is None:
        return None
    pad = attention_mask[:, -time:] == 0
    if pad.shape[0] == 1:
        pad = pad.expand(batch, -1)
    return pad.long().argsort(dim=1, stable=True) if bool(pad.any()) else None


def chunk_clock(
    batch: int,
    time: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    order: Tensor | None,
    cache: DyadCache | None,
    device: torch.device,
) -> Clock:
    """The clock of a chunk, in the order of `left_packing`: documents start where position_ids are 0."""
    length = starts = None
    if order is not None and attention_mask is not None:
        length = (attention_mask[:, -time:] != 0).sum(1).expand(batch)
    if position_ids is not None:
        starts = (position_ids[..., -time:] == 0).expand(batch, -1)
        if order is not None:
            starts = starts.gather(1, order)
        inside = starts if cache is not None and not cache.is_empty else starts[:, 1:]
        if length is not None:  # what stands in the padding is no document
            inside = inside & (torch.arange(time, device=device)[-inside.shape[1] :] < length[:, None])
        if not bool(inside.any()):
            starts = None
    position = cache.position if cache is not None else None
    return make_clock(batch, time, position=position, length=length, starts=starts, device=device)


class DyadForCausalLM(DyadPreTrainedModel, GenerationMixin):
    """A causal language model on a dyadic pyramid of centroids.

    Works with `generate`, `Trainer`, `pipeline("text-generation")` and everything else that takes a Hugging Face causal
    language model; `import dyadlm` registers it with the Auto classes.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - the form transformers reads

    def __init__(self, config: DyadConfig):
        super().__init__(config)
        self.model = DyadModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is our own and is made in `forward`

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: DyadCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DyadOutput | tuple[Any, ...]:
        """Logits of a chunk, and the loss if labels are given.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, at least T), 0 for padding, anywhere in the row; its last T columns count.
            position_ids: (B or 1, T); a 0 starts a new document in the row (packing). Other values are not read.
            inputs_embeds: (B, T, D) instead of input_ids.
            past_key_values: the state to continue from, updated in place; None for a fresh start.
            labels: (B, T) int64, shifted inside; -100 is ignored.
            use_cache: whether to return the state; default: when one is given, or when not training.
            output_hidden_states: whether to return all hidden states.
            logits_to_keep: only the last so many positions (or these indices) get logits; 0: all.

        Raises:
            UserError: a cache of another kind or batch size, or an attention mask that is not (B, T).
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **{name: kwargs[name] for name in ("cu_seq_lens_q", "seq_idx") if name in kwargs},
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = DyadOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return (
            output.to_tuple() if (self.config.return_dict if return_dict is None else return_dict) is False else output
        )

    def _reorder_cache(self, past_key_values: DyadCache, beam_idx: Tensor) -> DyadCache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values
