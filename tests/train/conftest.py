"""The small runs of `program.py`, as fixtures, and processes of their own for those that are killed."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))  # processes find the program by its name
import program


@pytest.fixture
def small():
    """`small(output, *assignments, **options)`: the settings of a run of six steps."""
    return program.small


@pytest.fixture
def words():
    """`words(seed)`: data in memory."""
    return program.words


@pytest.fixture
def llama(tmp_path, words):
    """A folder with an ordinary Hugging Face model."""
    folder = tmp_path / "llama"
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=257, eos_token_id=258, pad_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words().tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def console() -> Console:
    """Collects what a run shows: `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def launch(tmp_path, forkserver):
    """`launch(output, *arguments)`: a process that trains. What it shows is in the file `tmp_path / "shown"`."""
    processes = []

    def start(*arguments, largest_file=None):
        options = (tmp_path / "shown", [str(argument) for argument in arguments], largest_file)
        processes.append(forkserver.Process(target=program.run, args=options))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()
