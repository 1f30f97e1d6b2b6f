"""Cost of one more token after 1k, 10k, 100k and 1M tokens of context: milliseconds and bytes of state.

    python benchmarks/streaming.py

Each round times a burst of tokens at every context in turn, so that every figure has its pair at 1k in the same round.
Our states come from really reading so many bytes. The Llama's key-value caches are filled with noise of that length
(what stands in them does not change their cost), as far as --llama-context.
"""

import time

import torch
from transformers import DynamicCache

from common import Cells, arguments, circumstances, dyad, interval, matched_llama, require_green
from dyadlm import DyadCache
from dyadlm.accounting import state_bytes

CONTEXTS = (1_000, 10_000, 100_000, 1_000_000)
CHUNK = 8192


def read_states(model: torch.nn.Module, ids: torch.Tensor) -> dict[int, DyadCache]:
    """The state after each context of CONTEXTS, read once through in chunks."""
    states, cache, seen = {}, DyadCache(), 0
    for context in CONTEXTS:
        while seen < context:
            stop = min(context, seen + CHUNK)
            model(ids[:, seen:stop], past_key_values=cache, use_cache=True, logits_to_keep=1)
            seen = stop
        states[context] = cache.select_rows(torch.tensor([0]))
        print(f"read {context} tokens", flush=True)
    return states


def filled_cache(model: torch.nn.Module, context: int) -> DynamicCache:
    """A key-value cache of `context` positions of noise."""
    config = model.config
    shape = (1, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def burst(model: torch.nn.Module, cache: DyadCache | DynamicCache, ids: torch.Tensor) -> float:
    """Milliseconds per token over the tokens of ids (1, n), one at a time."""
    started = time.perf_counter()
    for t in range(ids.shape[1]):
        model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
    return 1000 * (time.perf_counter() - started) / ids.shape[1]


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__ or "", "streaming.json")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--burst", type=int, default=32)
    parser.add_argument("--llama-context", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    require_green()
    torch.manual_seed(0)
    ours, peer = dyad().eval(), matched_llama(positions=2_000_000).eval()
    ids = torch.randint(0, 256, (1, CONTEXTS[-1]))
    states = read_states(ours, ids)
    caches = {c: filled_cache(peer, c) for c in CONTEXTS if c <= options.llama_context}
    times: dict[str, list[float]] = {f"{n} {c}": [] for n, cs in (("dyad", states), ("llama", caches)) for c in cs}
    for number in range(options.rounds + 2):
        for context, state in states.items():
            taken = burst(ours, state.select_rows(torch.tensor([0])), ids[:, : options.burst])
            if number >= 2:  # the first rounds warm up
                times[f"dyad {context}"].append(taken)
        for context, cache in caches.items():
            taken = burst(peer, cache, ids[:, : options.burst])
            cache.crop(-options.burst)
            if number >= 2:
                times[f"llama {context}"].append(taken)
        print(f"round {number + 1} of {options.rounds + 2}", flush=True)
    cells = Cells(options.output)
    for name, taken in times.items():
        family, context = name.split()
        first = times[f"{family} {CONTEXTS[0]}"]
        bytes_held = states[int(context)].state_bytes() if family == "dyad" else cache_bytes(caches[int(context)])
        cells.store(
            name,
            {
                "milliseconds_per_token": interval(taken),
                "ratio_to_1000": interval([a / b for a, b in zip(taken, first, strict=True)]),
                "state_bytes": bytes_held,
                "rounds": options.rounds,
            },
        )
    assert all(states[c].state_bytes() == state_bytes(ours.config) for c in CONTEXTS)
    print(circumstances())


if __name__ == "__main__":
    main()
