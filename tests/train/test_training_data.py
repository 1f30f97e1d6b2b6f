"""The text of a run, as its processes open it."""

from transformers import TrainingArguments

from dyadlm.data import prepare
from dyadlm.files import sha256_of
from dyadlm.train.prepared_run import prepare_run


def test_one_process_of_a_machine_reads_prepared_text_for_its_checksums(tmp_path, small, monkeypatch):
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 400)
    prepare([tmp_path / "text.txt"], tmp_path / "prepared")
    read = []
    monkeypatch.setattr("dyadlm.data.dataset.sha256_of", lambda file: read.append(file.parent.name) or sha256_of(file))
    for rank, expected in ((1, []), (0, ["train", "validation"])):
        monkeypatch.setattr(TrainingArguments, "local_process_index", rank)
        prepare_run(small(tmp_path / "run", data=[str(tmp_path / "prepared")]), None, tmp_path / "run")
        assert read == expected
