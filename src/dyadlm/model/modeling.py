"""The language model from top to bottom: embedding → blocks → logits. There is no attention.

At token t a block reads the hidden state of the token, the features of its levels, what its slots recall, and the
identity channel. The past comes only from the state of the blocks, which has constant size. So the same code trains on
whole sequences, reads a prompt in one pass, and decodes token by token.

Dimension letters: B batch, T time, V vocabulary, D width, L layers, K levels, S semantic levels, H heads.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers import initialization as init

from dyadlm.errors import UserError
from dyadlm.model.block import BlockAux, BlockInputs, DyadBlock
from dyadlm.model.boundaries import Boundaries
from dyadlm.model.cache import BlockState, DyadCache, carried_by
from dyadlm.model.configuration import BYTE_VOCABULARY, DyadConfig
from dyadlm.model.decoding import DyadGenerationMixin
from dyadlm.model.extension import AuxiliaryModule, CompanionsMixin, TrainingPass, add_up
from dyadlm.model.layout import chunk_layout
from dyadlm.model.ngrams import NgramIdentity
from dyadlm.model.outputs import DyadModelOutput, DyadOutput, as_asked
from dyadlm.model.packing import arrange
from dyadlm.model.pretrained import DyadPreTrainedModel
from dyadlm.model.slots import plan_slots, plans_alike
from dyadlm.model.text import read_text
from dyadlm.model.variants import part_of, variant_of
from dyadlm.ops.clock import Clock
from dyadlm.ops.contexts import Contexts
from dyadlm.ops.segments import SegmentPlan
from dyadlm.ops.slots import SlotState
from dyadlm.registration import register_models


class DyadModel(DyadPreTrainedModel):
    """The sequence map without a head: tokens → hidden states."""

    progress: Tensor

    def __init__(self, config: DyadConfig):
        config.settle()  # once more: transformers changes fields after a configuration was made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.ngrams = None
        if config.ngram_sizes:
            sizes = (config.ngram_entries, config.ngram_width, config.hidden_size)
            self.ngrams = NgramIdentity(len(config.ngram_sizes), *sizes)
        self.identity_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, elementwise_affine=False)
        self.dropout = nn.Dropout(config.dropout)
        # How far training is, from 0 to 1. Outside training, progress is 1.
        self.register_buffer("progress", torch.ones(()), persistent=False)
        self.boundaries = None
        if config.rules:
            self.boundaries = Boundaries(config.rules, config.vocab_size, config.vocab_size == BYTE_VOCABULARY)
        self.layers = nn.ModuleList(
            variant_of(DyadBlock, config)(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.forecasters = part_of("forecasters", config)
        self.post_init()

    def initialize(self) -> None:
        """Buffers that no file holds are made anew, also when weights are loaded."""
        init.ones_(self.progress)
        if self.ngrams is not None:
            self.ngrams.initialize()
        if self.forecasters is not None:
            self.forecasters.initialize()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: DyadCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_routes: bool = False,
        output_outlook: bool = False,
        added_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> "DyadModelOutput | tuple[Any, ...]":
        """Hidden states of a chunk: `last_hidden_state` (B, T, D). Arguments as in `DyadForCausalLM.forward`.

        added_embeds: (B, T, D), added to the embedding of the tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if input_ids is not None:
            input_ids = input_ids.long()  # slots compute with the ids themselves, beyond 32 bits
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if added_embeds is not None:
            embedded = embedded + added_embeds
        if use_cache is None:
            use_cache = past_key_values is not None or (bool(self.config.use_cache) and not self.training)
        cache = past_key_values if past_key_values is not None or not use_cache else DyadCache()
        if cache is not None and not isinstance(cache, DyadCache):
            raise UserError(
                "past_key_values must be the DyadCache that a dyadlm model returned; pass None to start anew."
            )
        rows = arrange(embedded, attention_mask, position_ids, cache, kwargs)
        embedded, clock = rows.pack(embedded), rows.clock
        for layer in self.layers if self.training else ():
            cast(DyadBlock, layer).tower.before_pass()

        states, text, planner = carried_by(cache, len(self.layers))
        segments, contexts, ngrams, text = read_text(self, input_ids, rows.order, clock, text)
        if self.ngrams is not None:
            embedded = embedded + self.ngrams(ngrams)
        outputs, states, aux = self.stack(embedded, clock, segments, contexts, states, cache is not None)
        outlook = None
        if self.forecasters is not None and (use_cache or output_outlook):
            read = (embedded, outputs[-2])
            outlook, planner = self.forecasters.after_chunk(
                self, read, segments, aux[-1], clock, planner, output_outlook
            )
        if cache is not None and use_cache:
            cache.update(states, text, planner, clock)

        outputs = [rows.unpack(output) for output in outputs]
        routes = tuple(rows.unpack(part.routes) for part in aux if part.routes is not None)
        begun = [segments.begins] if segments is not None else []
        begun += [part.boundary[..., None] for part in aux if part.boundary is not None]
        costs = [part.cost for part in aux if part.cost is not None]
        show_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = DyadModelOutput(
            last_hidden_state=outputs[-1],
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(outputs) if show_all else None,
            routes=routes or None if output_routes else None,
            boundaries=rows.unpack(torch.cat(begun, -1)) if begun and output_routes else None,
            metrics={"cost": torch.stack(costs).sum()} if costs else None,
            outlook=None if outlook is None else outlook.each(rows.unpack),
        )
        return as_asked(output, self.config.return_dict if return_dict is None else return_dict)

    def stack(
        self,
        embedded: Tensor,
        clock: Clock,
        segments: SegmentPlan | None,
        contexts: Contexts | None,
        states: list[BlockState],
        keep: bool,
    ) -> tuple[list[Tensor], list[BlockState], list[BlockAux]]:
        """The blocks over a chunk (B, T, D) whose real tokens come first in each row; this is the part to compile."""
        identity = self.identity_norm(embedded)
        layout = chunk_layout(clock, segments, self.progress, self.config, embedded.dtype, keep)
        plan = features = None
        if contexts is not None and self.config.slot_layers and plans_alike(self.config):
            tables = states[self.config.slot_layers[0]].slots
            plan = plan_slots(contexts, clock, self.config, SlotState(*tables) if tables else None)
        if self.config.tower == "input":
            first = cast(DyadBlock, self.layers[0])
            features, after_reading = first.tower.read_levels(identity, layout, states[0])
            states = [after_reading, *states[1:]]
        inputs = BlockInputs(identity, layout, contexts, plan, features, keep)
        hidden = self.dropout(embedded)
        outputs, carried, aux = [hidden], [], []
        for layer, state in zip(self.layers, states, strict=True):
            hidden, state, own = layer(hidden, inputs, state)
            outputs.append(hidden)
            carried.append(state)
            aux.append(own)
        outputs[-1] = self.norm(hidden)
        return outputs, carried, aux


class DyadForCausalLM(CompanionsMixin, DyadPreTrainedModel, DyadGenerationMixin):
    """A causal language model for `generate`, `Trainer` and `pipeline("text-generation")` of Hugging Face.
    `import dyadlm` registers it with the Auto classes."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - the form transformers reads

    def __init__(self, config: DyadConfig):
        super().__init__(config)
        self.model = DyadModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.planner = part_of("planner", config)
        self.companions = nn.ModuleDict()  # of training alone
        self.post_init()

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the semantic levels and word contexts the text of each token. Bytes do not need this."""
        if self.model.boundaries is not None:
            self.model.boundaries.read(tokenizer)

    def resize_token_embeddings(self, *sizes: Any, **options: Any) -> nn.Embedding:
        """As in transformers. The rules of the levels follow; call `use_tokenizer` to give new tokens their text.

        Raises:
            UserError: beside companions with weights, which know the old vocabulary.
        """
        if (sizes or options) and any(True for _ in self.companions.parameters()):
            names = " and ".join(self.companions)
            raise UserError(f"The {names} beside this model would keep the old vocabulary; resize before `accompany`.")
        embedding = super().resize_token_embeddings(*sizes, **options)
        if self.model.boundaries is not None:
            self.model.boundaries.resize(embedding.num_embeddings)
        return embedding

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
        output_routes: bool = False,
        output_plan: bool = False,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DyadOutput | tuple[Any, ...]:
        """Logits of a chunk, and the loss if labels are given.

        In evaluation mode a model with `config.consensus` returns the log-probabilities of the consensus as logits.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, at least T), 0 for padding, anywhere in the row; its last T columns count.
            position_ids: (B or 1, T); a 0 starts a new document in the row (packing). Other values are not read.
            inputs_embeds: (B, T, D) instead of input_ids.
            past_key_values: the state to continue from, updated in place; None for a fresh start.
            labels: (B, T) int64, shifted inside; -100 is ignored.
            use_cache: whether to return the state; default: when one is given, or when not training.
            output_hidden_states: whether to return all hidden states.
            output_routes: whether to return routes and boundaries.
            output_plan: whether to return the plan, of models that have a planner.
            logits_to_keep: only the last so many positions (or these indices) get logits; 0: all.

        Raises:
            UserError: a cache of another kind or batch size, or an attention mask that is not (B, T); embeddings in
                place of tokens while companions train, which read the tokens.
        """
        config = self.config
        return_dict = config.return_dict if return_dict is None else return_dict
        show_all = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if (
            return_dict
            and use_cache is not False
            and not (show_all or output_routes or output_plan or labels is not None)
        ):
            fast = self.decoded(input_ids, attention_mask, position_ids, past_key_values)
            if fast is not None:
                return DyadOutput(logits=fast, past_key_values=past_key_values)
        companions = [cast(AuxiliaryModule, part) for part in self.companions.values()] if self.training else []
        extra = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)} if companions else {}
        added = [part for part in (companion.embed(extra) for companion in companions) if part is not None]
        teaching = labels is not None and any(companion.reads_plan for companion in companions)
        mass = 0.0 if self.training or self.planner is None else self.config.consensus
        planning = self.planner is not None and bool(output_plan or teaching or mass)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_routes=output_routes,
            output_outlook=planning,
            added_embeds=torch.stack(added).sum(0) if added else None,
            return_dict=True,
            **{name: kwargs[name] for name in ("cu_seq_lens_q", "seq_idx") if name in kwargs},
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        plan = None
        if planning:
            logits, plan = self.planner.with_plan(self, hidden[:, keep], logits, outputs.outlook, keep, mass)
        loss, metrics = None, outputs.metrics
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if companions:
                if input_ids is None:
                    raise UserError(
                        "What trains beside this model reads input_ids, not inputs_embeds; give those, "
                        "or empty model.companions."
                    )
                given = TrainingPass(input_ids, labels, attention_mask, position_ids, hidden, extra, plan)
                metrics = add_up([metrics or {}, *[companion.losses(given) for companion in companions]])
            if self.training and metrics is not None and "cost" in metrics:
                loss = loss + metrics["cost"]
        output = DyadOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            routes=outputs.routes,
            boundaries=outputs.boundaries,
            metrics=metrics,
            plan=plan if output_plan else None,
        )
        return as_asked(output, return_dict)


register_models()
