"""Shared test set-up: few threads, no network, deterministic kernels, uninitialised memory poisoned with NaN."""

import os

# Set before any Hugging Face import: tests never reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def deterministic_torch():
    """Fixed seed; `torch.empty` returns NaN, so that reading what was never written fails a test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
