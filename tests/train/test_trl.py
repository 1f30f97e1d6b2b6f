"""TRL trains the model on text and on conversations: ends of texts and turns are the token that ends them."""

import pytest

from dyadlm import DyadConfig, DyadForCausalLM
from dyadlm.data import byte_tokenizer
from dyadlm.data.chat import DEFAULT_TEMPLATE
from dyadlm.data.encoding import END_ID

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.slow,
    # TRL's own, of what it is about to change
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture
def trainer(tmp_path):
    """`trainer(rows, **options)`: TRL's, of a small model."""

    def make(rows, **options):
        model = DyadForCausalLM(
            DyadConfig.from_preset("tiny", hidden_size=16, num_hidden_layers=1, level_rank=4, vocab_size=259)
        )
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = options.pop("chat_template", None)
        arguments = trl.SFTConfig(
            str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            save_strategy="no", per_device_train_batch_size=2, **options,
        )  # fmt: skip
        data = datasets.Dataset.from_list(rows)
        return trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)

    return make


def test_a_text_ends_with_the_token(trainer):
    started = trainer([{"text": "to be or not to be"}] * 4)
    assert started.train_dataset[0]["input_ids"] == [*b"to be or not to be", END_ID]
    assert started.train().training_loss > 0


def test_turns_end_with_the_token(trainer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    started = trainer([{"messages": messages}] * 4, chat_template=DEFAULT_TEMPLATE)
    ids = list(started.train_dataset[0]["input_ids"])
    assert ids == [*b"user:\nHi", END_ID, *b"\nassistant:\nHello", END_ID]
    assert started.train().training_loss > 0
