"""All families, in the order of the list of prior art: how each is built, and which are not compared, and why.

Models of transformers are used where transformers has a causal one; layers of other libraries, and those that no
library has, stand in `dyadlm.zoo.mixer`. Weights are new; bytes and their special tokens are the usual vocabulary.
"""

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dyadlm.errors import UserError
from dyadlm.model.configuration import BYTE_VOCABULARY
from dyadlm.values import nearest
from dyadlm.zoo import beginnings
from dyadlm.zoo.family import Family, Sizes
from dyadlm.zoo.floors import FLOORS
from dyadlm.zoo.mixer import MixerConfig, MixerForCausalLM

HEADS, WINDOW = 4, 32
REACH, LEAST_REACH = 8, 2048  # how many times the trained length a model can read, and how many tokens at least


def reach(sizes: Sizes) -> int:
    """Tokens that a model can be asked to read at once: scores with a long context need 1,024 and a text more."""
    return max(REACH * sizes.length, LEAST_REACH)


def standard(
    kind: str, begin: Callable[[PreTrainedModel], None] | None = None, **fields: Any
) -> Callable[[Sizes], PreTrainedModel]:
    """A model of transformers by its type. begin: changes its new weights (`dyadlm.zoo.beginnings`). fields: of its
    configuration; values may be functions of the sizes."""

    def build(sizes: Sizes) -> PreTrainedModel:
        asked = {
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.width,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": HEADS,
            "intermediate_size": sizes.inner,
            "max_position_embeddings": reach(sizes),
            "tie_word_embeddings": True,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        own = {name: value(sizes) if callable(value) else value for name, value in fields.items()}
        config = AutoConfig.for_model(kind)
        known = asked | {"num_key_value_heads": HEADS}
        given = {name: value for name, value in known.items() if hasattr(config, name)} | own
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **given), trust_remote_code=False
        )
        if begin is not None:
            begin(made)
        return made

    return build


def mixed(mixer: str, **options: Any) -> Callable[[Sizes], PreTrainedModel]:
    """A model around a mixer of the zoo."""

    def build(sizes: Sizes) -> PreTrainedModel:
        return MixerForCausalLM(
            MixerConfig(
                vocab_size=sizes.vocabulary,
                hidden_size=sizes.width,
                num_hidden_layers=sizes.layers,
                num_attention_heads=HEADS,
                intermediate_size=sizes.inner,
                max_position_embeddings=reach(sizes),
                trained_length=sizes.length,
                mixer=mixer,
                options=options or None,
            )
        )

    return build


def own(preset: str) -> Callable[[Sizes], PreTrainedModel]:
    """A preset of dyadlm at another size; its levels and slots stay."""

    def build(sizes: Sizes) -> PreTrainedModel:
        from dyadlm.model import DyadConfig, DyadForCausalLM  # the zoo may be imported while they are

        if sizes.vocabulary != BYTE_VOCABULARY:
            raise UserError("The family dyad is compared on bytes; leave the vocabulary out.")
        fields = {
            "hidden_size": sizes.width,
            "num_hidden_layers": sizes.layers,
            "intermediate_size": sizes.inner,
            "max_position_embeddings": sizes.length,
        }
        return DyadForCausalLM(DyadConfig.from_preset(preset, **fields))

    return build


def scaled(**rope: Any) -> Callable[[Sizes], PreTrainedModel]:
    """A Llama whose rotary positions are stretched, so that it can read several times its trained length."""
    return standard(
        "llama",
        beginnings.dynamic_positions,
        rope_parameters=lambda sizes: {
            "rope_theta": 10_000.0,
            **({"original_max_position_embeddings": sizes.length} if rope["rope_type"] == "yarn" else {}),
            **rope,
        },
        # The base of `dynamic` is raised for texts longer than this field.
        max_position_embeddings=lambda sizes: sizes.length * (1 if rope["rope_type"] == "dynamic" else REACH),
    )


def _half(sizes: Sizes) -> int:
    return sizes.width // 2


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("dyad", "dyadlm, preset tiny", "–", "this project", own("tiny"), layers=4, decodes="state"),
        Family("llama", "full attention", "P1", "Touvron et al. 2023, arXiv 2302.13971", standard("llama")),
        Family(
            "grouped-query", "attention whose heads share two keys", "P1", "Ainslie et al. 2023, arXiv 2305.13245",
            standard("llama", num_key_value_heads=2),
        ),
        Family(
            "multi-query", "attention whose heads share one key", "P1", "Shazeer 2019, arXiv 1911.02150",
            standard("llama", num_key_value_heads=1),
        ),
        Family(
            "sliding", "attention to the last 64 tokens", "P2", "Jiang et al. 2023, arXiv 2310.06825",
            standard("mistral", sliding_window=64),
        ),
        *(
            Family(name, title, "P2", paper, mixed("pattern", pattern=name, window=WINDOW), decodes="nothing")
            for name, title, paper in (
                ("strided", "attention to the last 32 tokens and every 32nd", "Child et al. 2019, arXiv 1904.10509"),
                ("dilated", "half of the heads: every second of 64 tokens", "Beltagy et al. 2020, arXiv 2004.05150"),
                ("longformer", "the last 32 tokens and 4 global ones", "Beltagy et al. 2020, arXiv 2004.05150"),
                ("bigbird", "the last 32 tokens, 4 global, some random ones", "Zaheer et al. 2020, arXiv 2007.14062"),
                ("block", "blocks of 32 tokens and the block before", "Qiu et al. 2019, arXiv 1911.02972"),
            )
        ),
        Family(
            "linformer", "keys projected along the text", "P3", "Wang et al. 2020, arXiv 2006.04768",
            excluded="each projected key is a sum over the whole text, later tokens included.",
        ),
        Family(
            "nystromformer", "attention through landmarks", "P3", "Xiong et al. 2021, arXiv 2102.03902",
            excluded="landmarks are means over the whole text, later tokens included.",
        ),
        Family(
            "aft", "attention-free transformer, AFT-conv", "P3", "Zhai et al. 2021, arXiv 2105.14103", mixed("aft"),
            decodes="state",
        ),
        Family(
            "performer", "attention by random features", "P4", "Choromanski et al. 2021, arXiv 2009.14794",
            mixed("performer"), decodes="state",
        ),
        Family(
            "linear", "attention by elu features", "P4", "Katharopoulos et al. 2020, arXiv 2006.16236",
            mixed("linear"), decodes="state",
        ),
        Family(
            "reformer", "attention within hashed buckets", "P5", "Kitaev et al. 2020, arXiv 2001.04451",
            excluded="the causal class of transformers lets later tokens change earlier logits (0.015 here).",
        ),
        Family(
            "routing", "attention within clusters of keys", "P5", "Roy et al. 2021, arXiv 2003.05997",
            excluded="clusters are found over the whole text; its library lets later tokens change logits (1.8 here).",
        ),
        Family(
            "k-means", "attention to clusters of keys", "P5", "Vyas et al. 2020, arXiv 2007.04825",
            excluded="clusters are found over the whole text, later tokens included.",
        ),
        Family(
            "muse", "sums and differences of clusters of keys", "P5", "the project's source",
            excluded="there is no usable implementation, and clusters of a whole text hold later tokens.",
        ),
        Family(
            "fmm", "a band of attention and linear attention", "P5", "Nguyen et al. 2021, arXiv 2108.02347",
            mixed("fmm"), decodes="state",
        ),
        Family(
            "alibi", "attention with a bias for distance", "P6", "Press et al. 2022, arXiv 2108.12409",
            standard(
                "mpt", d_model=lambda sizes: sizes.width, n_layers=lambda sizes: sizes.layers, n_heads=HEADS,
                max_seq_len=reach, expansion_ratio=4,
            ),
            step=4, has_inner=False,
        ),
        Family(
            "relative", "attention with learned biases of distance", "P6", "Raffel et al. 2020, arXiv 1910.10683",
            mixed("relative"),
        ),
        Family(
            "interpolated", "Llama, positions divided by 8", "P6", "Chen et al. 2023, arXiv 2306.15595",
            scaled(rope_type="linear", factor=8.0),
        ),
        Family(
            "ntk", "Llama, base raised with the length", "P6", "bloc97 2023; dynamic NTK of transformers",
            scaled(rope_type="dynamic", factor=8.0),
        ),
        Family(
            "yarn", "Llama, slow rotations divided", "P6", "Peng et al. 2023, arXiv 2309.00071",
            scaled(rope_type="yarn", factor=8.0),
        ),
        Family("s4d", "diagonal state space", "P7", "Gu et al. 2022, arXiv 2206.11893", mixed("s4d"), decodes="state"),
        Family(
            "s5", "one state space for all numbers", "P7", "Smith et al. 2023, arXiv 2208.04933", mixed("s5"),
            packages=("s5",), decodes="state",
        ),
        Family(
            "mamba", "state space with gates of the token", "P7", "Gu and Dao 2023, arXiv 2312.00752",
            standard(
                "mamba", beginnings.mamba, initializer_range=0.02, use_mambapy=True, state_size=16,
                time_step_rank=lambda sizes: max(1, sizes.width // 16), intermediate_size=lambda sizes: 2 * sizes.width,
            ),
            layers=8, step=4, has_inner=False, packages=("mambapy",), decodes="state",
        ),
        Family(
            "mamba2", "the same with one decay for each head", "P7", "Dao and Gu 2024, arXiv 2405.21060",
            standard(
                "mamba2", beginnings.mamba, initializer_range=0.02, state_size=64, num_heads=HEADS, n_groups=1,
                chunk_size=64, head_dim=lambda sizes: 2 * sizes.width // HEADS, expand=2,
            ),
            layers=9, step=4, has_inner=False, decodes="state",
        ),
        Family(
            "hyena", "long convolutions between gates", "P8", "Poli et al. 2023, arXiv 2302.10866", mixed("hyena"),
            decodes="nothing",
        ),
        Family(
            "retnet", "attention that fades", "P9", "Sun et al. 2023, arXiv 2307.08621", mixed("retention"),
            step=8 * HEADS, packages=("yet_another_retnet", "einops"), decodes="state",
        ),
        Family(
            "rwkv", "RWKV-4", "P9", "Peng et al. 2023, arXiv 2305.13048",
            standard(
                "rwkv", beginnings.rwkv, attention_hidden_size=lambda sizes: sizes.width, context_length=reach,
                rescale_every=0,  # which is for 16-bit weights
            ),
            decodes="state",
        ),
        Family(
            "moe", "a mixture of 4 experts, 2 for each token", "P10", "Jiang et al. 2024, arXiv 2401.04088",
            standard(
                "mixtral", beginnings.experts, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
            ),
        ),
        Family(
            "switch", "experts with a capacity", "P10", "Fedus et al. 2022, arXiv 2101.03961; GShard, GLaM",
            excluded="whether an expert is full depends on later tokens of the text (0.19 here); `moe` drops none.",
        ),
        Family(
            "persistent-memory", "attention with 16 learned memories a layer", "P11",
            "Sukhbaatar et al. 2019, arXiv 1907.01470", mixed("relative", memories=16),
        ),
        Family(
            "dnc", "an LSTM that addresses a memory", "P11", "Graves et al. 2016, Nature 538",
            excluded="its library reads token by token, 0.6 s for a step of one layer on four texts of 64 tokens.",
        ),
        Family(
            "rag", "retrieved documents before the prompt", "P11", "Lewis et al. 2020, arXiv 2005.11401",
            excluded="it adds a store of documents to a model; here kNN-LM does (`dyadlm.zoo.neighbours`).",
        ),
        Family(
            "knn-lm", "what followed the most similar states of a text", "P11",
            "Khandelwal et al. 2020, arXiv 1911.00172",
            excluded="it goes around any model: `dyadlm.zoo.neighbours.add_neighbours`.",
        ),
        Family(
            "memory", "counts of what followed each short context", "P11", "Grave et al. 2017, arXiv 1612.04426",
            excluded="it goes around any model: the last column of `compare`, and `dyadlm evaluate --memory`.",
        ),
        Family(
            "goldfish", "a loss that leaves out one target in k", "P12", "Hans et al. 2024, arXiv 2406.10209",
            excluded="it is a loss for any model: `dyadlm train --set train.goldfish=4`.",
        ),
        Family(
            "rwkv7", "RWKV-7, its time mixing", "today", "Peng et al. 2025, arXiv 2503.14456", mixed("rwkv7"),
            decodes="state",
        ),
        Family(
            "xlstm", "an LSTM with a matrix as its state", "today", "Beck et al. 2024, arXiv 2405.04517",
            standard(
                "xlstm", beginnings.xlstm, num_heads=HEADS, qk_dim_factor=1.0, num_blocks=lambda sizes: sizes.layers,
                chunk_size=64, embedding_dim=lambda sizes: sizes.width, ffn_round_up_to_multiple_of=8,
                ffn_proj_factor=lambda sizes: sizes.inner / sizes.width, autocast_kernel_dtype="float32",
            ),
            step=64, decodes="state",  # its cache fits widths that are multiples of 64 alone
        ),
        Family(
            "griffin", "a gated recurrence and local attention", "today", "De et al. 2024, arXiv 2402.19427",
            standard(
                "recurrent_gemma", lru_width=lambda sizes: sizes.width, attention_window_size=64,
                intermediate_size=lambda sizes: 2 * sizes.inner, head_dim=lambda sizes: sizes.width // HEADS,
                num_key_value_heads=1,  # as in the paper, section 2.3
            ),
            layers=6, decodes="nothing",
        ),
        Family(
            "gated-delta", "Gated DeltaNet", "today", "Yang et al. 2024, arXiv 2412.06464",
            standard(
                "qwen3_next", beginnings.gated_delta, linear_num_key_heads=2, linear_num_value_heads=2,
                linear_key_head_dim=_half, linear_value_head_dim=_half,
                layer_types=lambda sizes: ["linear_attention"] * sizes.layers,
                mlp_only_layers=lambda sizes: list(range(sizes.layers)), head_dim=lambda sizes: sizes.width // HEADS,
            ),
            decodes="state",
        ),
        Family(
            "mingru", "a recurrence that is a scan", "today", "Feng et al. 2024, arXiv 2410.01201", mixed("mingru"),
            decodes="state",
        ),
        *FLOORS,
    )
}  # fmt: skip
"""Families by name."""


BUILT_IN = frozenset(FAMILIES)


def find_family(name: str) -> Family:
    """A family by its name. Raises `UserError` that names the nearest one."""
    if name not in FAMILIES:
        raise UserError(f"There is no family {name!r}{nearest(name, FAMILIES)}; `dyadlm zoo list` shows all.")
    return FAMILIES[name]
