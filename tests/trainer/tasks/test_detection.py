"""A dense detector: its loss, its boxes, its metrics, and every kind of layout."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from boxed import boxed_data, write_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import build, make_run, make_worker

from conf.validation.detection import (
    detection_compression_problems,
    detection_problems,
    detector_problems,
)
from conf.validation.teacher import teacher_problems
from conf.validation.validate import find_problems
from launch.cli.preflight import prepare_training
from parallel.strategy import StrategyConfig, world_size
from trainer.build import parallel_model
from trainer.config.train import (
    CompressConfig,
    ConfigError,
    EvaluateConfig,
    GenerateConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    VerifyConfig,
)
from trainer.data import open_split, prepare_data
from trainer.inference.trained_run import load_trained_run, unwrap_transformer
from trainer.nn.box_logits import query_boxes
from trainer.nn.boxes import (
    NO_BOX,
    box_overlaps,
    generalised_overlaps,
    patch_targets,
    suppress_repeats,
)
from trainer.precision import PRECISIONS
from trainer.report.page import write_report
from trainer.tasks.detection import Detection
from trainer.tasks.detection_loss import count_boxes, dense_loss_sum, focal_loss
from trainer.tasks.detection_metrics import average_precisions, coco_detection, coco_truth
from trainer.tasks.evaluate import evaluate_model, evaluate_run
from trainer.tasks.samples import make_samples
from trainer.tasks.set_prediction import match_queries, pair_costs, set_loss_sum
from trainer.verify.cases import DETECTORS, STRATEGIES, iter_cases
from trainer.verify.compare import compare_layout, format_verdict

LAYOUTS = (
    *("fsdp 2", "tensor 2, whole sequences", "pipeline 2, zero_bubble", "pipeline 2, dualpipev"),
    *("context 2, ring", "context 2 × tensor 2", "ddp 2 × pipeline 2 × context 2"),
)
MODEL = ModelConfig(
    family="encoder",
    outputs="boxes",
    layers=2,
    width=16,
    heads=4,
    ffn_width=32,
    positions="learned",
    tied=False,
    patch_size=4,
    init_std=0.5,
)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("model", DETECTORS)
def test_a_layout_equals_one_process(ranks, model, name):
    config = VerifyConfig(STRATEGIES[name], DETECTORS[model], steps=2)
    found = ranks.run(world_size(config.strategy), compare_layout, config)[0]
    assert format_verdict(found, 1e-10) == "equal"


def test_generalised_overlap_of_boxes_by_hand():
    ours = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1]])
    theirs = torch.tensor([[1.0, 1, 3, 3], [0, 0, 1, 1], [2, 0, 3, 1]])
    # Shared 1 of 7, in a hull of 9; the same; apart, in a hull of 3 that they fill to 2/3.
    assert generalised_overlaps(ours, theirs).tolist() == pytest.approx([1 / 7 - 2 / 9, 1, -1 / 3])
    assert box_overlaps(ours, theirs).tolist() == pytest.approx([1 / 7, 1, 0])


def test_focal_loss_is_a_share_of_cross_entropy():
    logits = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    chance = logits.sigmoid()
    expected = torch.stack(
        (
            -0.25 * (1 - chance[0]) ** 2 * chance[0].log(),
            -0.75 * chance[1] ** 2 * (1 - chance[1]).log(),
        )
    )
    found = focal_loss(logits, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def row(kind, *corners, crowd=0.0):
    return [kind, *corners, crowd]


def test_patches_learn_the_nearest_box():
    # A grid of 4 × 4: centres at 1/8, 3/8, 5/8, 7/8.
    boxes = torch.tensor([[row(2, 0.0, 0.0, 0.5, 0.5), row(5, 0.56, 0.56, 0.68, 0.7)]])
    kinds, weights = patch_targets(boxes, 4)[0, :, 0].view(4, 4), patch_targets(boxes, 4)[0, :, 5]
    assert kinds[:2, :2].eq(2).all() and kinds[2, 2] == 5
    assert kinds.ge(0).sum() == 5  # the small box by the nearest patch alone
    assert weights.sum() == pytest.approx(2)  # a box counts once, however many patches learn it
    away = patch_targets(boxes, 4)[0, 0, 1:5]
    assert away.tolist() == pytest.approx([0.125, 0.125, 0.375, 0.375])
    # Of a box as large as the picture, the four patches within a quarter of its side.
    whole = patch_targets(torch.tensor([[row(1, 0.0, 0.0, 1.0, 1.0)]]), 4)[0, :, 0].view(4, 4)
    assert whole[1:3, 1:3].eq(1).all() and whole.ge(0).sum() == 4


def test_crowds_and_ignored_samples_teach_nothing():
    crowd = torch.tensor([[row(1, 0.0, 0.0, 0.5, 1.0, crowd=1.0)], [row(-100, *[-100.0] * 4)]])
    kinds = patch_targets(crowd, 4)[..., 0].view(2, 4, 4)
    assert kinds[0, :, :2].eq(-100).all() and kinds[0, :, 2:].eq(NO_BOX).all()
    assert kinds[1].eq(-100).all()
    logits = torch.randn(2, 16, 9, requires_grad=True)
    dense_loss_sum(logits, patch_targets(crowd, 4), 2.0).backward()
    assert logits.grad[1].abs().max() == 0 and logits.grad[0].abs().max() > 0
    assert Detection().count_valid(crowd) == 0


def test_mixed_precision_computes_the_loss_in_float32():
    targets = patch_targets(torch.tensor([[row(1, 0.1, 0.1, 0.6, 0.8)]]), 4)
    logits = torch.randn(1, 16, 9).bfloat16()
    assert dense_loss_sum(logits, targets, 2.0) == dense_loss_sum(logits.float(), targets, 2.0)


def test_suppression_keeps_the_best_box_of_each_class():
    draw = torch.Generator().manual_seed(0)
    corners = torch.rand(40, 2, 2, generator=draw)
    boxes = torch.cat((corners.amin(1), corners.amin(1) + 0.2 + 0.2 * corners.amax(1)), -1)
    scores = torch.rand(40, 3, generator=draw)
    found = suppress_repeats(boxes, scores, overlap=0.5, most=50, candidates=120)
    order = sorted(((scores[p, c].item(), p, c) for p in range(40) for c in range(3)), reverse=True)
    kept = []
    for score, patch, number in order:
        others = [p for _, p, c in kept if c == number]
        if all(box_overlaps(boxes[patch], boxes[p]) <= 0.5 for p in others):
            kept.append((score, patch, number))
    assert found.classes_N.tolist() == [number for _, _, number in kept][:50]
    assert found.scores_N.tolist() == pytest.approx([score for score, _, _ in kept][:50])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes") / "data"
    write_coco(folder, {"train": 8, "valid": 5, "test": 5})
    content = json.loads((folder / "test.json").read_text())
    content["annotations"][0]["iscrowd"] = 1
    (folder / "test.json").write_text(json.dumps(content))
    return boxed_data(folder)


def test_average_precision_is_that_of_pycocotools(data):
    prepare_data(data)
    dataset = open_split(data, "test")
    draw, found = np.random.default_rng(0), []
    for index in range(len(dataset)):
        truth = dataset.truth(index)
        for _ in range(9):
            box = truth.corners_N4[draw.integers(2)] + draw.normal(0, 1.2, 4)
            found.append((index, box.tolist(), float(draw.random()), int(draw.integers(2))))
    ours = average_precisions(dataset, list(range(len(dataset))), found)
    truth = COCO()
    truth.dataset = coco_truth(dataset, list(range(len(dataset))))
    truth.createIndex()
    theirs = COCOeval(truth, truth.loadRes([coco_detection(row) for row in found]), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert ours["ap"] > 0.05
    assert [ours[name] for name in ("ap", "ap50", "ap75", "ap_small")] == pytest.approx(
        theirs.stats[:4], abs=1e-12
    )
    assert "ap_large" not in ours  # there are none


def evaluate_layout(runtime, data, strategy):
    model = ModelConfig(**(vars(MODEL) | {"image_size": 16, "channels": 3, "classes": 2}))
    worker = make_worker(runtime, model, strategy)
    return evaluate_model(worker, open_split(data, "test"), micro_batch_size=2)


def test_evaluation_is_the_same_under_each_layout(ranks, data):
    prepare_data(data)
    alone = ranks.run(1, evaluate_layout, data, StrategyConfig())[0]
    assert {"eval_loss", "ap", "ap50", "ap75"} <= alone.keys()
    for axis in ("replicate", "tensor", "pipeline", "context"):
        found = ranks.run(2, evaluate_layout, data, StrategyConfig(**{axis: 2}))
        assert found[0] == found[1] == pytest.approx(alone, abs=1e-10), axis


@pytest.fixture(scope="module")
def run(tmp_path_factory, runtime, data):
    return make_run(tmp_path_factory.mktemp("detector"), runtime, MODEL, data)


def test_a_picture_gets_a_table_and_its_boxes(run, runtime, data, tmp_path):
    photo = f"{data.path}/images/test-0.png"
    config = GenerateConfig(run_dir=run.run_dir, prompt=photo, min_score=0.0, device="cpu")
    table = Detection().generate(config, load_trained_run(config, runtime))
    assert [column.header for column in table.columns][:2] == ["class", "score"]
    corners = [[float(cell) for cell in column._cells] for column in table.columns[2:]]
    assert min(corners[0]) >= 0 and max(map(sum, zip(corners[0], corners[2], strict=True))) <= 41
    drawn = Path(run.run_dir) / "test-0-boxes.png"
    assert str(drawn) in str(table.caption) and drawn.read_bytes().startswith(b"\x89PNG")
    of_split = GenerateConfig(run_dir=run.run_dir, prompt="test:1", device="cpu")
    Detection().generate(of_split, load_trained_run(of_split, runtime))
    for prompt, message in {"": "prompt is empty", "test:5": "the last is test:4"}.items():
        bad = GenerateConfig(run_dir=run.run_dir, prompt=prompt, device="cpu")
        with pytest.raises(ConfigError, match=message):
            Detection().generate(bad, load_trained_run(bad, runtime))


def test_a_report_shows_the_sample_pictures(run, runtime):
    worker = load_trained_run(GenerateConfig(run_dir=run.run_dir, device="cpu"), runtime).worker
    assert make_samples(run, worker) == ""
    page = write_report([Path(run.run_dir)])[0].read_text()
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 5
    assert "valid-0" in page and "img-src data:" in page


def test_a_run_is_evaluated(run, runtime, capsys):
    evaluate_run(EvaluateConfig(run_dir=run.run_dir, device="cpu"), runtime)
    assert "ap50" in capsys.readouterr().out


QUERIES = ModelConfig(
    **vars(MODEL)
    | {"family": "encoder_decoder", "inputs": "patches", "queries": 4, "query_groups": 3}
    | {"vocab_size": 12, "image_size": 8, "channels": 3, "classes": 2, "head_dense": True}
)


def test_groups_of_queries_do_not_see_each_other_and_queries_of_a_group_do():
    model = build(QUERIES)
    inputs = {"images": torch.randn(2, 3, 8, 8, dtype=torch.float64)}
    grouped = model(inputs)
    assert grouped.shape == (2, 12, 6)
    torch.testing.assert_close(model.eval()(inputs), grouped[:, :4], rtol=0, atol=1e-12)
    table = model.embed.tokens.weight
    with torch.no_grad():
        table[3] += 1.0
    changed = model.train()(inputs)
    moved = (changed - grouped).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [True] * 4 + [False] * 8  # also those in front of it


def test_queries_begin_at_the_places_of_a_grid():
    corners = query_boxes(torch.zeros(1, 8, 6), 4)[0]
    centres = ((corners[:, :2] + corners[:, 2:]) / 2).flatten().tolist()
    assert centres == pytest.approx([0.25, 0.25, 0.75, 0.25, 0.25, 0.75, 0.75, 0.75] * 2)


def test_matching_is_one_to_one_and_the_cheapest():
    draw = torch.Generator().manual_seed(1)
    said, boxes = torch.randn(2, 4, 3, generator=draw), torch.rand(2, 4, 4, generator=draw)
    truth = torch.tensor([[row(0, 0.1, 0.1, 0.4, 0.6), row(2, 0.5, 0.5, 0.9, 0.9)]] * 2)
    truth[1, 1, 0] = NO_BOX
    samples, queries, rows = match_queries(said, boxes, truth)
    assert samples.tolist() == [0, 0, 1] and sorted(rows[:2].tolist()) == [0, 1]
    costs = pair_costs(said, boxes, truth)[0]
    every = [costs[a, 0] + costs[b, 1] for a in range(4) for b in range(4) if a != b]
    assert costs[queries[:2], rows[:2]].sum() == pytest.approx(min(every))


REFUSED = {
    "model.queries=5": {"family": "encoder_decoder", "inputs": "patches", "queries": 5},
    "model.queries=0 are those of a decoder": {"family": "encoder_decoder", "inputs": "patches"},
    "model.pool=class_token": {"pool": "class_token"},
    "model.inputs=patches": {"inputs": "tokens"},
    "model.positions=rope": {"family": "encoder_decoder", "inputs": "patches", "queries": 4}
    | {"positions": "rope"},
}


@pytest.mark.parametrize("wanted", REFUSED)
def test_models_without_places_for_boxes_are_refused(wanted):
    (problem,) = detector_problems(ModelConfig(**(vars(MODEL) | REFUSED[wanted])))
    assert wanted in problem
    assert detector_problems(MODEL) == detector_problems(QUERIES) == []


def test_what_needs_a_cross_entropy_or_other_vectors_is_refused(tmp_path, data):
    smoothed = LossConfig(label_smoothing=0.1, chunks=2)
    problems = detection_problems(TrainConfig(model=MODEL, loss=smoothed))
    assert len(problems) == 2 and "loss.chunks=2" in problems[1]
    refused = {"merge": 2, "pool_after": 1, "drop": 0.5, "match": [[0, 0]]}
    for key, value in refused.items():
        compress = CompressConfig(**{key: value, "match_weight": 1.0})
        (problem,) = detection_compression_problems(compress, MODEL)
        assert problem.startswith(f"compress.{key}=")
    kept = CompressConfig(bits=8, prune_heads=0.5, prune_ffn=0.5, teacher="runs/x")
    assert detection_compression_problems(kept, MODEL) == []
    (problem,) = detection_compression_problems(kept, QUERIES)
    assert "finds another object in two models" in problem
    merged = CompressConfig(merge=2)
    config = TrainConfig(model=MODEL, data=data, compress=merged, run_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"compress\.merge=2 leaves fewer vectors than patches"):
        prepare_training(config, 1)


def test_a_teacher_has_the_same_outputs_and_patches():
    ours = TrainConfig(model=MODEL, compress=CompressConfig(teacher="runs/x"))
    assert teacher_problems(ours, TrainConfig(model=MODEL)) == []
    for values in ({"patch_size": 8}, {"outputs": "classes"}):
        theirs = TrainConfig(model=ModelConfig(**(vars(MODEL) | values)))
        (problem,) = teacher_problems(ours, theirs)
        assert f"has model.{next(iter(values))}=" in problem


@pytest.mark.parametrize("technique", ["encoder (detector), distill", "encoder (speech), merge"])
def test_a_compressed_layout_equals_one_process(ranks, technique):
    (config,) = (c for m, n, c in iter_cases() if (m, n) == (technique, "tensor 2 × pipeline 2"))
    found = ranks.run(world_size(config.strategy), compare_layout, replace(config, steps=2))[0]
    assert format_verdict(found, 1e-10) == "equal"


def test_auxiliary_heads_add_their_loss_while_training(runtime):
    config = replace(QUERIES, layers=3, auxiliary_heads=True)
    worker = parallel_model(
        config, StrategyConfig(), runtime, PRECISIONS["fp64"], objective=Detection()
    )
    draw = torch.Generator().manual_seed(0)
    batch = Detection().random_batch(config, 4, 0, draw)
    loss, _ = worker.forward_backward([batch])
    model = unwrap_transformer(worker)
    assert all(p.grad.abs().max() > 0 for p in model.auxiliary_heads.parameters())
    states = []
    for name in model.auxiliary_heads:
        model.block_hooks[name] = [lambda flow, *_: states.append(flow[0]) or flow]
    logits = [model(batch)]
    logits += [
        head.output(head.normalized(x))
        for head, x in zip(model.auxiliary_heads.values(), states, strict=True)
    ]
    assert len(logits) == 3
    parts = [set_loss_sum(x, batch["targets"], config.queries, 2.0) for x in logits]
    assert loss.item() == pytest.approx(sum(parts).item() / count_boxes(batch["targets"]).item())
    assert worker.whole.classes == 6


def test_auxiliary_heads_without_queries_are_refused(data):
    config = TrainConfig(model=replace(MODEL, auxiliary_heads=True), data=data)
    assert any("model.auxiliary_heads=true are those" in p for p in find_problems(config, 1))
