"""What version 0.1 computed, stored at commit 3c2a5a6 by `python -m tests.golden.store` (float64, CPU).

Weights are not stored: each is drawn from its version 0.1 name, so that the fixture stays small. Of logits a few
columns are kept; of each state tensor and of all gradients, inner products with directions drawn in the same way.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
FILE = HERE / "version_0_1.json"
TIME, PASSED_ON = 90, 53  # tokens read; where a second row's chunk is cut
COLUMNS = (0, 1, 2, 31, 32, 33, 52, 53, 54, 63, 64, 65, 88, 89)
DIRECTIONS = 3


def drawn(name: str, shape: tuple[int, ...], salt: int = 0) -> np.ndarray:
    """Standard normal numbers that belong to a name."""
    return np.random.default_rng([zlib.crc32(name.encode()), salt]).standard_normal(shape)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of a version 0.1 name: as large as keeps signals of every part in range."""
    values = drawn(name, shape)
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return 0.5 * values
    if len(shape) == 2:
        return values * shape[1] ** -0.5
    if "norm" in name:
        return 1 + 0.1 * values
    return 0.3 * values


def sketch(name: str, tensor: torch.Tensor) -> list[float]:
    """A tensor by a few inner products, each over the root of the number of its elements."""
    flat = tensor.detach().double().flatten().numpy()
    scale = max(len(flat), 1) ** -0.5
    return [float(flat @ drawn(name, flat.shape, salt)) * scale for salt in range(1, 1 + DIRECTIONS)]


def text_rows() -> torch.Tensor:
    text = (
        b"To be, or not to be: that is the question.\n\nWhether 'tis nobler in the mind to suffer\nThe slings and "
        b"arrows of outrageous fortune... or so! He said.\n  Is it? To be, or not to be. "
    )
    rows = [list((text * 3)[start : start + TIME]) for start in (0, 17)]
    return torch.tensor(rows)


def variants() -> dict[str, dict]:
    from tests.model.conftest import VARIANTS

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_levels": 7, "vocab_size": 259}
    presets = {f"preset {name}": {"preset": name} for name in ("tiny", "small")}
    shallow = {"num_hidden_layers": 2, "slot_layers": [1], "slot_entries": 64}  # the rest of base is more of the same
    presets["preset base"] = {"preset": "base", **shallow}
    return {name: {**sizes, **fields} for name, fields in VARIANTS.items()} | presets


def measure(model) -> dict:
    """Logits of a text read at once and in two chunks, and the state after it."""
    ids = text_rows()
    model.eval()
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        first = model(ids[:, :PASSED_ON], use_cache=True)
        rest = model(ids[:, PASSED_ON:], past_key_values=first.past_key_values, use_cache=True)
        cut = torch.cat([first.logits, rest.logits], 1)
    state = whole.past_key_values.tensors()
    return {
        "logits": [sketch(f"logits {column}", whole.logits[:, column]) for column in COLUMNS],
        "cut": [sketch(f"logits {column}", cut[:, column]) for column in COLUMNS],
        "state": {name: [list(tensor.shape), sketch(name, tensor)] for name, tensor in state.items()},
    }


def gradients(model, directions) -> list[float]:
    """Derivatives of the training loss along directions: a {parameter name of the model: tensor} each."""
    model.train()
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(text_rows(), labels=text_rows()).loss
    loss.backward()
    named = dict(model.named_parameters())
    found = [loss.item()]
    for direction in directions:
        found.append(
            sum(float((named[n].grad * part).sum()) for n, part in direction.items() if named[n].grad is not None)
        )
    model.eval()
    return found


def main() -> None:
    from dyadlm import DyadConfig, DyadForCausalLM

    stored = {}
    for name, fields in variants().items():
        fields = dict(fields)
        preset = fields.pop("preset", None)
        config = DyadConfig(**fields) if preset is None else DyadConfig.from_preset(preset, **fields)
        model = DyadForCausalLM(config).double()
        weights = {key: tuple(value.shape) for key, value in model.named_parameters()}
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(weight(key, tuple(parameter.shape))))
        directions = [
            {key: torch.from_numpy(drawn(key, shape, salt)) for key, shape in weights.items()}
            for salt in range(1, 1 + DIRECTIONS)
        ]
        stored[name] = {
            "fields": {"preset": preset, **fields},
            "weights": {key: list(shape) for key, shape in weights.items()},
            **measure(model),
            "gradients": gradients(model, directions),
        }
        print(name, flush=True)
    FILE.write_text(json.dumps(stored, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
