"""Pairs: BOS, EOS, padding, pairs that are too long, and malformed lines."""

import numpy as np
import pytest

from trainer import data
from trainer.config.train import DataConfig, UserError
from trainer.data import files as source
from trainer.data import pairs as reader

FOLDER = source.locate_data(DataConfig(kind="pairs", path="bundled:home-assistant"))
LINES = (FOLDER / "test.en-de.tsv").read_text().splitlines()[:300]


@pytest.fixture
def corpus(tmp_path):
    """Return a function that writes a folder of TSV files and returns its config."""

    def write(seq_len=30, **contents):
        for name, lines in contents.items():
            text = lines if isinstance(lines, str) else "\n".join(lines) + "\n"
            (tmp_path / f"{name}.tsv").write_text(text, newline="")
        return DataConfig(
            kind="pairs",
            path=str(tmp_path),
            seq_len=seq_len,
            vocab_size=400,
            cache=str(tmp_path / "cache"),
        )

    return write


def test_a_pair_is_source_and_shifted_target(corpus):
    config = corpus(200, train=LINES, valid=LINES[:5], test=LINES[5:9])
    facts = data.prepare_data(config)
    tokenizer = data.open_tokenizer(config)
    assert facts.sample_counts == {"train": 300, "valid": 5, "test": 4}
    assert facts.vocab_size == tokenizer.vocab_size == 400
    for split, lines in (("train", LINES), ("test", LINES[5:9])):
        dataset = data.open_split(config, split)
        for i, line in enumerate(lines):
            english, german = line.split("\t")
            sample = dataset.sample(i, 7)
            assert sample["source"].tolist() == tokenizer.encode(english)
            assert sample["tokens"].tolist() == [tokenizer.eot_id, *tokenizer.encode(german)]
            assert sample["targets"].tolist() == [*tokenizer.encode(german), tokenizer.eot_id]
            assert (dataset.source_text(i), dataset.target_text(i)) == (english, german)


def test_a_micro_batch_is_padded_to_its_longest(corpus):
    config = corpus(200, train=LINES, valid=LINES, test=LINES)
    data.prepare_data(config)
    dataset, tokenizer = data.open_split(config, "train"), data.open_tokenizer(config)
    samples = [dataset.sample(i, None) for i in range(6)]
    batch = dataset.collate(samples)
    valid = batch["source_valid"]
    assert valid.dtype == bool and valid.any(axis=0).all()
    assert (batch["source"][~valid] == tokenizer.pad_id).all()
    for row, sample in enumerate(samples):
        length, width = len(sample["targets"]), max(len(s["targets"]) for s in samples)
        assert batch["source"][row][valid[row]].tolist() == sample["source"].tolist()
        padding = width - length
        expected = [*sample["tokens"], *[tokenizer.pad_id] * padding]
        assert batch["tokens"][row].tolist() == expected
        assert batch["targets"][row].tolist() == [*sample["targets"], *[-100] * padding]
    assert "source_valid" not in dataset.collate(samples[:1])  # nothing is padded


def test_the_mean_length_is_that_of_a_source_or_a_target(corpus):
    facts = data.prepare_data(corpus(200, train=LINES, valid=LINES[:5], test=LINES[:5]))
    dataset = data.open_split(corpus(200), "train")
    samples = [dataset.sample(i, None) for i in range(len(dataset))]
    tokens = sum(len(sample["source"]) + len(sample["tokens"]) - 1 for sample in samples)
    assert facts.splits["train"].mean_length == round(tokens / len(samples)) // 2


def test_training_leaves_out_what_is_too_long_and_evaluation_cuts_it(corpus):
    config = corpus(12, train=LINES, valid=LINES, test=LINES[:1])
    facts = data.prepare_data(config)
    tokenizer = data.open_tokenizer(config)
    sides = [[tokenizer.encode(side) for side in line.split("\t")] for line in LINES]
    fit = [i for i, (s, t) in enumerate(sides) if len(s) <= 12 and len(t) + 1 <= 12]
    assert 0 < len(fit) < 300
    assert facts.sample_counts["train"] == len(fit) and facts.sample_counts["valid"] == 300
    assert facts.splits["train"].left_out == {"longer than data.seq_len=12": 300 - len(fit)}
    cut = f"{300 - len(fit)} pairs of the valid split are longer than data.seq_len=12 and cut"
    assert cut in facts.notes
    train, valid = (data.open_split(config, split) for split in ("train", "valid"))
    assert [train.target_text(i) for i in range(len(train))] == [
        LINES[i].split("\t")[1] for i in fit
    ]
    for i, (source_ids, target_ids) in enumerate(sides):
        sample = valid.sample(i, None)
        assert sample["source"].tolist() == source_ids[:12]
        assert sample["targets"].tolist() == [*target_ids[:11], tokenizer.eot_id]
        assert valid.target_text(i) == LINES[i].split("\t")[1]  # full, for BLEU


def test_many_batches_of_lines_join(corpus, monkeypatch):
    monkeypatch.setattr(reader, "LINES", 7)
    config = corpus(200, train=LINES, valid=LINES[:1], test=LINES[:1])
    data.prepare_data(config)
    dataset, tokenizer = data.open_split(config, "train"), data.open_tokenizer(config)
    for i in (0, 6, 7, 8, 150, 299):
        assert f"{dataset.source_text(i)}\t{dataset.target_text(i)}" == LINES[i]
        assert tokenizer.decode(dataset.sample(i, None)["targets"]) == dataset.target_text(i)


def test_one_file_is_split_between_lines(corpus, tmp_path):
    config = corpus(200, all=LINES)
    config.path = str(tmp_path / "all.tsv")
    facts = data.prepare_data(config)
    assert sum(facts.sample_counts.values()) == 300 and min(facts.sample_counts.values()) > 5
    for dataset, first in ((data.open_split(config, "test"), 300 - facts.sample_counts["test"]),):
        found = [f"{dataset.source_text(i)}\t{dataset.target_text(i)}" for i in range(len(dataset))]
        assert found == LINES[first:]


def test_carriage_returns_and_a_missing_last_line_break(corpus):
    config = corpus(200, train=LINES, valid="a\tb\r\nc\td", test=LINES)
    assert data.prepare_data(config).sample_counts["valid"] == 2
    valid = data.open_split(config, "valid")
    assert [valid.target_text(i) for i in range(2)] == ["b", "d"]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["a\tb", "no tab"], r"line 2 of .*valid\.tsv has 0 tabs"),
        (["a\tb\tc"], r"line 1 of .*valid\.tsv has 2 tabs; .* `source<TAB>target`"),
        (["a\tb", "c\td", " \tb"], r"line 3 of .*valid\.tsv has an empty side"),
        (["a\tb", "", "c\td"], r"line 2 of .*valid\.tsv has 0 tabs"),
    ],
)
def test_lines_that_are_not_pairs(corpus, lines, message):
    config = corpus(train=LINES, valid=lines, test=LINES)
    with pytest.raises(UserError, match=message):
        data.prepare_data(config)


def test_the_line_number_counts_from_the_start_of_a_split_file(corpus, tmp_path):
    config = corpus(all=[*LINES, "no tab"])
    config.path = str(tmp_path / "all.tsv")
    with pytest.raises(UserError, match=r"line 301 of .*all\.tsv has 0 tabs"):
        data.prepare_data(config)


def test_pairs_that_are_all_too_long(corpus):
    config = corpus(2, train=LINES, valid=LINES, test=LINES)
    with pytest.raises(UserError, match=r"data\.seq_len=2: every pair") as error:
        data.prepare_data(config)
    config.seq_len = int(str(error.value).split("set data.seq_len=")[1].split()[0])
    assert data.prepare_data(config).sample_counts["train"] == 300
    config.seq_len -= 1
    assert data.prepare_data(config).sample_counts["train"] < 300


def test_the_vocabulary_holds_both_languages(corpus):
    config = corpus(train=["cat\tKatze"] * 9 + LINES, valid=LINES, test=LINES)
    data.prepare_data(config)
    tokenizer = data.open_tokenizer(config)
    longest = [
        max(len(tokenizer.decode([i])) for i in tokenizer.encode(side))
        for line in LINES[:50]
        for side in line.split("\t")
    ]
    assert np.mean(longest) > 2  # merges of sources and of targets
