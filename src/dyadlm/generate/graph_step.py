"""A decoding step as one CUDA graph: the host starts one graph for a token in place of thousands of kernels.

The state lies in tensors that never move. A step reads them, and puts what the model returns back into them.

Dimension letters: B rows, V vocabulary.
"""

import torch
from torch import Tensor

from dyadlm.model import DyadCache, DyadForCausalLM
from dyadlm.model.cache import once

WARM_UP = 2  # passes before a graph is recorded, in which libraries take their memory


class GraphStep:
    """Reads one token a row after a state, which it takes over; `cache` stands where it stands at any time.

    model: in evaluation mode. cache: a state with at least one token read; it must not be used elsewhere while this
    object is. record: whether to record a graph, which needs CUDA; without one, the same steps run one by one.
    """

    def __init__(self, model: DyadForCausalLM, cache: DyadCache, record: bool = True):
        assert not cache.is_empty, "the state of no token has no rows"
        self.model, self.cache = model, cache
        own = once(torch.clone)  # forks of the cache share its tensors, which are written here
        self._held = {name: own(tensor) for name, tensor in cache.tensors().items()}
        self._token = torch.zeros(cache.batch_size, 1, dtype=torch.long, device=model.device)
        self._began = cache.may_begin  # a graph follows one path: that of rows that continue
        cache._set(self._held, len(cache.layers))
        cache.may_begin = self._began
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        if record:
            self._record()

    def step(self, tokens: Tensor) -> Tensor:
        """Read tokens (B,) int64; returns logits (B, V), which the next call overwrites, as it does the tensors of
        `cache`; to go on from here elsewhere, take `fork`."""
        self._token.copy_(tokens[:, None])
        if self._graph is None:
            self._logits = self._pass()
        else:
            self._graph.replay()
        assert self._logits is not None
        self.cache.columns_seen += 1
        return self._logits

    def fork(self) -> DyadCache:
        """A state that stands here and goes on by itself."""
        twin, own = DyadCache(), once(torch.clone)
        twin._set({name: own(tensor) for name, tensor in self._held.items()}, len(self.cache.layers))
        twin.columns_seen, twin.may_begin = self.cache.columns_seen, self.cache.may_begin
        return twin

    @torch.inference_mode()
    def _pass(self) -> Tensor:
        """The model over the held token and state, whose tensors are written."""
        working = DyadCache()
        working._set(self._held, len(self.cache.layers))
        working.may_begin = self._began
        logits: Tensor = self.model(input_ids=self._token, past_key_values=working, use_cache=True).logits[:, -1]
        for name, tensor in working.tensors().items():
            if tensor is not self._held[name]:
                self._held[name].copy_(tensor)
        return logits

    def _record(self) -> None:
        before = {name: tensor.clone() for name, tensor in self._held.items()}
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._pass()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._pass()
        self._graph = graph
        for name, tensor in before.items():
            self._held[name].copy_(tensor)
