"""Any Hugging Face causal language model as a subject; of a dyadlm model also its routes, boundaries and levels.

Dimension letters: B texts, T tokens, V vocabulary, H heads, K levels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.causal_lm import context_of, vocabulary_size
from dyadlm.diagnose.contract import Subject, require_numbers
from dyadlm.evaluate.inspection import level_names
from dyadlm.model import DyadForCausalLM
from dyadlm.model.extras.planner import node_errors
from dyadlm.model.trace import without_level
from dyadlm.train.fingerprint import Fingerprint

# What models of transformers call the norm before their head.
LAST_NORMS = ("norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "final_norm", "ln_out", "post_layernorm")

# No training begins with it, so that random weights are not what a model began with.
UNTRAINED_SEED = int.from_bytes(b"init")


class HuggingFaceSubject(Subject):
    """A model of transformers, in evaluation mode on its own device.

    Where logits are not numbers every method raises `NotApplicable`: no figure follows from them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str = "model",
        fingerprint: Fingerprint | None = None,
    ):
        """fingerprint: what the model saw of the global index of its training tokens, if that is known."""
        self.fingerprint = None if fingerprint is None else fingerprint.to(model.device).eval()
        self.model = model.eval()  # type: ignore[no-untyped-call]
        self.tokenizer = tokenizer
        self.name = name
        self.vocabulary = vocabulary_size(model)
        self.context = context_of(model)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        return self._numbers(self._run(ids).logits)

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> list[Tensor] | None:
        states = getattr(self._run(ids, output_hidden_states=True), "hidden_states", None)
        return None if states is None else [self._numbers(state) for state in states]

    @torch.no_grad()
    def attention(self, ids: Tensor) -> list[Tensor] | None:
        if isinstance(self.model, DyadForCausalLM):
            return None
        chosen = getattr(self.model.config, "_attn_implementation", None)
        try:  # other implementations do not show their weights
            self.model.set_attn_implementation("eager")
            weights = getattr(self._run(ids, output_attentions=True), "attentions", None)
        except (ValueError, AttributeError, NotImplementedError):
            return None
        finally:
            if chosen is not None:
                self.model.set_attn_implementation(chosen)
        shown = [weight for weight in weights or () if isinstance(weight, Tensor) and weight.dim() == 4]
        return [self._numbers(weight) for weight in shown] or None

    @torch.no_grad()
    def routes(self, ids: Tensor) -> list[Tensor] | None:
        if isinstance(self.model, DyadForCausalLM):
            routes = self._run(ids, output_routes=True).routes
            return None if routes is None else [self._numbers(route) for route in routes]
        count = getattr(self.model.config, "num_experts_per_tok", None)
        if not isinstance(count, int) or not hasattr(self.model.config, "output_router_logits"):
            return None
        scores = getattr(self._run(ids, output_router_logits=True), "router_logits", None)
        found = [score for score in scores or () if isinstance(score, Tensor) and score.numel() > ids.numel()]
        return [_experts(self._numbers(score), count).view(*ids.shape, 1, -1) for score in found] or None

    @torch.no_grad()
    def bounds(self, ids: Tensor) -> dict[str, Tensor] | None:
        if not isinstance(self.model, DyadForCausalLM):
            return None
        begins = self._run(ids, output_routes=True).boundaries
        if begins is None:
            return None
        names = [name for name in self.model.config.semantic_levels or () if name != "learned"]
        learned = [f"learned {layer}" for layer in range(begins.shape[-1] - len(names))]
        return dict(zip([*names, *learned], begins.cpu().unbind(-1), strict=True))

    @torch.no_grad()
    def lens(self, hidden: Tensor) -> Tensor | None:
        if self._head is None:
            return None
        norm, head = self._head
        weight = cast(Tensor, head.weight)
        return self._numbers(head(norm(hidden.to(weight.device, weight.dtype))))

    @cached_property
    @torch.no_grad()
    def _head(self) -> tuple[nn.Module, nn.Module] | None:
        """The norm and the head, where together they are seen to make the logits of what the norm reads."""
        inner, head = self.model.base_model, self.model.get_output_embeddings()
        inner = getattr(inner, "decoder", inner)
        norms = [module for name in LAST_NORMS if isinstance(module := getattr(inner, name, None), nn.Module)]
        if not norms or not isinstance(head, nn.Module):
            return None
        seen: list[Tensor] = []
        hook = norms[0].register_forward_hook(lambda module, read, said: seen.append(said))
        try:
            logits = self._run(torch.arange(8)[None] % self.vocabulary).logits
        finally:
            hook.remove()
        made = head(seen[-1]) if seen and isinstance(seen[-1], Tensor) else None
        if made is None or made.shape != logits.shape:
            return None
        return (norms[0], head) if torch.allclose(made, logits, rtol=1e-3, atol=1e-3) else None

    @torch.no_grad()
    def blend(self, ids: Tensor, other: Tensor, share: Tensor) -> Tensor | None:
        toward = cast(nn.Module, self.model.get_input_embeddings())(other.to(self.model.device))
        far = share.to(toward.device, toward.dtype).view(-1, *[1] * (toward.dim() - 1))
        with self._embedded(lambda said: torch.lerp(said, toward, far)):
            return self._numbers(self._run(ids).logits[:, -1])

    @torch.no_grad()
    def fingerprinted(self, ids: Tensor, index: Tensor) -> Tensor | None:
        """Of tags (document, section, kind) nothing is shown."""
        if self.fingerprint is None:
            return None
        added = self.fingerprint.index(index.to(self.model.device))
        with self._embedded(lambda said: said + added.to(said.dtype)):
            return self.logits(ids)

    @contextmanager
    def _embedded(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """For one pass, the embedding of the text is changed; what else is embedded, as the proposals of a planner are
        after it, is not."""

        def first(module: nn.Module, read: tuple[Tensor, ...], said: Tensor) -> Tensor:
            hook.remove()
            return change(said)

        hook = cast(nn.Module, self.model.get_input_embeddings()).register_forward_hook(first)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def forecasts(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        if not isinstance(self.model, DyadForCausalLM) or self.model.planner is None:
            return None
        plan = self._run(ids, output_plan=True, logits_to_keep=1).plan
        missed, stayed = node_errors(plan.outlook, self.model.config.ranks)
        return self._numbers(missed), self._numbers(stayed)

    def untrained(self) -> Subject | None:
        with torch.random.fork_rng():
            torch.manual_seed(UNTRAINED_SEED)
            try:
                fresh = type(self.model)(deepcopy(self.model.config))
            except (TypeError, ValueError, RuntimeError):
                return None  # not every class can be made of its configuration
        buffers = dict(fresh.named_buffers())
        for name, buffer in self.model.named_buffers():  # what is known of the tokenizer, and how far training was
            if name in buffers and buffers[name].shape == buffer.shape:
                buffers[name].copy_(buffer)
        fresh = fresh.to(device=self.model.device, dtype=self.model.dtype)
        return HuggingFaceSubject(fresh, self.tokenizer, f"{self.name} untrained")

    @property
    def levels(self) -> Sequence[str]:
        return level_names(self.model.config) if isinstance(self.model, DyadForCausalLM) else ()

    @torch.no_grad()
    def without_level(self, level: int) -> Subject | None:
        if not 0 <= level < len(self.levels):
            return None
        copied = without_level(cast(DyadForCausalLM, self.model), level)
        return HuggingFaceSubject(copied, self.tokenizer, f"{self.name} without {self.levels[level]}")

    @property
    def module(self) -> nn.Module:
        return cast(nn.Module, self.model)

    @property
    def identity(self) -> Mapping[str, Any]:
        weights = sum(float(weight.detach().double().sum()) for weight in self.model.parameters())
        return {
            **super().identity,
            "type": self.model.config.model_type,
            "weights": str(weights),  # as text, for NaN equals nothing
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
        }

    @torch.no_grad()
    def greedy(self, ids: Tensor, count: int) -> Tensor:
        """The end of text is banned, so that `count` tokens are written; what else the model's own generation
        configuration asks for (penalties, banned tokens) is left aside."""
        own = self.model.generation_config
        bare = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            eos_token_id=None if own is None else own.eos_token_id,
        )
        try:  # what a given configuration leaves open, transformers takes from the model's own
            self.model.generation_config = bare
            written = self.model.generate(
                ids.to(self.model.device),
                generation_config=bare,
                attention_mask=torch.ones_like(ids, device=self.model.device),
                logits_processor=LogitsProcessorList([self._checked]),
            )
        finally:
            self.model.generation_config = own
        return cast(Tensor, written)[:, ids.shape[1] :].cpu()

    def _checked(self, ids: Tensor, scores: Tensor) -> Tensor:
        """A processor of logits that changes none, and refuses those that are not numbers."""
        self._numbers(scores)
        return scores

    def _run(self, ids: Tensor, **options: Any) -> Any:
        return self.model(input_ids=ids.to(self.model.device), use_cache=False, **options)

    def _numbers(self, output: Tensor) -> Tensor:
        return require_numbers(output, self.name, self.vocabulary).float().cpu()


def _experts(scores: Tensor, count: int) -> Tensor:
    """How much each expert weighs by a router's scores (N, E), logits or probabilities: the `count` best share 1."""
    are_shares = bool((scores >= 0).all()) and bool((scores.sum(-1) - 1).abs().max() < 1e-3)
    shares = scores if are_shares else scores.softmax(-1)
    best = shares.topk(min(count, shares.shape[-1]), -1)
    chosen = torch.zeros_like(shares).scatter(-1, best.indices, best.values)
    return chosen / chosen.sum(-1, keepdim=True)
