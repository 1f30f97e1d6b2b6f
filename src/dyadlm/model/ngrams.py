"""N-gram identity: the embedding of a token knows the tokens before it, by hashed tables of the last n tokens and of
the open word.

What the tables say is added to the embedding, whose norm is the identity channel, so that every block reads it. A model
then has atoms of several sizes, exactly and causally (Roy et al. 2022, arXiv 2205.09224; over-tokenized transformers,
arXiv 2501.16975). The state is that of the text: the last tokens and the hash of the open word. What a planner imagines
of tokens to come has no n-grams.

Dimension letters: B batch, T time, D width, N tables, M width of a table.
"""

from torch import Tensor, nn
from transformers import initialization as init

from dyadlm.model.cost import Cost


class NgramIdentity(nn.Module):
    """N tables of so many entries, one after another, and one projection of what they say: N M → D."""

    def __init__(self, count: int, entries: int, width: int, hidden_size: int):
        super().__init__()
        self.tables = nn.Embedding(count * entries, width)
        self.project = nn.Linear(count * width, hidden_size, bias=False)

    def initialize(self) -> None:
        """At first n-grams add nothing."""
        init.zeros_(self.project.weight)

    def forward(self, rows: Tensor) -> Tensor:
        """rows (B, T, N) int64, as `ngram_rows` returns them → what is added to the embedding (B, T, D)."""
        found = self.tables(rows.clamp(min=0)) * (rows >= 0)[..., None]
        return self.project(found.flatten(2))

    def cost(self, time: int) -> Cost:
        """Of T tokens; the state is counted with that of the text."""
        return Cost(time * self.project.in_features * self.project.out_features)
