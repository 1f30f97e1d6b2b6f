"""The values of settings that nobody has given, by preset."""

from typing import Any

# Every value that differs from the defaults of TrainingArguments and of `dyadlm.train.options`.
COMMON_DEFAULTS: dict[str, Any] = {
    "adam_beta2": 0.99,
    "eval_steps": 250,
    "logging_steps": 10,
    "max_grad_norm": 1.0,
    "save_steps": 250,
    "save_total_limit": 2,
    "seed": 42,
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
}
PRESET_DEFAULTS: dict[str | None, dict[str, Any]] = {
    "tiny": {"max_steps": 1500, "learning_rate": 2e-3, "per_device_train_batch_size": 4},
    # With what the paper's system has in training alone.
    "paper": {
        "max_steps": 1500,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 4,
        "twin.conditioning": "reverse",
        "fingerprint.shown": True,
        "planner.teacher": 0.2,
    },
    "small": {
        "max_steps": 10_000,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
        "data.sequence_length": 1024,
    },
    "base": {
        "max_steps": 50_000,
        "learning_rate": 6e-4,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 8,
        "data.sequence_length": 2048,
    },
    # Rates of the transformers of these sizes in GPT-3 (arXiv 2005.14165, table 2.1); not measured for ours.
    "large": {
        "max_steps": 100_000,
        "learning_rate": 3e-4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 16,
        "data.sequence_length": 2048,
    },
    "xl": {
        "max_steps": 200_000,
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 64,
        "data.sequence_length": 2048,
    },
    # Continuing from the weights of a folder.
    None: {"max_steps": 1000, "learning_rate": 3e-4, "per_device_train_batch_size": 8},
}

# An adapter bears ten times the rate of all weights (measured: docs/experiments.md).
LORA_DEFAULTS = {"learning_rate": 3e-3}
