"""Images: splits, statistics, augmentation and data that are rejected."""

import numpy as np
import pytest
from PIL import Image

from trainer import data
from trainer.config.train import DataConfig, UserError
from trainer.data import files as source


def config_for(tmp_path, path, **settings):
    return DataConfig(kind="images", path=str(path), cache=str(tmp_path / "cache"), **settings)


def arrays(count=40, shape=(8, 8, 3), seed=0):
    """Return x of random pixels, the first of which is the number of the image, and y."""
    x = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    x.reshape(count, -1)[:, 0] = np.arange(count)
    return x, np.arange(count) % 4


@pytest.fixture
def archive(tmp_path):
    """Return a function that writes an .npz and returns the config that reads it."""

    def write(settings=None, **changes):
        x, y = arrays()
        content = {"x_train": x, "y_train": y, "x_test": x[:6], "y_test": y[:6]} | changes
        np.savez(tmp_path / "own.npz", **{k: v for k, v in content.items() if v is not None})
        return config_for(tmp_path, tmp_path / "own.npz", **(settings or {}))

    return write


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes images as <prefix>/<class>/<number>.png."""

    def write(prefix="", count=40, shape=(8, 8, 3), suffix="png"):
        x, y = arrays(count, shape)
        for i, (pixels, label) in enumerate(zip(x, y, strict=True)):
            path = tmp_path / "pictures" / prefix / f"class{label}" / f"{i:03d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.squeeze()).save(path)
        return config_for(tmp_path, tmp_path / "pictures")

    return write


def raw(dataset):
    """Return all images (N, C, H, W) of a split as stored, and their labels."""
    samples = [dataset.sample(i, None) for i in range(len(dataset))]
    return np.stack([s["images"] for s in samples]), np.stack([s["targets"] for s in samples])


def test_the_bundled_images_are_those_of_the_archive(tmp_path):
    config = config_for(tmp_path, "bundled:fashion-mnist")
    facts = data.prepare_data(config)
    stored = np.load(source.locate_data(config))
    assert facts.sample_counts == {"train": 4500, "valid": 500, "test": 1000}
    assert (facts.classes, facts.image_size, facts.channels) == (10, 28, 1)
    assert facts.class_names == tuple(stored["classes"])
    images, labels = raw(data.open_split(config, "test"))
    assert (images[:, 0] == stored["x_test"]).all() and (labels == stored["y_test"]).all()
    train, valid = (raw(data.open_split(config, split)) for split in ("train", "valid"))
    together = np.concatenate([train[0], valid[0]])[:, 0].reshape(5000, -1)
    order = stored["x_train"].reshape(5000, -1)
    assert sorted(map(bytes, together)) == sorted(map(bytes, order))  # each image once
    assert np.bincount(valid[1], minlength=10).min() > 20  # all classes, not just the last ones


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_a_micro_batch_is_normalised_by_the_train_split(archive, shape):
    x, y = arrays(40, shape)
    config = archive(x_train=x, y_train=y, x_test=x[:6], y_test=y[:6])
    data.prepare_data(config)
    train, test = (data.open_split(config, split) for split in ("train", "test"))
    batch = train.collate([train.sample(i, None) for i in range(len(train))])
    assert batch["images"].dtype == np.float32 and batch["targets"].dtype == np.int64
    assert np.abs(batch["images"].mean(axis=(0, 2, 3))).max() < 1e-5
    assert np.abs(batch["images"].std(axis=(0, 2, 3)) - 1).max() < 1e-5
    pixels = raw(train)[0].astype(np.float64) / 255
    mean, std = pixels.mean((0, 2, 3), keepdims=True), pixels.std((0, 2, 3), keepdims=True)
    found = test.collate([test.sample(i, None) for i in range(6)])["images"]
    assert np.allclose(found, (raw(test)[0] / 255 - mean) / std, atol=1e-5)


def test_own_valid_images_are_kept_apart(archive):
    x, y = arrays(12, seed=5)
    config = archive(x_valid=x, y_valid=y)
    assert data.prepare_data(config).sample_counts == {"train": 40, "valid": 12, "test": 6}
    images, labels = raw(data.open_split(config, "valid"))
    assert (images == x.transpose(0, 3, 1, 2)).all() and (labels == y).all()


@pytest.mark.parametrize("missing, splits", [(1, (32, 8, 6)), (2, (32, 4, 4))])
def test_missing_splits_are_held_out_of_train(archive, missing, splits):
    without = {} if missing == 1 else {"x_test": None, "y_test": None}
    config = archive({"held_out": 0.2}, **without)
    assert tuple(data.prepare_data(config).sample_counts.values()) == splits
    held = [raw(data.open_split(config, s)) for s in ("train", "valid", "test")[: missing + 1]]
    numbers = np.concatenate([images[:, 0, 0, 0] for images, _ in held])
    labels = np.concatenate([labels for _, labels in held])
    assert sorted(numbers) == list(range(40))
    assert (labels == numbers % 4).all()  # labels moved with their images
    assert numbers[32:].min() < 20  # not the last ones: an archive is often sorted by class


def test_augmentation_is_a_function_of_seed_and_index(archive):
    config = archive()
    data.prepare_data(config)
    one, other = (data.open_split(config, "train") for _ in range(2))
    for index in range(3):
        images = [one.sample(index, seed)["images"] for seed in range(60)]
        again = [other.sample(index, seed)["images"] for seed in range(60)]
        assert all((a == b).all() for a, b in zip(images, again, strict=True))
        assert len({image.tobytes() for image in images}) == 2 * 9  # all that exist
        possible = moves(one.sample(index, None)["images"])
        assert all(image.tobytes() in possible for image in images)
    plain, moved = ([one.sample(i, seed)["images"] for i in range(20)] for seed in (None, 3))
    applied = {moves(p).index(m.tobytes()) for p, m in zip(plain, moved, strict=True)}
    assert len(applied) > 6  # one epoch moves its samples differently


def moves(image, reach=1):
    """Return all images that a mirror and a shift by up to `reach` pixels can make."""
    _, height, width = image.shape
    found = []
    for picture in (image, image[..., ::-1]):
        for down in range(-reach, reach + 1):
            for right in range(-reach, reach + 1):
                moved = np.zeros_like(picture)
                for row in range(height):
                    for column in range(width):
                        if 0 <= row - down < height and 0 <= column - right < width:
                            moved[:, row, column] = picture[:, row - down, column - right]
                found.append(moved.tobytes())
    return found


def test_augmentation_can_be_off_and_never_touches_evaluation(archive):
    config = archive({"augment": False})
    data.prepare_data(config)
    train = data.open_split(config, "train")
    assert all((train.sample(i, 1)["images"] == raw(train)[0][i]).all() for i in range(5))


def test_a_folder_of_split_class_folders(folder):
    for prefix, count in (("train", 40), ("val", 8), ("test", 12)):
        config = folder(prefix, count)
    facts = data.prepare_data(config)
    assert facts.sample_counts == {"train": 40, "valid": 8, "test": 12}
    assert facts.class_names == ("class0", "class1", "class2", "class3")
    assert (facts.image_size, facts.channels) == (8, 3)
    images, labels = raw(data.open_split(config, "test"))
    x, y = arrays(12)
    order = np.argsort(y, kind="stable")  # class by class
    assert (images == x[order].transpose(0, 3, 1, 2)).all() and (labels == y[order]).all()


def test_an_unsplit_folder_is_held_out_by_name(folder, tmp_path):
    config = folder(count=80, shape=(8, 8))
    facts = data.prepare_data(config)
    assert facts.sample_counts == {"train": 72, "valid": 4, "test": 4} and facts.channels == 1

    def numbers(split):
        return {int(image[0, 0, 0]) for image in raw(data.open_split(config, split))[0]}

    before = {split: numbers(split) for split in facts.sample_counts}
    assert len({number % 4 for number in before["valid"] | before["test"]}) > 1  # classes
    assert set.union(*before.values()) == set(range(80))
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "pictures/class0/zzz.png")
    data.prepare_data(config)
    assert len(before["train"] - numbers("train")) <= 1  # the others stay where they were


def test_grey_beside_colour_is_colour(folder, tmp_path):
    config = folder()
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "pictures/class1/grey.png")
    assert data.prepare_data(config).channels == 3
    images = np.concatenate(
        [raw(data.open_split(config, s))[0] for s in ("train", "valid", "test")]
    )
    assert any((image == 7).all() for image in images)


X, Y = arrays()
BAD_ARCHIVES = [
    ({"x_train": X * 0.37}, r"x_train is float64 from 0 to .*; pixels must be uint8 or uint16"),
    ({"x_train": X.astype(np.int64) - 9}, r"x_train is int64 from -9 to .*; pixels must be"),
    ({"x_test": X[:6] / 255}, r"x_test is float64 from 0 to .* the same in all splits"),
    ({"x_train": np.where(X > 9, np.nan, X)}, r"x_train is float64 from nan to nan; pixels"),
    ({"x_train": X.astype(object)}, r"is not an \.npz archive of numbers"),
    (
        {"x_train": X[..., :2], "x_test": X[:6, ..., :2]},
        r"shape \(40, 8, 8, 2\); it must be numbers",
    ),
    ({"x_test": X[:0], "y_test": Y[:0]}, r"x_test has shape \(0, 8, 8, 3\)"),
    ({"y_train": Y + 0.5}, r"y_train is float64 of shape \(40,\); it must be one whole number"),
    ({"y_train": Y - 1}, r"y_train holds -1 to 2; labels must be whole numbers"),
    ({"y_train": np.eye(4)[Y]}, r"y_train is float64 of shape \(40, 4\); it must be one whole"),
    ({"Train_Images": X}, r"holds x_train and Train_Images, which are both of the train split"),
    ({"classes": np.array(list("aabc"))}, r"`classes` names a class twice: a, a, b, c"),
    ({"classes": np.array(list("ab"))}, r"y_train holds 0 to 3; .* from 0 to 1 for 2 classes"),
    ({"y_train": Y[:-1]}, r"x_train has shape \(40, 8, 8, 3\) but y_train has shape \(39,\)"),
    ({"y_test": None}, r"but y_test is missing"),
    ({"y_test": Y[:6] + 9}, r"y_test holds 9 to 12; labels must be whole numbers from 0 to 3"),
    ({"x_test": X[:6, :4, :4]}, r"x_test have the shape \(4, 4, 3\), those of x_train \(8, 8, 3\)"),
    ({"x_train": X[:, :4], "x_test": X[:6, :4]}, r"shape \(4, 8, 3\).* must be square"),
    ({"x_train": None}, r"holds x_test, y_test, y_train; it must hold x_train and y_train"),
    ({"settings": {"held_out": 0.01}}, r"data\.held_out=0\.01 of 40 images leaves none"),
]


@pytest.mark.parametrize("changes, message", BAD_ARCHIVES)
def test_archives_that_are_refused(archive, changes, message):
    config = archive(**changes)
    with pytest.raises(UserError, match=message):
        data.prepare_data(config)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken"])
def test_files_that_are_no_archive(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npz is not an \.npz archive .*data\.kind=images"):
        data.prepare_data(config_for(tmp_path, tmp_path / "x.npz"))


def test_folders_that_are_refused(folder, tmp_path):
    config = folder("train")
    extra = tmp_path / "pictures/train/class0/zzz.png"
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(extra)
    with pytest.raises(UserError, match=r"zzz\.png is 8 × 9 pixels but 40 others are 8 × 8"):
        data.prepare_data(config)
    extra.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot be read: train/class0/zzz\.png \(cannot"):
        data.prepare_data(config)
    extra.unlink()
    (tmp_path / "pictures/test/clas0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"test/ holds no images in class folders"):
        data.prepare_data(config)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "pictures/test/clas0/0.png")
    with pytest.raises(UserError, match=r"clas0 of the test split is not a class of the train"):
        data.prepare_data(config)
    (tmp_path / "pictures/train").rename(tmp_path / "pictures/valid")
    with pytest.raises(UserError, match=r"has test, valid but no train split|valid, test"):
        data.prepare_data(config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no images"):
        data.prepare_data(config_for(tmp_path, tmp_path / "empty"))


def test_images_that_change_or_vanish_while_a_run_reads_them(folder, tmp_path):
    config = folder()
    data.prepare_data(config)
    train = data.open_split(config, "train")
    for row, path in enumerate(train._table.paths[:3]):
        train.sample(row, None)
        if row == 0:
            Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(path)
            message = r"was 8 × 8 pixels when the run began and is 8 × 9; restore"
        elif row == 1:
            path.unlink()
            message = "cannot be read as an image: .*No such file"
        else:
            path.write_bytes(path.read_bytes()[:60])
            message = "cannot be read as an image: .*[Tt]runcated"
        with pytest.raises(UserError, match=message):
            train.sample(row, None)
