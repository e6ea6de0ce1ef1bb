"""Masked and labelled text: what is guessed, what is refused, and what a run makes of them."""

from dataclasses import replace

import numpy as np
import pytest
import tiny

from trainer import data
from trainer.config.loss import IGNORED
from trainer.config.train import ConfigError, GenerateConfig, ModelConfig
from trainer.data import open_split, open_tokenizer, prepare_data
from trainer.inference.trained_run import load_trained_run
from trainer.tasks.evaluate import evaluate_model
from trainer.tasks.registry import task_of

ENCODER = ModelConfig(
    family="encoder",
    inputs="tokens",
    outputs="tokens",
    layers=2,
    width=16,
    heads=4,
    ffn_width=32,
    norm="layernorm",
    norm_placement="post",
    positions="learned",
    activation="gelu",
    bias=True,
    embed_norm=True,
    segments=2,
    head_dense=True,
    init_std=0.5,
)
CLASSIFIER = replace(ENCODER, outputs="classes", pool="class_token", tied=False)


@pytest.fixture
def masked(tmp_path):
    config = replace(tiny.text_data(tmp_path / "texts"), kind="masked_text", mask_share=0.3)
    prepare_data(config)
    return config


def labelled_data(folder, **lines):
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"train": ["good\tabc abd", "bad\tfeg g", "good\tab ab c a d e f g a b c d e f g"]}
    texts |= {"valid": ["bad\tgef"], "test": ["good\tabc", "bad\tfeg"]} | lines
    for split, of_split in texts.items():
        (folder / f"{split}.tsv").write_text("\n".join(of_split * (7 if split == "train" else 1)))
    settings = {"vocab_size": 262, "seq_len": 8, "cache": str(folder / ".cache")}
    return data.DataConfig(kind="labelled_text", path=str(folder), **settings)


def test_what_is_masked_is_a_function_of_seed_and_sample(masked):
    first, again = open_split(masked, "train"), open_split(masked, "train")
    tokenizer = open_tokenizer(masked)
    targets = {
        (index, seed): first.sample(index, seed)["targets"].tolist()
        for index in range(3)
        for seed in (None, 1, 2)
    }
    assert len({str(found) for found in targets.values()}) == len(targets)
    for (index, seed), expected in reversed(targets.items()):
        sample = again.sample(index, seed)
        assert sample["targets"].tolist() == expected
        guessed = sample["targets"] != IGNORED
        assert 1 <= guessed.sum() <= 0.3 * len(guessed) + 1
        assert not guessed[~sample["source_valid"]].any()
        if seed is None:  # what is not guessed is the text
            whole = first._tokens.read(index * 16, index * 16 + 16)
            text = np.where(guessed, sample["targets"], sample["tokens"])
            assert text[: len(whole)][sample["source_valid"][: len(whole)]].tolist() == list(
                whole[sample["source_valid"][: len(whole)]]
            )
    shown = np.concatenate([first.sample(i % len(first), i)["tokens"] for i in range(200)])
    of_samples = [first.sample(i % len(first), i) for i in range(200)]
    chosen = np.concatenate([s["targets"] != IGNORED for s in of_samples])
    truth = np.concatenate([s["targets"] for s in of_samples])
    assert 0.75 < (shown[chosen] == tokenizer.mask_id).mean() < 0.85
    assert 0.07 < (shown[chosen] == truth[chosen]).mean() < 0.14


def test_a_tokenizer_without_a_mask_is_refused(masked, tmp_path):
    without = replace(masked, kind="text")
    prepare_data(without)
    open_tokenizer(without).save(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"has no mask token \(<\|mask\|>, \[MASK\], <mask>\)"):
        prepare_data(replace(masked, tokenizer=str(tmp_path / "tokenizer.json")))


def test_labelled_texts_are_framed_cut_and_padded(tmp_path):
    config = labelled_data(tmp_path / "labelled")
    facts, tokenizer = prepare_data(config), None
    tokenizer = open_tokenizer(config)
    assert (facts.classes, facts.class_names) == (2, ("bad", "good"))
    train = open_split(config, "train")
    batch = train.collate([train.sample(0, None), train.sample(2, None)])
    ids = tokenizer.encode("ab ab c a d e f g a b c d e f g")
    assert batch["tokens"][1].tolist() == [tokenizer.eot_id, *ids[:6], tokenizer.eot_id]
    assert batch["tokens"].shape == batch["source_valid"].shape == (2, 8)
    assert batch["source_valid"].sum(1).tolist() == list(train.sample_lengths()[[0, 2]])
    assert batch["targets"].tolist() == [1, 1]
    with pytest.raises(data.UserError, match="the test split has the label ugly"):
        prepare_data(labelled_data(tmp_path / "other", test=["ugly\ta"]))


def test_a_run_guesses_masks(runtime, masked, tmp_path):
    run_config = tiny.make_run(tmp_path, runtime, ENCODER, masked)
    run = load_trained_run(GenerateConfig(run_dir=run_config.run_dir, device="cpu"), runtime)
    values = evaluate_model(run.worker, open_split(masked, "valid"), micro_batch_size=2)
    assert set(values) == {"eval_loss", "perplexity", "accuracy"}
    task = task_of(masked, ENCODER)
    config = GenerateConfig(run_dir=run_config.run_dir, prompt="ab <|mask|> c <|mask|>")
    table = task.generate(config, run)
    assert table.row_count == 2 * 5
    with pytest.raises(ConfigError, match="has no mask to fill"):
        task.generate(replace(config, prompt="ab"), run)


def test_a_run_tells_labels(runtime, tmp_path):
    found = labelled_data(tmp_path / "labelled")
    run_config = tiny.make_run(tmp_path, runtime, CLASSIFIER, found)
    assert run_config.model.classes == 2
    run = load_trained_run(GenerateConfig(run_dir=run_config.run_dir, device="cpu"), runtime)
    values = evaluate_model(run.worker, open_split(found, "test"), micro_batch_size=2)
    assert set(values) == {"eval_loss", "accuracy"}
    table = task_of(found, CLASSIFIER).generate(
        GenerateConfig(run_dir=run_config.run_dir, prompt="abc\n\nfeg"), run
    )
    assert table.row_count == 2 and set(table.columns[1].cells) <= {"good", "bad"}
