"""Speech recognition: CTC beside its definition, decoding, metrics and transcripts."""

import itertools
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import pytest
import tiny
import torch

from parallel.strategy import StrategyConfig, world_size
from trainer.config.loss import BLANK, IGNORED, NO_CHARACTER
from trainer.config.train import CompressConfig, GenerateConfig, ModelConfig, UserError
from trainer.data import open_split, open_tokenizer
from trainer.inference.ctc_decoding import (
    best_path,
    join_windows,
    prefix_beam_search,
    window_bounds,
)
from trainer.inference.trained_run import load_trained_run, unwrap_transformer
from trainer.loss import CTC, ctc_sum
from trainer.tasks.evaluate import evaluate_model
from trainer.tasks.speech import SpeechRecognition, transcribe, transcribe_windows
from trainer.tasks.task import Decoding


def probabilities(logits_TV):
    """The probability of each sequence: the sum over its alignments (Graves 2006, eq. 3)."""
    total = defaultdict(float)
    table = logits_TV.double().softmax(-1).tolist()
    for path in itertools.product(range(logits_TV.shape[1]), repeat=len(table)):
        said = tuple(name for name, _ in itertools.groupby(path) if name != BLANK)
        total[said] += math.prod(row[name] for row, name in zip(table, path, strict=True))
    return total


def random_logits(*sizes, scale=1.0):
    return scale * torch.randn(*sizes, generator=torch.Generator().manual_seed(len(sizes)))


def test_the_loss_is_that_of_all_alignments():
    logits_BTV = random_logits(3, 6, 4)
    said, vectors = [(1, 1, 2), (3,), ()], [6, 4, 5]
    targets_BT = torch.full((3, 6), IGNORED)
    for row, (classes, length) in enumerate(zip(said, vectors, strict=True)):
        targets_BT[row, :length] = NO_CHARACTER
        targets_BT[row, : len(classes)] = torch.tensor(classes, dtype=torch.int64)
    expected = sum(
        -math.log(probabilities(logits_BTV[row, : vectors[row]])[said[row]]) for row in (0, 1)
    )
    assert ctc_sum(logits_BTV.double(), targets_BT).item() == pytest.approx(expected, rel=1e-12)
    assert CTC().count_valid(targets_BT) == 4
    half = ctc_sum(logits_BTV.bfloat16(), targets_BT)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected, rel=0.02)


def test_divergence_is_a_mean_over_vectors_times_the_targets():
    ours, theirs = random_logits(2, 4, 3).double(), 2 * random_logits(2, 4, 3).double().flip(1)
    targets = torch.tensor([[1, 2, NO_CHARACTER, IGNORED], [1, *[NO_CHARACTER] * 3]])
    p, q = ((x / 2.0).softmax(-1) for x in (ours, theirs))
    nats = (q * (q / p).log()).sum(-1)
    expected = 2 * nats[0, :3].mean() + nats[1].mean()
    found = CTC().divergence_sum(ours, theirs, targets, 2.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert CTC().divergence_sum(ours, ours, targets, 2.0).item() == pytest.approx(0, abs=1e-12)


def test_padding_and_silent_rows_change_no_gradient():
    logits_BTV, targets_BT = random_logits(2, 5, 4).double(), torch.full((2, 5), IGNORED)
    targets_BT[0, :4] = torch.tensor([1, 2, NO_CHARACTER, NO_CHARACTER])
    logits_BTV.requires_grad_()
    ctc_sum(logits_BTV, targets_BT).backward()
    assert logits_BTV.grad[1].abs().max() == 0 and logits_BTV.grad[0, 4:].abs().max() == 0
    assert logits_BTV.grad[0, :4].abs().min() > 0


def test_too_few_vectors_are_no_finite_loss():
    targets_BT = torch.tensor([[1, 1, NO_CHARACTER][:2]])
    assert math.isinf(ctc_sum(random_logits(1, 2, 3), targets_BT).item())


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_beam_search_finds_the_most_probable_sequence(scale):
    better = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        logits_TV = scale * torch.randn(5, 4, generator=generator)
        total = probabilities(logits_TV)
        best = max(total, key=total.get)
        assert tuple(prefix_beam_search(logits_TV, 100)) == best
        better += tuple(best_path(logits_TV)) != best
    assert better > 0 or scale == 3.0  # one path is not all of a sequence's probability


def test_the_best_path_has_neither_blanks_nor_repeats():
    path = torch.tensor([0, 1, 1, 0, 1, 2, 2, 0])
    assert best_path(torch.nn.functional.one_hot(path, 3).float()) == [1, 1, 2]
    assert best_path(torch.nn.functional.one_hot(path[:1], 3).float()) == []


def test_windows_cover_a_recording_and_meet_in_the_middle():
    assert window_bounds(10, 10, 4) == [(0, 10)]
    bounds = window_bounds(25, 10, 4)
    assert bounds == [(0, 10), (6, 16), (12, 22), (15, 25)]
    rows = torch.arange(25.0)[:, None]
    parts = [rows[start:end].clone() for start, end in bounds]
    assert torch.equal(join_windows(parts, bounds, 25), rows)
    parts[0][8:], parts[1][:2] = -1, -1  # the outer halves of what they share
    assert torch.equal(join_windows(parts, bounds, 25), rows)


@pytest.fixture(scope="module")
def run(runtime, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    return tiny.make_run(folder, runtime, tiny.LISTENER, tiny.speech_data(folder / "data"))


def evaluate_layout(runtime, config, strategy, micro_batch_size, beams=1):
    worker = tiny.make_worker(runtime, config.model, strategy, seed=1)
    dataset, tokenizer = open_split(config.data, "test"), open_tokenizer(config.data)
    decoding = Decoding(tokenizer, beams)
    return evaluate_model(worker, dataset, micro_batch_size=micro_batch_size, decoding=decoding)


def test_metrics_are_those_of_each_utterance_alone(runtime, run):
    worker = tiny.make_worker(runtime, run.model, seed=1)
    dataset = open_split(run.data, "test")
    nats, said, heard = 0.0, [], []
    for index in range(len(dataset)):
        logits_TV = transcribe(worker, dataset.frames(index, None), 2)
        ids = torch.from_numpy(dataset.ids(index))
        nats += torch.nn.functional.ctc_loss(
            logits_TV.log_softmax(-1), ids, [len(logits_TV)], [len(ids)], reduction="sum"
        ).item()
        said.append(dataset.target_text(index))
        heard.append(" ".join(dataset.tokenizer.decode(best_path(logits_TV)).split()))
    values = evaluate_layout(runtime, run, StrategyConfig(), 3)
    assert values["eval_loss"] == pytest.approx(nats / sum(map(len, said)), rel=1e-12)
    assert values["wer"] == jiwer.wer(said, heard) and values["cer"] == jiwer.cer(said, heard)
    assert 0.3 < values["cer"] < 3


LAYOUTS = {
    "ddp 3": StrategyConfig(replicate=3),  # of 7 samples: with fillers
    "fsdp 2 × tensor 2": StrategyConfig(shard=2, tensor=2),
    "tensor 4": StrategyConfig(tensor=4),
    "pipeline 2 × context 2": StrategyConfig(pipeline=2, context=2),
    "context 4, ring": StrategyConfig(context=4, context_method="ring"),  # fewer vectors than parts
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gets_the_same_values(ranks, runtime, run, layout):
    strategy = LAYOUTS[layout]
    expected = evaluate_layout(runtime, run, StrategyConfig(), 1)
    for values in ranks.run(world_size(strategy), evaluate_layout, run, strategy, 3):
        assert values == pytest.approx(expected, rel=1e-12)


def generated(config, runtime, prompt, beams=1):
    asked = GenerateConfig(
        run_dir=config.run_dir, prompt=str(prompt), beams=beams, device="cpu", precision="fp64"
    )
    return SpeechRecognition().generate(asked, load_trained_run(asked, runtime))


def test_a_recording_is_transcribed_as_the_sample_that_it_is(runtime, run):
    path = Path(run.data.path) / "clips" / "test1.wav"
    said = generated(run, runtime, path)
    assert said == generated(run, runtime, "test:1") != generated(run, runtime, "test:0")
    assert isinstance(generated(run, runtime, path, beams=4), str)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", "prompt is empty; it must be a recording, or e.g. test:0"),
        ("no.wav", "prompt: no.wav does not exist"),
        ("test:9", "prompt=test:9: the split has 7 utterances; the last is number 6"),
    ],
)
def test_a_prompt_that_is_no_recording_is_refused(runtime, run, prompt, expected):
    with pytest.raises(UserError, match=expected):
        generated(run, runtime, prompt)


def test_a_long_recording_is_read_in_windows(runtime, run):
    worker = tiny.make_worker(runtime, run.model)
    seen = []
    unwrap_transformer(worker).register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0]["frames"].shape[1])
    )
    frames_FM = np.random.default_rng(0).standard_normal((701, 8)).astype(np.float32)
    data = replace(run.data, max_seconds=3.0)
    logits_TV = transcribe_windows(worker, frames_FM, data)
    assert len(logits_TV) == 351 and max(seen) == 300 and len(seen) == 4
    alone = transcribe(worker, frames_FM[:300], 2)
    assert torch.equal(logits_TV[:100], alone[:100])


SHORTENED = {
    "merge": (CompressConfig(merge=3), {"merged_vectors": 3}),
    "pool": (CompressConfig(pool_after=1, pool_stride=3), {"pooled_vectors": 3}),
}


@pytest.mark.parametrize("technique", SHORTENED)
def test_a_shortened_encoder_has_the_targets_of_its_vectors(runtime, run, technique):
    compress, keys = SHORTENED[technique]
    worker = tiny.make_worker(runtime, run.model, seed=1, compress=compress)
    model, dataset = unwrap_transformer(worker), open_split(replace(run.data, **keys), "test")
    seen = []
    model.block_hooks["0"] = [lambda flow, streams, inputs: seen.append(flow[2]) or flow]
    batch = dataset.collate([dataset.sample(i, None) for i in range(3)])
    inputs = {name: torch.from_numpy(part) for name, part in batch.items()}
    with worker.evaluation_mode():
        logits_BTV = worker.forward(inputs)
    targets_BT = model.resized_targets(inputs["targets"])
    left_B = (seen[0][..., 0] > 0).sum(1)
    assert targets_BT.shape == logits_BTV.shape[:2] == seen[0].shape[:2]
    assert ((targets_BT != IGNORED).sum(1) == left_B).all() and left_B.unique().numel() > 1
    assert torch.equal(targets_BT[targets_BT >= 0], inputs["targets"][inputs["targets"] >= 0])
    assert 0 < evaluate_model(worker, dataset, micro_batch_size=3)["eval_loss"] < math.inf
    read = replace(run.data, max_seconds=3.0)  # in windows, of which each is shortened
    frames_FM = np.random.default_rng(0).standard_normal((701, 8)).astype(np.float32)
    assert len(transcribe_windows(worker, frames_FM, read)) == 351


def test_utterances_too_short_for_a_shortened_encoder_are_left_out(run):
    all_of_it = len(open_split(run.data, "train"))
    for key, count in {"pooled_vectors": 3, "merged_vectors": 9}.items():
        split = open_split(replace(run.data, **{key: count}), "train")
        vectors_N = -(-split.sample_lengths() // split.stride)
        assert 0 < len(split) < all_of_it
        for index in range(len(split)):
            needed = len(split.ids(index)) + sum(split.ids(index)[1:] == split.ids(index)[:-1])
            left = vectors_N[index] // 3 if key == "pooled_vectors" else vectors_N[index] - 9
            assert left >= needed


def test_samples_stand_below_what_is_said(runtime, run):
    worker = tiny.make_worker(runtime, run.model)
    shown = SpeechRecognition().sample_output(
        worker, lambda: None, lambda split: open_split(run.data, split), 10, 0
    )
    lines = shown.split("\n")
    dataset = open_split(run.data, "test")
    assert lines[::2] == [f"> {dataset.target_text(i)}" for i in range(5)] and len(lines) == 10


def test_the_model_implies_the_task():
    fits = SpeechRecognition().fits
    assert fits(tiny.LISTENER) and not fits(tiny.CLASSIFIER) and not fits(ModelConfig())
