"""Scenes and augmentation are functions of the seed and the sample, and boxes follow the pixels."""

import numpy as np
import pytest
from boxed import boxed_data, write_coco

from trainer.config.train import DataConfig
from trainer.data import open_split, prepare_data
from trainer.data.detection.augment import Augmentation
from trainer.data.detection.canvas import MOST_ITEMS, MOST_OVERLAP
from trainer.data.detection.scene import Boxes, make_boxes


@pytest.fixture(scope="module")
def canvas(tmp_path_factory):
    cache = tmp_path_factory.mktemp("canvas")
    config = DataConfig(
        kind="detection", path="bundled:fashion-canvas", image_size=64, cache=str(cache)
    )
    prepare_data(config)
    return config


def same(ours, theirs):
    return all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_training_scenes_change_with_the_epoch_and_evaluated_ones_do_not(canvas):
    train, again = open_split(canvas, "train"), open_split(canvas, "train")
    assert same(train.sample(7, 5), again.sample(7, 5))
    assert not same(train.sample(7, 5), train.sample(7, 6))
    assert not same(train.sample(7, 5), train.sample(8, 5))
    assert same(train.sample(7, None), again.sample(7, None))
    fixed = open_split(DataConfig(**(vars(canvas) | {"augment": False})), "train")
    assert same(fixed.sample(7, 5), train.sample(7, None))


def test_boxes_of_a_scene_are_tight_and_hardly_overlap(canvas):
    for index in range(40):
        pixels, boxes = open_split(canvas, "test").picture(index, None)
        assert 1 <= len(boxes) <= MOST_ITEMS
        for left, top, right, bottom in boxes.corners_N4.astype(int):
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
            inside = pixels[top:bottom, left:right].max(2)
            assert all(
                edge.max() > 0 for edge in (inside[0], inside[-1], inside.T[0], inside.T[-1])
            )
        for a in range(len(boxes)):
            for b in range(a):
                assert shared_part(boxes.corners_N4[a], boxes.corners_N4[b]) < MOST_OVERLAP


def shared_part(ours, theirs):
    sides = np.minimum(ours[2:], theirs[2:]) - np.maximum(ours[:2], theirs[:2])
    areas = [np.prod(box[2:] - box[:2]) for box in (ours, theirs)]
    return np.prod(np.maximum(sides, 0)) / min(areas)


def test_items_of_a_split_are_in_its_scenes_only(canvas):
    tables = [open_split(canvas, split)._canvas.table for split in ("train", "valid", "test")]
    items = [{image.tobytes() for image in table.pixels} for table in tables]
    assert not items[0] & items[1] and not items[0] & items[2] and not items[1] & items[2]


def blob(left, top, right, bottom, size=48):
    pixels = np.full((size, size, 1), 114, np.uint8)
    pixels[top:bottom, left:right] = 255
    return pixels, make_boxes([[left, top, right, bottom]], [3], [False], [9.0])


@pytest.mark.parametrize("flips", ["none", "horizontal", "both", "turns"])
@pytest.mark.parametrize("seed", range(6))
def test_boxes_follow_flips_shifts_and_scales(flips, seed):
    augmentation = Augmentation(flips, zoom=0.3, shift=0.1)
    pixels, boxes = augmentation.apply(*blob(14, 18, 30, 26), seed=seed)
    bright = np.argwhere(pixels[:, :, 0] > 200)
    low, high = bright.min(0)[::-1], bright.max(0)[::-1] + 1
    assert boxes.corners_N4[0] == pytest.approx([*low, *high], abs=1.01)
    assert np.array_equal(pixels, augmentation.apply(*blob(14, 18, 30, 26), seed=seed)[0])


def test_a_box_that_leaves_the_picture_is_left_out():
    boxes = Boxes(np.array([[40, 0, 60, 10]], np.float32), *([np.zeros(1)] * 3))
    assert len(boxes.clipped(48, 48)) == 1
    assert len(boxes.clipped(48, 48, least_shown=0.41)) == 0


def test_evaluation_is_not_augmented_and_batches_are_padded(tmp_path):
    write_coco(tmp_path / "data", {"train": 4})
    config = boxed_data(tmp_path / "data")
    prepare_data(config)
    dataset = open_split(config, "train")
    assert same(dataset.sample(0, None), dataset.sample(0, None))
    assert not same(dataset.sample(0, 1), dataset.sample(0, None))
    sample = dataset.sample(0, None)
    fewer = sample | {"targets": sample["targets"][:1]}
    batch = dataset.collate([sample, fewer])
    assert batch["targets"].shape == (2, 2, 6) and batch["targets"][1, 1, 0] == -1
    assert batch["images"].dtype == np.float32 and abs(batch["images"].mean()) < 1
