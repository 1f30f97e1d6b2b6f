"""kNN-LM: the tokens that followed the most similar states of a text, mixed into the predictions of any model.

Khandelwal et al. 2020, arXiv 1911.00172. The store holds, for each token of a text, what the model's output matrix
reads before it (its key) and the token itself. It is built once and does not change while other texts are read, so the
model stays causal. The search is that of faiss.

    p(w) = (1 - share) p_model(w) + share Σ_i softmax_i(-|key - key_i|² / temperature) [w_i = w]

Dimension letters: B batch, T tokens, D width, V vocabulary, N tokens in the store, K neighbours.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dyadlm.errors import UserError


class Neighbours:
    """A store beside a model. `remove()` takes it away."""

    def __init__(self, keys: np.ndarray, tokens: np.ndarray, count: int, share: float, temperature: float):
        """keys: (N, D) float32; tokens: (N,) int64. count: K."""
        try:
            import faiss
        except ImportError as error:
            raise UserError("kNN-LM needs faiss; run: pip install 'dyadlm[zoo]'") from error
        self.index = faiss.IndexFlatL2(keys.shape[1])
        self.index.add(keys)
        self.tokens, self.count, self.share, self.temperature = tokens, min(count, len(keys)), share, temperature
        self.remove: Callable[[], None] = lambda: None

    def mix(self, head: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """The logits (B, T, V) of the output matrix, mixed; log-probabilities."""
        hidden = inputs[0].detach()
        found = self.index.search(hidden.flatten(0, -2).float().cpu().numpy(), self.count)
        distance, place = (torch.from_numpy(part).to(logits.device) for part in found)
        weight = torch.softmax(-distance / self.temperature, -1)
        near = logits.new_zeros(len(weight), logits.shape[-1])
        near.scatter_add_(1, torch.from_numpy(self.tokens).to(logits.device)[place], weight.to(logits.dtype))
        mixed = (1 - self.share) * logits.softmax(-1) + self.share * near.view_as(logits)
        return mixed.clamp(min=torch.finfo(logits.dtype).tiny).log()


@torch.no_grad()
def add_neighbours(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    length: int = 256,
    neighbours: int = 32,
    share: float = 0.25,
    temperature: float = 0.1,
    most: int = 200_000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Neighbours:
    """Read a text and mix its neighbours into what the model predicts from then on. Weights do not change.

    tokens: (T,) int64, the training text, of which up to `most` tokens are stored. length: of the windows in which it
    is read. temperature: in units of the mean squared distance between keys.

    Raises:
        UserError: fewer than two tokens, a share outside 0 to 1, a model without an output matrix, or no faiss.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"A {model.config.model_type} model has no output matrix whose inputs could be compared.")
    if len(tokens) < 2 or not 0 <= share <= 1:
        raise UserError("Neighbours need a text of at least two tokens, and a share between 0 and 1.")
    tokens = tokens[: most + 1]
    keys: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda head, inputs: keys.append(inputs[0][0].float().cpu()))
    was_training = model.training
    model.train(False)
    try:
        for begin in range(0, len(tokens) - 1, length):
            window = tokens[begin : min(begin + length, len(tokens) - 1)]
            model(input_ids=window[None].to(model.device), use_cache=False)
            progress(begin + len(window), len(tokens) - 1)
    finally:
        handle.remove()
        model.train(was_training)
    stored = torch.cat(keys).contiguous()
    spread = 2 * float(stored.var(0, correction=0).sum())
    found = Neighbours(stored.numpy(), tokens[1:].cpu().numpy(), neighbours, share, temperature * max(spread, 1e-12))
    found.remove = head.register_forward_hook(found.mix).remove
    return found
