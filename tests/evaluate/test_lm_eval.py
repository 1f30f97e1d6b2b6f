"""lm-eval (an optional extra) gives the same bits per byte on the same text, over all and document by document."""

import json
import math
import warnings

import numpy as np
import pytest

from dyadlm.data.streams import TokenStream
from dyadlm.data.tokenizer import byte_tokenizer
from dyadlm.evaluate import evaluate
from dyadlm.model import DyadConfig, DyadForCausalLM

pytest.importorskip("lm_eval")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # theirs are not ours to mend

WINDOW = 32
WORDS = ["the", "king", "queen", "été", "speaks", "of", "naïve", "love", "\n"]


def documents() -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, count)) for count in (1, 3, 7, 20, 60)]


def by_lm_eval(texts, model, tmp_path) -> tuple[float, list[float]]:
    """What lm-eval reports for a local task over these documents, in this process: in all, and for each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval import simple_evaluate
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.models.huggingface import HFLM

        path = tmp_path / "documents.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        task = ConfigurableTask(
            config={
                "task": "local",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
                "test_split": "test",
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "bits_per_byte"}],
            }
        )
        scorer = HFLM(model, tokenizer=byte_tokenizer(), max_length=WINDOW, batch_size=3, device="cpu")
        results = simple_evaluate(scorer, tasks=[task], bootstrap_iters=0, log_samples=True)
    # A sample's figure is (log-likelihood, bytes).
    samples = [sample["bits_per_byte"] for sample in results["samples"]["local"]]
    return results["results"]["local"]["bits_per_byte,none"], [-nats / size / math.log(2) for nats, size in samples]


def test_bits_per_byte_are_those_of_lm_eval(tmp_path):
    model = DyadForCausalLM(DyadConfig.from_preset("tiny", hidden_size=32, num_hidden_layers=2)).eval()
    texts = documents()
    overall, each = by_lm_eval(texts, model, tmp_path)

    def ours(chosen):
        stream = TokenStream.from_text(chosen, byte_tokenizer())
        return evaluate(model, stream, byte_tokenizer(), window=WINDOW, mode="rolling").bits_per_byte

    assert ours(texts) == pytest.approx(overall, abs=1e-4)
    assert [ours(text) for text in texts] == pytest.approx(each, abs=1e-4)
