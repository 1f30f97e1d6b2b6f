"""A server on a loopback port, with small models: one of ours trained for seconds, a chat model, and a Llama."""

import asyncio
import socket
import threading
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.data.chat import DEFAULT_TEMPLATE
from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.serve import Limits, ServedModel

TEXT = (
    b"To be, or not to be: that is the question.\n\nWhether 'tis nobler in the mind to suffer\nThe slings and "
    b"arrows of outrageous fortune... or so! He said.\n  Is it? To be, or not to be. \xc3\xa9t\xc3\xa9 \xe2\x82\xac \n"
)


def trained(**fields) -> DyadForCausalLM:
    """A small model that has learned to write something like `TEXT`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "slot_entries": 64, "slot_layers": [0, 1]}
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", **{**sizes, **fields}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = torch.tensor([list(TEXT * 3)[begin : begin + 128] for begin in range(0, 192, 24)])
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, bos_token_id=257, eos_token_id=None, **sizes)).eval()


class Live:
    """A running server. url: where it listens."""

    def __init__(self, models: dict[str, ServedModel], folder: Path, limits: Limits, **options):
        import httpx
        import openai
        import uvicorn

        from dyadlm.serve import create_app
        from dyadlm.serve.running import listen

        self.app = create_app(models, folder, limits, **{"hosts": ["127.0.0.1", "localhost"], **options})
        self.server_state, self.folder = self.app.state.server, folder
        listening = listen("127.0.0.1", 0)  # its protocol is named, so that small answers are sent without a delay
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)  # soon full where a client does not read
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(self.app, log_level="warning", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([listening])))
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60)

    def close(self) -> None:
        self.http.close()
        self.client.close()
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="session")
def weights():
    """The models themselves, made once: name to model and tokenizer."""
    chat = byte_tokenizer()
    chat.chat_template = DEFAULT_TEMPLATE
    own = trained()
    return {"small": (own, byte_tokenizer()), "talker": (own, chat), "llama": (llama(), byte_tokenizer())}


@pytest.fixture
def serve(weights, tmp_path):
    """Starts servers: `serve(names, limits, **options of create_app)`."""
    started = []

    def start(names=("small",), limits=Limits(), folder=tmp_path / "sessions", **options) -> Live:
        models = {name: ServedModel(name, *weights[name], limits) for name in names}
        started.append(Live(models, folder, limits, **options))
        return started[-1]

    yield start
    for live in started:
        live.close()


@pytest.fixture(scope="module")
def shared(weights, tmp_path_factory):
    """One server for the tests of a module that leave it as it was."""
    limits = Limits()
    models = {name: ServedModel(name, *pair, limits) for name, pair in weights.items()}
    live = Live(models, tmp_path_factory.mktemp("sessions"), limits)
    yield live
    live.close()
