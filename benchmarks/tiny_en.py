"""The folder of `tiny-en`, the model that comes with the package, made from the weights that `gpu_text.py` trained.

    python benchmarks/gpu_text.py --model tiny-en --shard DIR --seconds 54 --folder FOLDER
    python benchmarks/tiny_en.py FOLDER/tiny-en.safetensors --output src/dyadlm/pretrained/tiny-en

Weights are stored in bfloat16. The configuration says float32, so that programs compute in float32 with them. The model
card is written by hand.
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.data import byte_tokenizer
from dyadlm.train.prepared_run import SAMPLING

CONFIG = DyadConfig.from_preset("tiny", ngram_sizes=[2, 3, 4, 6], max_position_embeddings=1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model = DyadForCausalLM(CONFIG)
    left = model.load_state_dict(load_file(options.weights), strict=False)
    if left.unexpected_keys or left.missing_keys != ["lm_head.weight"]:  # which is that of the embedding
        raise SystemExit(f"The weights do not fit: {left}")
    model.generation_config.update(**SAMPLING)
    model.save_pretrained(options.output)
    byte_tokenizer().save_pretrained(options.output)
    weights = options.output / "model.safetensors"
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights, {"format": "pt"})
    print(json.dumps({"bytes": weights.stat().st_size, "parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
