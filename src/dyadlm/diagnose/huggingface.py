"""Any Hugging Face causal language model as a subject; of a dyadlm model also its routes, boundaries and levels.

Dimension letters: B texts, T tokens, V vocabulary, H heads, K levels.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.diagnose.contract import Subject
from dyadlm.diagnose.probe import NotApplicable
from dyadlm.evaluate.scoring import vocabulary_size
from dyadlm.model import DyadForCausalLM


class HuggingFaceSubject(Subject):
    """A model of transformers, in evaluation mode on its own device.

    Where logits are not numbers every method raises `NotApplicable`: no figure follows from them.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str = "model"):
        self.model = model.eval()  # type: ignore[no-untyped-call]
        self.tokenizer = tokenizer
        self.name = name
        self.vocabulary = vocabulary_size(model)
        learned = getattr(model.config, "max_position_embeddings", None)
        self.context = None if isinstance(model, DyadForCausalLM) or not isinstance(learned, int) else learned

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
        if not isinstance(self.model, DyadForCausalLM):
            return None
        routes = self._run(ids, output_routes=True).routes
        return None if routes is None else [self._numbers(route) for route in routes]

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

    @property
    def module(self) -> nn.Module:
        return cast(nn.Module, self.model)

    @property
    def identity(self) -> Mapping[str, Any]:
        weights = sum(float(weight.double().sum()) for weight in self.model.parameters())
        return {**super().identity, "type": self.model.config.model_type, "weights": weights}

    @torch.no_grad()
    def greedy(self, ids: Tensor, count: int) -> Tensor:
        written = self.model.generate(
            ids.to(self.model.device),
            attention_mask=torch.ones_like(ids, device=self.model.device),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
        return cast(Tensor, written)[:, ids.shape[1] :].cpu()

    def _run(self, ids: Tensor, **options: Any) -> Any:
        return self.model(input_ids=ids.to(self.model.device), use_cache=False, **options)

    def _numbers(self, output: Tensor) -> Tensor:
        if not bool(torch.isfinite(output[..., : self.vocabulary].float()).any(-1).all()) or bool(output.isnan().any()):
            raise NotApplicable(f"{self.name} returns values that are not numbers")
        return output.float().cpu()
