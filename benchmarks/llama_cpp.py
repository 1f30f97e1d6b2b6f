"""llama.cpp, one token at a time through its C functions, and the GGUF file of a Llama of transformers.

The package `xllamacpp` offers a server alone. Its library exports the C functions of llama.cpp, so that a token costs
here what `llama_decode` costs, and no request. The two default-parameter structures are treated as blocks of 32-bit
words; only the first word of the context's (`n_ctx`) is set. Keys and values are float16, as llama.cpp has them by
default.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp
from transformers import LlamaForCausalLM

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOKENS_AT_ONCE = 512


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """The weights of a Llama with tied embeddings and no tokenizer, float32."""
    config, weights = model.config, {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for name, other in NAMES.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            if other in heads:  # llama.cpp rotates neighbouring channels, transformers the two halves of a head
                halves = weight.reshape(heads[other], 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
            writer.add_tensor(f"blk.{layer}.{other}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _Parameters(ctypes.Structure):
    """Longer than either structure of parameters; what follows its end is not read."""

    _fields_ = (("words", ctypes.c_int32 * 128),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(_level: int, _text: bytes, _data: int) -> None:
    """Takes the log."""


class LlamaCpp:
    """A model and one sequence, one thread."""

    def __init__(self, path: Path, vocabulary: int, positions: int):
        self.vocabulary = vocabulary
        self._library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        self._call("llama_log_set", None, ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer), pointer)(
            _silent, None
        )
        self._call("llama_backend_init", None)()
        of_model = self._call("llama_model_default_params", _Parameters)()
        of_context = self._call("llama_context_default_params", _Parameters)()
        of_context.words[0] = positions
        load = self._call("llama_model_load_from_file", pointer, ctypes.c_char_p, _Parameters)
        self._model = load(str(path).encode(), of_model)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}.")
        self._context = self._call("llama_init_from_model", pointer, pointer, _Parameters)(self._model, of_context)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {positions} positions.")
        self._call("llama_set_n_threads", None, pointer, number, number)(self._context, 1, 1)
        self._batch = self._call("llama_batch_get_one", _Batch, pointer, number)
        self._decode = self._call("llama_decode", number, pointer, _Batch)
        self._logits = self._call("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), pointer, number)
        self._memory = self._call("llama_get_memory", pointer, pointer)(self._context)
        self._remove = self._call("llama_memory_seq_rm", ctypes.c_bool, pointer, number, number, number)

    def _call(self, name: str, result: object, *arguments: object) -> Callable[..., Any]:
        """A C function by name, its types set."""
        function = getattr(self._library, name)
        function.restype, function.argtypes = result, list(arguments)
        return function

    def read(self, tokens: list[int]) -> np.ndarray:
        """Go on by tokens; the logits (V,) after the last, valid until the next call."""
        for start in range(0, len(tokens), TOKENS_AT_ONCE):
            part = tokens[start : start + TOKENS_AT_ONCE]
            numbers = (ctypes.c_int32 * len(part))(*part)
            if self._decode(self._context, self._batch(ctypes.addressof(numbers), len(part))):
                raise RuntimeError("llama_decode failed.")
        return np.ctypeslib.as_array(self._logits(self._context, -1), (self.vocabulary,))

    def crop(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self._remove(self._memory, -1, length, -1)

    def close(self) -> None:
        self._call("llama_free", None, ctypes.c_void_p)(self._context)
        self._call("llama_model_free", None, ctypes.c_void_p)(self._model)
