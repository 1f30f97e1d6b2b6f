"""Nothing heavy is imported before it is needed, and the Auto classes know the model in every order of imports."""

import io
import subprocess
import sys
from functools import partial

import pytest
import torch

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.cli import main
from dyadlm.data import byte_tokenizer

HEAVY = ("torch", "transformers")


def run(program: str, *arguments: str, stdin: bytes = b"") -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", program, *arguments], input=stdin, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(errors="replace")


ORDERS = (
    "import dyadlm; from transformers import AutoConfig, AutoModelForCausalLM",
    "from transformers import AutoConfig, AutoModelForCausalLM; import dyadlm",
    "from transformers import AutoModelForCausalLM, AutoConfig; import dyadlm",
    "import transformers, dyadlm; from transformers import AutoModelForCausalLM, AutoConfig",
    "import dyadlm; from transformers import pipeline, AutoConfig, AutoModelForCausalLM",
    "import dyadlm; from transformers import PreTrainedModel, AutoConfig, AutoModelForCausalLM",
    "from transformers import PreTrainedModel; import dyadlm.model.modeling; "
    "from transformers import AutoConfig, AutoModelForCausalLM",
    "import dyadlm; dyadlm.DyadConfig; from transformers import AutoConfig, AutoModelForCausalLM",
    "import dyadlm.engine.bridge; from transformers import AutoConfig, AutoModelForCausalLM",
)
# Each order of imports in a process of its own, forked where torch is loaded, which takes longest.
IN_EACH_ORDER = """
import gc, os, sys, torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.checkpoint, torch.distributed.tensor
gc.freeze()
assert "transformers" not in sys.modules
for imports in sys.argv[1:]:
    if not (child := os.fork()):
        exec(imports)
        config = AutoConfig.for_model("dyadlm", hidden_size=16, num_hidden_layers=1, num_levels=3)
        assert type(AutoModelForCausalLM.from_config(config)).__name__ == "DyadForCausalLM"
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, imports
    print(imports)
"""


@pytest.mark.slow
def test_auto_classes_know_the_model_in_every_order_of_imports():
    assert run(IN_EACH_ORDER, *ORDERS).splitlines() == list(ORDERS)


def test_import_loads_nothing_heavy():
    run("import dyadlm, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")
    run("import dyadlm; assert 'DyadConfig' in dir(dyadlm); assert not hasattr(dyadlm, 'nothing')")


# The command line in a process whose imports of torch and transformers fail.
WITHOUT = (
    f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\nfrom dyadlm.cli import main\nmain(sys.argv[1:])\n"
)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"], ["diagnose", "--help"]])
def test_help_needs_nothing_heavy(arguments):
    assert "dyadlm" in run(WITHOUT, *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=2, slot_layers=[1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def in_torch(monkeypatch, capsys):
    """`in_torch(*arguments)`: what a verb prints that is not left to the engine."""

    def call(*arguments: str, stdin: bytes = b"") -> str:
        monkeypatch.setattr("dyadlm.generate.engine_reader._refusal", lambda *_: "the test says so")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        return out

    return call


@pytest.mark.parametrize("options", [("--temperature", "0"), ("--seed", "3"), ("--seed", "4", "--stop", "e")])
@pytest.mark.slow
def test_generate_writes_the_same_without_torch(folder, tmp_path, options, in_torch):
    state = str(tmp_path / "state")
    arguments = ["generate", str(folder), "--prompt", "To be, or not", "--max-new-tokens", "40", *options]
    written = run(WITHOUT, *arguments, "--state-out", state)
    assert written == in_torch(*arguments)
    assert len(written) > 20
    # A state that was written without torch is read with it.
    continued = ["generate", str(folder), "--prompt", "x", "--seed", "1", "--state-in", state]
    assert run(WITHOUT, *continued) == in_torch(*continued)


@pytest.mark.slow
def test_stream_reads_the_same_without_torch(folder, in_torch):
    lines = b"To be, or not to be:\nthat is the question.\r\n\xc3\xa9t\xc3\xa9 \xff\x00\nno end"
    printed = [read("stream", str(folder), stdin=lines) for read in (partial(run, WITHOUT), in_torch)]
    rows = [[line.split()[:3] for line in lines_.splitlines()] for lines_ in printed]
    assert len(rows[0]) == len(rows[1]) == len(lines)
    for mine, theirs in zip(*rows, strict=True):
        assert [float(number) for number in mine] == pytest.approx([float(number) for number in theirs], abs=2e-3)


def test_without_numba_long_texts_are_read_by_torch(folder, monkeypatch):
    """The state goes along: the surprise and what is written are those of the engine alone."""
    from dyadlm.data.encoding import ByteTokenizer
    from dyadlm.engine import Engine
    from dyadlm.generate import EngineModel, Sampling, Session

    text = list(b"To be, or not to be, that is the question. " * 30)
    told = []
    for compiled in (True, False):
        monkeypatch.setattr(Engine, "is_compiled", compiled)
        session = Session(EngineModel(folder), ByteTokenizer())
        nats = [session.read(text[at : at + 600]) for at in range(0, len(text), 600)]
        told.append((nats, "".join(session.write(30, Sampling(temperature=0))), type(session.state).__name__))
    (first, text_first, kind_first), (second, text_second, kind_second) = told
    assert (kind_first, kind_second) == ("EngineState", "DyadCache")
    for mine, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-3, atol=1e-3, equal_nan=True)
    assert text_first == text_second
