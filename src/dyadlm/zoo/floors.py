"""What the last few tokens alone say: a model that is worth its cost does better."""

from transformers import PreTrainedModel

from dyadlm.zoo.family import Family, Sizes


def _kneser_ney(sizes: Sizes) -> PreTrainedModel:
    from dyadlm.zoo.kneser_ney import KneserNeyConfig, KneserNeyForCausalLM

    return KneserNeyForCausalLM(KneserNeyConfig(vocab_size=sizes.vocabulary))


def _hashed_ngrams(sizes: Sizes) -> PreTrainedModel:
    """The last two tokens by one level, n-grams by tables; no other past."""
    from dyadlm.model import DyadConfig, DyadForCausalLM

    return DyadForCausalLM(
        DyadConfig(
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            vocab_size=sizes.vocabulary,
            max_position_embeddings=sizes.length,
            intermediate_size=sizes.inner,
            num_levels=1,
            level_rank=8,
            semantic_levels=[],
            ngram_sizes=[2, 3, 4, 5, 6],
            ngram_entries=16 * sizes.width,
            ngram_width=24,
        )
    )


FLOORS = (
    Family(
        "kneser-ney", "counts of up to 5 tokens, smoothed", "floor", "Kneser and Ney 1995; Chen and Goodman 1999",
        _kneser_ney, sized=False, decodes="state",
    ),
    Family(
        "hashed-ngrams", "embeddings of hashed 2- to 6-grams, no other past", "floor",
        "Bojanowski et al. 2017, arXiv 1607.04606", _hashed_ngrams, layers=2, decodes="state",
    ),
)  # fmt: skip
"""`dyadlm evaluate --memory` adds counts of what is being read to any of them (`dyadlm.memory`)."""
