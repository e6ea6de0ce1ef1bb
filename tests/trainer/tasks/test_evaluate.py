"""Compare evaluation with torch's cross-entropy, sacreBLEU and hand counts by sample."""

import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import sacrebleu
import tiny
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from parallel.strategy import StrategyConfig, world_size
from trainer.config.train import EvaluateConfig, TrainConfig
from trainer.data import open_split, open_tokenizer
from trainer.data.loader import evaluated_samples
from trainer.inference.beam_search import translate_tokens
from trainer.tasks.evaluate import evaluate_model, evaluate_run
from trainer.tasks.metrics import CrossEntropyMetrics
from trainer.tasks.task import Decoding
from trainer.tasks.translation import bleu_signature

LAYOUTS = {
    "ddp 2": StrategyConfig(replicate=2),
    "ddp 3": StrategyConfig(replicate=3),
    "fsdp 2": StrategyConfig(shard=2),
    "hsdp 2×2": StrategyConfig(replicate=2, shard=2),
    "tensor 4": StrategyConfig(tensor=4),
    "fsdp 2 × tensor 2": StrategyConfig(shard=2, tensor=2),
    "pipeline 2": StrategyConfig(pipeline=2),
    "ddp 2 × pipeline 2": StrategyConfig(replicate=2, pipeline=2),
    "fsdp 2 × pipeline 2": StrategyConfig(shard=2, pipeline=2),
    "tensor 2 × pipeline 2": StrategyConfig(tensor=2, pipeline=2),
}


@pytest.fixture(scope="module")
def runs(runtime, tmp_path_factory):
    """A run of each family, with label smoothing, which evaluation must not apply."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for kind, model, data in (
        ("text", tiny.LLAMA, tiny.text_data),
        ("images", tiny.CLASSIFIER, tiny.image_data),
        ("pairs", tiny.TRANSLATOR, tiny.pairs_data),
    ):
        model = replace(model, vocab_size=0)
        made[kind] = tiny.make_run(folder / kind, runtime, model, data(folder / kind))
    return made


def one_by_one(worker, dataset, samples=None):
    """Return total nats, valid targets and correct predictions, from batches of one sample."""
    nats, valid, right = 0.0, 0, 0
    for index in map(int, evaluated_samples(len(dataset), samples or 0)):
        batch = dataset.collate([dataset.sample(index, None)])
        batch = {name: torch.from_numpy(value) for name, value in batch.items()}
        worker.model.eval()
        with torch.no_grad():
            logits = worker.model(batch).flatten(0, -2)
        targets = batch["targets"].flatten()
        keep = targets != -100
        nats += nn.functional.cross_entropy(logits[keep], targets[keep], reduction="sum").item()
        valid += int(keep.sum())
        right += int((logits.argmax(-1) == targets).sum())
    worker.model.train()
    return nats, valid, right


def of_one_rank(config: TrainConfig, runtime, seed=0):
    return tiny.make_worker(runtime, config.model, seed=seed), open_split(config.data, "test")


def test_text_equals_cross_entropy_by_hand(runtime, runs):
    worker, dataset = of_one_rank(runs["text"], runtime)
    nats, valid, _ = one_by_one(worker, dataset)
    text = Path(runs["text"].data.path, "test.txt").read_text()
    characters = len(text.replace("<|endoftext|>", ""))
    values = evaluate_model(worker, dataset, micro_batch_size=4)
    assert values == pytest.approx(
        {
            "eval_loss": nats / valid,
            "perplexity": math.exp(nats / valid),
            "bits_per_character": nats / math.log(2) / characters,
        },
        rel=1e-12,
    )
    assert worker.model.training


def test_some_samples_of_a_text_use_the_split_s_tokens_per_character(runtime, runs):
    worker, dataset = of_one_rank(runs["text"], runtime)
    nats, valid, _ = one_by_one(worker, dataset, samples=5)
    values = evaluate_model(worker, dataset, micro_batch_size=2, samples=5)
    assert values["eval_loss"] == pytest.approx(nats / valid, rel=1e-12)
    # Bits per character and nats per token differ by a constant factor.
    whole = evaluate_model(worker, dataset, micro_batch_size=2)
    factor = whole["bits_per_character"] / whole["eval_loss"]
    assert values["bits_per_character"] == pytest.approx(factor * nats / valid, rel=1e-12)


def test_images_equal_a_count_by_hand(runtime, runs):
    worker, dataset = of_one_rank(runs["images"], runtime, seed=4)
    nats, valid, right = one_by_one(worker, dataset)
    assert 0 < right < valid == len(dataset)
    values = evaluate_model(worker, dataset, micro_batch_size=4)
    expected = {"eval_loss": nats / valid, "accuracy": right / valid}
    assert values == pytest.approx(expected, rel=1e-12)


def test_some_samples_of_pairs_use_their_own_references(runtime, runs):
    worker, dataset = of_one_rank(runs["pairs"], runtime, seed=1)
    tokenizer = open_tokenizer(runs["pairs"].data)
    asked = []
    dataset.target_text = lambda index: asked.append(index) or "a"
    values = evaluate_model(
        worker, dataset, micro_batch_size=3, samples=4, decoding=Decoding(tokenizer)
    )
    nats, valid, _ = one_by_one(worker, dataset, samples=4)
    assert values["eval_loss"] == pytest.approx(nats / valid, rel=1e-12)
    assert asked == evaluated_samples(len(dataset), 4).tolist() != [0, 1, 2, 3]


@pytest.mark.parametrize("planted", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_has_no_finite_perplexity(runtime, runs, planted):
    worker, dataset = of_one_rank(runs["text"], runtime)

    def update(metrics, *_):
        metrics._totals = torch.tensor([planted, 1.0, 0.0], dtype=torch.float64)

    with mock.patch.object(CrossEntropyMetrics, "update", update):
        values = evaluate_model(worker, dataset, micro_batch_size=4)
    assert [repr(value) for value in values.values()] == [repr(planted)] * 3


@pytest.mark.parametrize("kind", ["images", "pairs"])
def test_nan_logits_give_nan_metrics(runtime, runs, kind):
    worker, dataset = of_one_rank(runs[kind], runtime)
    forward, tokenizer = worker.forward, open_tokenizer(runs[kind].data)
    with mock.patch.object(worker, "forward", lambda *a: forward(*a) * math.nan):
        values = evaluate_model(
            worker, dataset, micro_batch_size=4, decoding=Decoding(tokenizer, 2)
        )
    assert all(map(math.isnan, values.values())) and len(values) == (2 if kind == "images" else 3)


@pytest.mark.parametrize("beams", [1, 3])
def test_pairs_equal_cross_entropy_and_sacrebleu(runtime, runs, beams):
    worker, dataset = of_one_rank(runs["pairs"], runtime, seed=1)
    tokenizer = open_tokenizer(runs["pairs"].data)
    nats, valid, _ = one_by_one(worker, dataset)
    hypotheses = []
    for index in range(len(dataset)):
        source_BT = torch.from_numpy(dataset.sample(index, None)["source"])[None]
        ids = translate_tokens(
            worker,
            source_BT,
            max_tokens=16,
            bos_id=tokenizer.eot_id,
            end_ids=[tokenizer.eot_id],
            beams=beams,
        )
        hypotheses.append(tokenizer.decode(ids[0]))
    lines = Path(runs["pairs"].data.path, "test.tsv").read_text().splitlines()
    references = [line.split("\t")[1] for line in lines]
    # An untrained model predicts nothing correctly: take some of its predictions as targets.
    references[::2] = hypotheses[::2]
    dataset.target_text = references.__getitem__
    bleu = sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert 5 < bleu < 95
    values = evaluate_model(
        worker, dataset, micro_batch_size=4, decoding=Decoding(tokenizer, beams)
    )
    expected = {"eval_loss": nats / valid, "perplexity": math.exp(nats / valid), "bleu": bleu}
    assert values == pytest.approx(expected, rel=1e-12)
    assert "bleu" not in evaluate_model(worker, dataset, micro_batch_size=4)


class Echo:
    """A tokenizer of two words, so that an untrained model predicts some correctly."""

    eot_id, end_ids = 0, (0,)

    def decode(self, ids):
        return " ".join(str(token % 2) for token in ids)


def evaluate_layout(runtime, configs, strategy, micro_batch_size):
    """Return the values of each family on this rank; unequal numbers of samples are padded."""
    found = {}
    for kind, config in configs.items():
        worker = tiny.make_worker(runtime, config.model, strategy, seed=1)
        dataset = open_split(config.data, "test")
        tokenizer = Echo() if kind == "pairs" else None
        if tokenizer:
            dataset.target_text = lambda index: "0 1 1 0 " * (1 + index)
        found[kind] = evaluate_model(
            worker, dataset, micro_batch_size=micro_batch_size, decoding=Decoding(tokenizer)
        )
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gets_the_same_values(ranks, runtime, runs, layout):
    strategy = LAYOUTS[layout]
    expected = evaluate_layout(runtime, runs, StrategyConfig(), 1)
    assert expected["pairs"]["bleu"] > 1
    for rank in ranks.run(world_size(strategy), evaluate_layout, runs, strategy, 3):
        for kind, values in expected.items():
            assert rank[kind] == pytest.approx(values, rel=1e-12), kind


def test_no_dropout_and_no_gradients_while_evaluating(runtime, runs):
    worker, dataset = of_one_rank(runs["text"], runtime)
    batch = dataset.collate([dataset.sample(0, None)])
    inputs = {name: torch.from_numpy(value) for name, value in batch.items()}
    seeded = {**inputs, "seeds": torch.arange(1)}
    assert not torch.equal(worker.model(inputs), worker.model(seeded))
    with worker.evaluation_mode():
        assert torch.equal(worker.model(inputs), worker.model(seeded))
        assert not worker.model(inputs).requires_grad


def train_around_an_evaluation(runtime, config, strategy, evaluates):
    """Return the next step's loss and gradient norm, and whether parameters are unchanged."""
    worker = tiny.make_worker(runtime, config.model, strategy)
    if evaluates:
        evaluate_model(worker, open_split(config.data, "test"), micro_batch_size=2)
    kinds = {isinstance(parameter, DTensor) for parameter in worker.model.parameters()}
    tokens_BS = torch.arange(32).view(2, 16)
    batch = {"tokens": tokens_BS, "targets": tokens_BS + 1, "seeds": torch.arange(2)}
    loss, _ = worker.forward_backward([batch])
    return loss.item(), worker.clip_grad_norm(1.0).item(), kinds


@pytest.mark.parametrize(
    "strategy",
    [
        StrategyConfig(shard=2),
        StrategyConfig(shard=2, reshard_after_forward=False),
        StrategyConfig(shard=2, pipeline=2),
    ],
    ids=["freed", "kept", "pipeline"],
)
def test_evaluation_leaves_a_sharded_model_as_it_was(ranks, runs, strategy):
    with_it, without = (
        ranks.run(
            world_size(strategy), train_around_an_evaluation, runs["text"], strategy, evaluates
        )
        for evaluates in (True, False)
    )
    assert with_it == without
    assert with_it[0][2] == {True}


def test_the_evaluate_command_prints_the_values_of_the_split(runtime, runs, capsys):
    run = runs["pairs"]
    tokenizer, worker = open_tokenizer(run.data), tiny.make_worker(runtime, run.model)
    split = open_split(run.data, "valid")
    values = evaluate_model(
        worker, split, micro_batch_size=2, decoding=Decoding(tokenizer, 2), samples=5
    )
    config = EvaluateConfig(
        run_dir=run.run_dir, split="valid", precision="fp64", device="cpu", beams=2, samples=5
    )
    before = sorted(Path(run.run_dir).rglob("*"))
    evaluate_run(config, runtime)
    shown = capsys.readouterr().out
    assert f"{run.run_dir}, valid split" in shown and bleu_signature() in shown
    for name, value in values.items():
        assert name in shown and f"{value:.4f}" in shown
    assert sorted(Path(run.run_dir).rglob("*")) == before  # the run directory is unchanged


def test_bleu_signature_is_sacrebleu_s():
    metric = sacrebleu.BLEU()
    metric.corpus_score(["a"], [["a"]])
    assert bleu_signature() == str(metric.get_signature())
