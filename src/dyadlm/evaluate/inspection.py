"""What the mechanisms of a dyadlm model do: which levels are chosen, where segments begin, what slots recall.

Dimension letters: B texts, T tokens, L layers, H heads, K levels, C ranks of all levels, N contexts.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dyadlm.data.encoding import TextEncoder
from dyadlm.errors import UserError
from dyadlm.model import DyadConfig, DyadForCausalLM
from dyadlm.model.boundaries import LEARNED
from dyadlm.model.extras.planner import LEAST, Forecasts, forecast_errors, node_errors
from dyadlm.model.trace import level_contributions, ngram_shares, slot_hits
from dyadlm.ops.pyramid import make_clock
from dyadlm.ops.selection import chosen_count, entropy, load, mean_run_length

# What is looked at token by token is kept for so many tokens at most.
MOST_TOKENS = 512


@dataclass(frozen=True)
class Behaviour:
    """What the mechanisms did on B texts of T tokens, each from a fresh state. Empty for what a model does not have.

    routes: (L, B, T, H, K), weights of the levels. segments: by name of the level, (1 or L, B, T) bool, where they
    begin: for each layer if learned, else for all of them. hits: by context, (B, T) bool, where slots knew it.
    outlook: what was foreseen of the levels and came; ranks: their names and widths. ngrams: (B, T), as `ngram_shares`.
    """

    routes: Tensor | None
    segments: dict[str, Tensor]
    hits: dict[str, Tensor]
    outlook: Forecasts | None = None
    ranks: tuple[tuple[str, int], ...] = ()
    ngrams: Tensor | None = None

    def measures(self) -> dict[str, float]:
        """Means over all texts, layers and heads, as flat names.

        commitment: the entropy of the weights over log K, 0 for one level alone. levels_chosen: that weigh more than
        zero. run_length: tokens for which a head's set of levels stays. largest_load, smallest_load: the share of
        tokens at which the most and the least used level of any head is chosen. segment_length_NAME: tokens.
        skill_LEVEL: by how much forecasts of its nodes are better than persistence: 1 for what came, 0 for what stood.
        hits_CONTEXT: the share of tokens at which slots knew the context. ngram_share: how long what n-grams add to an
        embedding is, beside the embedding.
        """
        found: dict[str, float] = {}
        if self.routes is not None:
            heads = torch.cat(list(self.routes), 2)  # (B, T, L H, K): layers count as heads
            clock = make_clock(*heads.shape[:2], device=heads.device)
            shares = load(heads, clock)
            found = {
                "commitment": entropy(heads).mean().item(),
                "levels_chosen": chosen_count(heads).float().mean().item(),
                "run_length": mean_run_length(heads, clock),
                "largest_load": shares.max().item(),
                "smallest_load": shares.min().item(),
            }
        for name, begins in self.segments.items():
            found[f"segment_length_{name}"] = begins.numel() / max(int(begins.sum()), 1)
        for name, hit in self.hits.items():
            found[f"hits_{name}"] = hit.float().mean().item()
        if self.ngrams is not None:
            found["ngram_share"] = self.ngrams.mean().item()
        if self.outlook is not None:
            skills = forecast_errors(self.outlook, [rank for _, rank in self.ranks]).skills()
            judged = self.outlook.judged.sum((0, 1)).tolist()
            for (name, _), skill, count in zip(self.ranks, skills.tolist(), judged, strict=True):
                if count:
                    found[f"skill_{name}"] = skill
        return found

    def skills(self) -> Tensor | None:
        """(K, T), of the first text: the skill of the node that has just come, from -1 at worst to 1; held until the
        next one; not a number before the first. None for models that forecast nothing."""
        if self.outlook is None:
            return None
        missed, stayed = (error[0] for error in node_errors(self.outlook, [rank for _, rank in self.ranks]))
        skill = (1 - missed / stayed.clamp(min=LEAST)).clamp(min=-1)
        judged = self.outlook.judged[0]
        columns = torch.arange(len(judged), device=judged.device)[:, None]
        latest = torch.where(judged, columns, -1).cummax(0).values
        return skill.gather(0, latest.clamp(min=0)).masked_fill(latest < 0, torch.nan).T

    def layer(self, number: int) -> "Behaviour":
        """That of one layer alone, without what all layers share."""
        assert self.routes is not None
        learned = {name: begins[number : number + 1] for name, begins in self.segments.items() if len(begins) > 1}
        return Behaviour(self.routes[number : number + 1], learned, {})


@torch.no_grad()
def behaviour(model: PreTrainedModel, ids: Tensor) -> Behaviour:
    """What the mechanisms do on texts (B, T) int64, each from a fresh state; of other models nothing is known."""
    config = model.config
    if not isinstance(config, DyadConfig) or not isinstance(model, DyadForCausalLM):
        return Behaviour(None, {}, {})
    output = model(input_ids=ids, output_routes=True, output_plan=True, use_cache=False, logits_to_keep=1)
    routes = None if output.routes is None else torch.stack(output.routes)
    segments: dict[str, Tensor] = {}
    if output.boundaries is not None:
        names = [name for name in config.semantic_levels or () if name != LEARNED]
        by_rule, learned = output.boundaries[..., : len(names)], output.boundaries[..., len(names) :]
        segments = {name: begins[None] for name, begins in zip(names, by_rule.unbind(-1), strict=True)}
        if learned.shape[-1]:
            own = learned.shape[-1] if config.tower == "layer" else 1  # one tower has one router
            segments[LEARNED] = learned.permute(2, 0, 1)[:own]
    found = Behaviour(routes, segments, slot_hits(model, ids), ngrams=ngram_shares(model, ids))
    if output.plan is None:
        return found
    return replace(found, outlook=output.plan.outlook, ranks=tuple(zip(config.level_keys, config.ranks, strict=True)))


@torch.no_grad()
def opinions(model: DyadForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """The log-probability, float32 (T,), that each part of a planner gave to the tokens ids (T,) that came; not a
    number where it said nothing yet. Engineer, artist and, where there is one, consensus speak a token before it, the
    proposal two. Empty for models without a planner."""
    if model.planner is None:
        return {}
    output = model(input_ids=ids[None], output_plan=True, output_hidden_states=True, use_cache=False)
    said = {"engineer": model.lm_head(output.hidden_states[-1]), "artist": output.plan.artist}
    if model.config.consensus:
        said["consensus"] = output.logits
    found = {}
    for name, logits in {**said, "proposal": output.plan.proposal}.items():
        ahead = 2 if name == "proposal" else 1
        came = logits[0, :-ahead].float().log_softmax(-1).gather(-1, ids[ahead:, None]).squeeze(-1)
        found[name] = torch.cat([came.new_full((len(ids) - len(came),), torch.nan), came])
    return found


def level_names(config: DyadConfig) -> list[str]:
    """What each level spans: tokens, then the names of the semantic levels."""
    windows = len(config.alignments)
    return [f"{2**level:,}" for level in range(windows)] + config.level_keys[windows:]


@dataclass(frozen=True)
class TowerReading:
    """How a model read one text of T tokens.

    pieces: the text of each token. levels: their names. contributions: (L, K, T) float, the length of what each level
    adds to the hidden state. opinions: as in `opinions`. notes: what could not be measured, in sentences.
    """

    pieces: list[str]
    levels: list[str]
    contributions: Tensor
    behaviour: Behaviour
    opinions: dict[str, Tensor]
    notes: list[str]

    def figures(self) -> dict[str, Any]:
        """The measures, for JSON: `all`, with nats per token of each of the opinions, and `layers` with a record each,
        none for models that do not select."""
        routes = self.behaviour.routes
        layers = [self.behaviour.layer(number).measures() for number in range(0 if routes is None else len(routes))]
        nats = {f"{name}_nats": -said.nanmean().item() for name, said in self.opinions.items() if len(said) > 2}
        return {"all": self.behaviour.measures() | nats, "layers": layers}


@torch.no_grad()
def read_tower(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> TowerReading:
    """Read a text and look at everything that the levels and mechanisms do.

    Raises `UserError` for a model without a tower, an empty text, and one of more than `MOST_TOKENS` tokens.
    """
    if not isinstance(model, DyadForCausalLM):
        raise UserError(f"A {model.config.model_type} model has no tower to look at; give a dyadlm model.")
    content = text.encode()
    ids, starts = TextEncoder(tokenizer).encode(content)
    if not 1 <= len(ids) <= MOST_TOKENS:
        raise UserError(f"Give a text of 1 to {MOST_TOKENS} tokens, not {len(ids)}.")
    tokens = torch.from_numpy(ids).long().to(model.device)
    pieces = [content[a:b].decode(errors="replace") for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    seen = behaviour(model, tokens[None])
    notes = []
    if model.config.slot_contexts and not seen.hits:
        notes.append("Where slots hit is not shown: what this model writes depends on more than the tokens.")
    spoken = level_contributions(model, tokens)
    return TowerReading(pieces, level_names(model.config), spoken, seen, opinions(model, tokens), notes)
