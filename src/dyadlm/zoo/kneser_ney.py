"""A 5-gram model with interpolated Kneser-Ney smoothing, as a causal language model: the floor of a comparison.

Kneser and Ney 1995; Chen and Goodman 1999. From no context to four tokens of it, each order takes a discount d off its
counts and leaves what that frees to the order below:

    p_n(w | c) = max(count_n(cw) - d_n, 0) / count_n(c) + d_n distinct_n(c) / count_n(c) p_{n-1}(w | shorter c)

The longest n-grams are counted as they occur, shorter ones by how many different tokens stand before them. In training
mode each batch is scored and then counted, once; discounts and the distribution below all orders are trained by
gradient. Counts are in hashed tables, so that the size is constant. An entry belongs to the n-gram that came first, and
its tag says to which: another one that would take the same entry is not counted.

Dimension letters: B batch, T tokens, V vocabulary, N n-grams.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from dyadlm.zoo.mixer import MixerCache

FACTOR, SPREAD = 6364136223846793005, -7046029254386353131  # odd, of 64 bits
DISCOUNT = 0.75  # at first
MOST = 32_767  # of a count


class KneserNeyConfig(PreTrainedConfig):
    """order: tokens of the longest n-grams. entries: of the counts of each order, a power of two."""

    model_type = "dyadlm_kneser_ney"

    vocab_size: int = 259
    order: int = 5
    entries: int = 2**21
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


def longer(hashed: Tensor, token: Tensor) -> Tensor:
    """Hashes of n-grams, int64, with one more token behind."""
    return (hashed ^ (hashed >> 31)) * FACTOR + token + 1


def place(hashed: Tensor, entries: int) -> Tensor:
    """Entries of a table for hashes."""
    return ((hashed ^ (hashed >> 29)) * SPREAD >> 33) & (entries - 1)


def tag(hashed: Tensor) -> Tensor:
    """Tags of hashes, int32, never 0: that of an empty entry."""
    return ((hashed ^ (hashed >> 27)) * FACTOR >> 33).to(torch.int32) | 1


class KneserNeyForCausalLM(PreTrainedModel, GenerationMixin):
    """The model. Padding is possible on the right alone, where no loss is taken."""

    config: KneserNeyConfig
    config_class = KneserNeyConfig
    base_model_prefix = "model"
    _is_stateful = True
    counts: Tensor
    totals: Tensor
    distinct: Tensor
    grams: Tensor
    histories: Tensor

    def __init__(self, config: KneserNeyConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, 1)  # logits of the distribution below all orders
        self.discounts = nn.Parameter(torch.empty(config.order))  # by the logistic function
        for name, entries, kind in (
            ("counts", config.entries, torch.int16),
            ("grams", config.entries, torch.int32),  # tags of the counts
            ("totals", config.entries // 4, torch.int32),
            ("distinct", config.entries // 4, torch.int32),
            ("histories", config.entries // 4, torch.int32),  # tags of both
        ):
            self.register_buffer(name, torch.zeros(config.order, entries, dtype=kind))
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self and not getattr(self.discounts, "_is_hf_initialized", False):
            self.discounts.fill_(float(np.log(DISCOUNT / (1 - DISCOUNT))))
            self.embed_tokens.weight.zero_()
            for table in self.buffers():
                table.zero_()

    def contexts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hashes of the last 0 to order - 1 tokens up to each, (order, B, T) int64; whether there are as many, bool.

        ids: (B, T), -1 before the beginning of a text.
        """
        hashed, known = [torch.zeros_like(ids)], [torch.ones_like(ids, dtype=torch.bool)]
        for size in range(1, self.config.order):
            part = torch.zeros_like(ids)
            for back in range(size - 1, -1, -1):
                part = longer(part, ids.roll(back, 1))
            here = torch.arange(ids.shape[1], device=ids.device) >= size - 1
            hashed.append(part)
            known.append(known[-1] & here & (ids.roll(size - 1, 1) >= 0))
        return torch.stack(hashed), torch.stack(known)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Log-probabilities (B, T, V) as logits, and the loss if labels are given. In training mode the tokens are
        counted afterwards."""
        cache = past_key_values or MixerCache()
        before = cache.states[0] if cache.states else input_ids.new_full((len(input_ids), self.config.order - 1), -1)
        ids = torch.cat([before, input_ids], 1)
        contexts, known = (part[..., before.shape[1] :] for part in self.contexts(ids))
        tokens = torch.arange(self.config.vocab_size, device=ids.device)
        chance = self.embed_tokens.weight[:, 0].softmax(0).expand(*input_ids.shape, -1)
        for order, discount in enumerate(self.discounts.sigmoid()):
            at = place(contexts[order], self.totals.shape[1])
            met = known[order] & (self.histories[order, at] == tag(contexts[order]))
            total = (self.totals[order, at] * met)[..., None]
            grams = longer(contexts[order][..., None], tokens)
            entries = place(grams, self.counts.shape[1])
            counts = self.counts[order, entries] * (self.grams[order, entries] == tag(grams))
            freed = discount * self.distinct[order, at][..., None]
            mixed = ((counts - discount).clamp(min=0) + freed * chance) / total.clamp(min=1)
            chance = torch.where(total > 0, mixed, chance)
        logits = chance.clamp(min=1e-12).log()[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if self.training:
            self.count(input_ids)
        if not (use_cache if use_cache is not None else self.config.use_cache and not self.training):
            return CausalLMOutputWithPast(loss=loss, logits=logits)
        cache.states, cache.tokens = [ids[:, 1 - self.config.order :]], cache.tokens + input_ids.shape[1]
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]

    @torch.no_grad()
    def count(self, ids: Tensor) -> None:
        """Count the n-grams of texts (B, T): the longest always, shorter ones where a longer one is new."""
        contexts, known = (part[..., :-1].flatten(1) for part in self.contexts(ids))
        tokens = ids[:, 1:].flatten()
        left = known[-1].nonzero()[:, 0]  # the tokens that end an n-gram to be counted
        for order in range(self.config.order - 1, -1, -1):
            context = contexts[order, left]
            grams = longer(context, tokens[left])
            at = place(context, self.totals.shape[1])
            entries = place(grams, self.counts.shape[1])
            kept = _owned(self.histories[order], at, tag(context)) & _owned(self.grams[order], entries, tag(grams))
            at, entries, left = at[kept], entries[kept], left[kept]
            found = np.unique(entries.cpu().numpy(), return_index=True, return_counts=True)
            entry, first, times = (torch.from_numpy(part).to(ids.device) for part in found)
            seen = self.counts[order, entry]
            first = first[seen == 0]
            self.counts[order, entry] = (seen + times).clamp(max=MOST).to(self.counts.dtype)
            ones = torch.ones_like(at, dtype=self.totals.dtype)
            self.totals[order].index_add_(0, at, ones)
            self.distinct[order].index_add_(0, at[first], ones[: len(first)])
            left = left[first]


def _owned(owners: Tensor, places: Tensor, tags: Tensor) -> Tensor:
    """Give entries that are empty to the tags that ask for them first; which tags have theirs, bool (N,)."""
    entry, first = (torch.from_numpy(part).to(places.device) for part in np.unique(places.cpu(), return_index=True))
    empty = owners[entry] == 0
    owners[entry[empty]] = tags[first[empty]]
    return owners[places] == tags


def register_kneser_ney() -> None:
    """Make the Auto classes of transformers know the model."""
    AutoConfig.register(KneserNeyConfig.model_type, KneserNeyConfig, exist_ok=True)
    AutoModelForCausalLM.register(KneserNeyConfig, KneserNeyForCausalLM, exist_ok=True)


register_kneser_ney()
