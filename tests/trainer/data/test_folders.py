"""Data folders: spellings of splits, entries left out, links, and ambiguous readings."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer import data
from trainer.config.train import DataConfig, UserError
from trainer.data.folders import split_of
from trainer.data.record import format_record

PLAY = Path(__file__).parents[3] / "trainer/data/bundled/shakespeare/valid.txt"
LINES = PLAY.read_text().splitlines()[:600]
COLOURS = {"bus": 250, "car": 130, "train": 10}
CLASSES = ("bus", "car")


def text_of(*marks: str) -> str:
    """Return a text in which each mark can be found."""
    return "\n".join(f"{mark} {line}" for line in LINES for mark in marks)


def write(folder: Path, **files: str) -> DataConfig:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return config_of(folder)


def config_of(folder: Path, kind: str = "text") -> DataConfig:
    cache = str(folder.parent / "cache")
    return DataConfig(kind=kind, path=str(folder), vocab_size=300, seq_len=16, cache=cache)


def marks_in(config: DataConfig) -> dict[str, set[str]]:
    """Return which of the marks A to D each split contains."""
    tokenizer, found = data.open_tokenizer(config), {}
    assert tokenizer is not None
    for split in ("train", "valid", "test"):
        dataset = data.open_split(config, split)
        ids = np.concatenate([dataset.sample(i, None)["tokens"] for i in range(len(dataset))])
        words = tokenizer.decode(ids).split()
        found[split] = {word for word in words if word in ("AA", "BB", "CC", "DD")}
    return found


def paint(folder: Path, *names: str, count: int = 12, mark: int = 0, suffix: str = ".png") -> None:
    """Write pictures in the colour of their class to folder/<name>; the first pixel is `mark`."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.full((8, 8), COLOURS.get(Path(name).name, 77), np.uint8)
            pixels[0, :2] = mark, i
            Image.fromarray(pixels).save(folder / name / f"{i}{suffix}")


def first_pixels(config: DataConfig, split: str) -> set[int]:
    dataset = data.open_split(config, split)
    return {int(dataset.sample(i, None)["images"][0, 0, 0]) for i in range(len(dataset))}


# ---- the names of splits

SPELLED = {
    "train": "train.txt Train.TXT TRAIN train-00000-of-00002.txt train_1.txt x.train.txt"
    " training.txt training_set trainset TrainData train.en-de.tsv ag_news_train"
    " train2017 train-clean-100 wiki.train.tokens wmt.train.en.txt trainA",
    "valid": "valid.txt validation-00000-of-00001.txt val dev.txt eval.txt VAL_2 development"
    " devset ValidationSet x-dev.txt valid(1).txt evaluation_data"
    " validate.txt iwslt14.valid.de-en.txt newsdev2016.txt",
    "test": "test.txt Testing test-00000-of-00001.txt test_set testset TestData x.test.txt tst.txt"
    " iwslt14.test.de-en.txt newstest2014.txt devtest.txt",
    None: "book.txt bus car latest.txt contest pretrain.txt restrain attest train_test.txt"
    " mytrain.txt developer.md evaluate.md 2024.txt _.txt .txt",
}


@pytest.mark.parametrize(
    "split, name", [(s, n) for s, names in SPELLED.items() for n in names.split()]
)
def test_names_of_splits(split, name):
    assert split_of(name) == split


@pytest.mark.parametrize(
    "names",
    [
        "train-00000-of-00002.txt validation-00000-of-00001.txt test-00000-of-00001.txt",
        "Training.txt DEV.txt Testing.TXT",
        "x.train.txt x.eval.txt x.test.txt",
        "train_1__a.txt val__deep__b.txt Test-Set__c.txt",
        "my/train.txt my/valid.txt my/test.txt",
        "train.dat valid.en test.raw",
    ],
)
def test_text_is_split_by_the_usual_spellings(tmp_path, names):
    first, second, third = (name.replace("/", "__") for name in names.split())
    config = write(
        tmp_path / "d", **{first: text_of("AA"), second: text_of("BB"), third: text_of("CC")}
    )
    facts = data.prepare_data(config)
    assert marks_in(config) == {"train": {"AA"}, "valid": {"BB"}, "test": {"CC"}}
    shown = format_record(facts)
    assert all(name.rpartition("/")[2] in shown for name in names.replace("__", "/").split())


@pytest.mark.parametrize(
    "train, test",
    [
        ("Training", "Testing"),
        ("train_set", "TEST"),
        ("x-train", "x-test"),
        ("train", "tst"),
    ],
)
def test_images_are_split_by_the_usual_spellings(tmp_path, train, test):
    paint(tmp_path / "d" / train, *CLASSES, mark=1)
    paint(tmp_path / "d" / test, *CLASSES, mark=2)
    config = config_of(tmp_path / "d", "images")
    facts = data.prepare_data(config)
    assert facts.class_names == CLASSES
    assert first_pixels(config, "train") == {1} and first_pixels(config, "test") == {2}
    assert f"{train}/" in format_record(facts)


def test_shards_of_images_are_one_split(tmp_path):
    paint(tmp_path / "d/train-1", *CLASSES, mark=1)
    paint(tmp_path / "d/train-2", *CLASSES, mark=2)
    config = config_of(tmp_path / "d", "images")
    data.prepare_data(config)
    assert first_pixels(config, "train") == {1, 2}


# ---- two readings

TWO_READINGS = [
    ("bus.md", "car.md", "train.md"),
    ("a.txt", "b.txt", "test.txt"),
    ("notes.txt", "x__dev.txt"),
    ("book.txt", "train__part.txt"),
    ("a__x.txt", "training_set__x.txt"),
    ("mytrain.txt", "mydev.txt", "mytest.txt"),
    ("trains.txt", "tests.txt"),
    ("books_train_en.txt", "books_test_en.txt", "other.txt"),
]


@pytest.mark.parametrize("names", TWO_READINGS)
def test_text_with_two_readings_is_refused_with_both(tmp_path, names):
    config = write(tmp_path / "d", **dict.fromkeys(names, text_of("AA")))
    with pytest.raises(UserError, match=r"two ways: .*(train|test|training_set|x/dev)") as error:
        data.prepare_data(config)
    assert "x/dev" in str(error.value) or names[0].partition("__")[0] in str(error.value)


def test_images_with_two_readings_are_refused_with_both(tmp_path):
    paint(tmp_path / "d", *CLASSES)
    paint(tmp_path / "d/train", "steam", "diesel")
    with pytest.raises(UserError, match=r"two ways: train as train split, without bus, car"):
        data.prepare_data(config_of(tmp_path / "d", "images"))


@pytest.mark.parametrize("names", [("train", "test"), ("trainA", "trainB", "testA", "testB")])
def test_splits_without_class_folders_are_not_classes(tmp_path, names):
    paint(tmp_path / "d", *names)
    with pytest.raises(UserError, match=r"splits by their names, but hold pictures without cl"):
        data.prepare_data(config_of(tmp_path / "d", "images"))


def test_a_class_may_be_called_train(tmp_path):
    paint(tmp_path / "d", *COLOURS)
    assert data.prepare_data(config_of(tmp_path / "d", "images")).class_names == tuple(COLOURS)


@pytest.mark.parametrize("outer", ["Left", "cats", "fold_a"])
def test_a_class_that_holds_class_folders_is_refused(tmp_path, outer):
    paint(tmp_path / "d" / outer, *CLASSES)
    paint(tmp_path / "d", "bus")
    with pytest.raises(UserError, match=rf"{outer} is read as a class, .*bus, car.*name it"):
        data.prepare_data(config_of(tmp_path / "d", "images"))


# ---- what is left out and recorded


def test_hidden_and_foreign_files_are_not_read_as_text(tmp_path):
    config = write(
        tmp_path / "d",
        **{
            "train.txt": text_of("AA"),
            "valid.txt": text_of("BB"),
            "test.txt": text_of("CC"),
            **dict.fromkeys(
                (
                    ".ipynb_checkpoints__train.txt",
                    "_-MACOSX__train.txt",
                    "train.txt.bak",
                    "train.txt~",
                    ".train.txt.swp",
                    "#train.txt#",
                    "README.md",
                    "notes.txt",
                    "train.jsonl",
                ),
                text_of("DD"),
            ),
        },
    )
    (tmp_path / "d/_-MACOSX").rename(tmp_path / "d/__MACOSX")
    (tmp_path / "d/gone.txt").symlink_to(tmp_path / "nowhere")
    facts = data.prepare_data(config)
    assert marks_in(config) == {"train": {"AA"}, "valid": {"BB"}, "test": {"CC"}}
    left = {
        ".ipynb_checkpoints",
        "__MACOSX",
        "train.txt.bak",
        "train.txt~",
        ".train.txt.swp",
        "#train.txt#",
        "README.md",
        "notes.txt",
        "train.jsonl",
        "gone.txt",
    }
    assert facts.left_out.keys() == left
    assert "not read: " in format_record(facts) and "hidden" in format_record(facts)


def test_hidden_and_foreign_files_are_not_read_as_images(tmp_path):
    paint(tmp_path / "d", *CLASSES, mark=1)
    paint(tmp_path / "d", ".ipynb_checkpoints", "bus/.ipynb_checkpoints", "__MACOSX/bus", mark=9)
    paint(tmp_path / "d/bus", ".", mark=9, count=1, suffix=".png.bak.png")
    (tmp_path / "d/bus/._0.png").write_bytes(b"resource fork")
    (tmp_path / "d/bus/0.png.bak.png").unlink()
    (tmp_path / "d/empty").mkdir()
    (tmp_path / "d/car/Thumbs.db").write_bytes(b"x")
    (tmp_path / "d/car/notes.txt").write_text("x")
    config = config_of(tmp_path / "d", "images")
    facts = data.prepare_data(config)
    assert facts.class_names == CLASSES and sum(facts.sample_counts.values()) == 24
    assert all(first_pixels(config, split) == {1} for split in facts.splits)
    assert facts.left_out.keys() == {
        ".ipynb_checkpoints",
        "__MACOSX",
        "empty",
        "bus/.ipynb_checkpoints",
        "bus/._0.png",
        "car/Thumbs.db",
        "car/notes.txt",
    }


@pytest.mark.parametrize("name", ["train.jsonl", "train.txt.gz", "train.csv", "train.parquet"])
def test_other_formats_are_not_read_as_text(tmp_path, name):
    config = write(tmp_path / "d", **{name: text_of("AA")})
    with pytest.raises(UserError, match=r"reads UTF-8 text but|holds no .* file"):
        data.prepare_data(config)


@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_folder_is_data_whatever_its_name(tmp_path, kind):
    if kind == "images":
        paint(tmp_path / "d", "authors", "license")
        facts = data.prepare_data(config_of(tmp_path / "d", "images"))
        assert facts.class_names == ("authors", "license") and not facts.left_out
        return
    config = write(tmp_path / "d", authors__a__x__y__b_txt=text_of("AA"))
    (tmp_path / "d/authors/a/x/y/b_txt").rename(tmp_path / "d/authors/a/x/y/b.txt")
    write(tmp_path / "d", **{"notice board.txt": text_of("BB"), "README.de.md": text_of("CC")})
    config.held_out = 0.5
    facts = data.prepare_data(config)
    assert marks_in(config)["train"] | marks_in(config)["test"] == {"AA", "BB"}
    assert facts.left_out == {"README.de.md": "documentation"}


def test_entries_around_a_wrapper_folder_are_recorded(tmp_path):
    config = write(
        tmp_path / "d",
        **{
            "LICENSE": "x",
            "notes.pdf": "x",
            "empty.txt": "",
            "in__train.txt": text_of("AA"),
            "README.md": text_of("DD"),
            "in__test.txt": text_of("BB"),
            "in__.DS_Store": "x",
        },
    )
    facts = data.prepare_data(config)
    left = {"LICENSE", "notes.pdf", "README.md", "in/.DS_Store"}
    assert facts.left_out.keys() == left | {"empty.txt"} and "in/" in format_record(facts)
    paint(tmp_path / "p/in/train", *CLASSES)
    paint(tmp_path / "p/in/test", *CLASSES)
    write(tmp_path / "p", **{"LICENSE": "x", "sheet.png": "x", "docs__x.pdf": "x"})
    facts = data.prepare_data(config_of(tmp_path / "p", "images"))
    assert facts.left_out.keys() == {"LICENSE", "sheet.png", "docs"}


# ---- links


def test_links_are_followed_and_loops_are_left_out(tmp_path):
    write(tmp_path / "store", **{"deep__a.txt": text_of("AA"), "b.txt": text_of("BB")})
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "deep").symlink_to(tmp_path / "store/deep")
    (folder / "b.txt").symlink_to(tmp_path / "store/b.txt")
    (tmp_path / "store/deep/up").symlink_to(tmp_path / "store")
    (tmp_path / "store/back").symlink_to(tmp_path / "store/deep")
    config = config_of(folder)
    config.held_out = 0.5
    facts = data.prepare_data(config)
    assert marks_in(config)["test"] | marks_in(config)["train"] == {"AA", "BB"}
    assert any(why == "a link to a parent folder" for why in facts.left_out.values())


def test_class_folders_that_are_links_share_no_cache(tmp_path):
    """Prepare two folders of one name with links of the same names into one store."""
    paint(tmp_path / "store/first", *CLASSES, mark=1)
    paint(tmp_path / "store/second", *CLASSES, mark=2)
    configs = []
    for which, order in (("first", CLASSES), ("second", CLASSES[::-1])):
        folder = tmp_path / which / "d"
        folder.mkdir(parents=True)
        for name, target in zip(CLASSES, order, strict=True):
            (folder / name).symlink_to(tmp_path / "store" / which / target)
        configs.append(config_of(folder, "images"))
        configs[-1].cache = str(tmp_path / "cache")
        data.prepare_data(configs[-1])
    assert [first_pixels(config, "train") for config in configs] == [{1}, {2}]
    before = data.prepare_data(configs[0])
    paint(tmp_path / "store/first", "train", mark=1)
    (tmp_path / "first/d/train").symlink_to(tmp_path / "store/first/train")
    after = data.prepare_data(configs[0])
    assert (before.classes, after.classes) == (2, 3)
    # The same files under other names are other classes.
    (tmp_path / "first/d/train").rename(tmp_path / "first/d/tram")
    assert data.prepare_data(configs[0]).class_names == ("bus", "car", "tram")


def test_a_file_that_links_repeat_is_read_once(tmp_path):
    config = write(tmp_path / "d", **{"a.txt": text_of("AA"), "b.txt": text_of("BB")})
    clean = data.prepare_data(config).splits["train"]
    (tmp_path / "d/0latest.txt").symlink_to("b.txt")
    (tmp_path / "d/more").mkdir()
    (tmp_path / "d/more/c.txt").symlink_to("../0latest.txt")
    found = data.prepare_data(config)
    assert found.splits["train"].digest == clean.digest
    assert found.left_out == dict.fromkeys(("0latest.txt", "more/c.txt"), "the same file as b.txt")


@pytest.mark.parametrize("link, target", [("test.txt", "train.txt"), ("test", "extra")])
def test_a_file_that_links_put_into_two_splits_is_refused(tmp_path, link, target):
    write(tmp_path / "d", **{"train.txt": text_of("AA")})
    if target == "extra":
        write(tmp_path / "d", train__more__x=text_of("BB"))
        (tmp_path / "d/train.txt").rename(tmp_path / "d/train/a.txt")
        target = "train"
    (tmp_path / "d" / link).symlink_to(target)
    with pytest.raises(UserError, match=r"train.*\(the train split\) and test.* are the same file"):
        data.prepare_data(config_of(tmp_path / "d"))


def test_a_picture_that_links_put_into_two_classes_is_refused_or_skipped(tmp_path):
    paint(tmp_path / "d", *CLASSES)
    clean = data.prepare_data(config_of(tmp_path / "d", "images"))
    (tmp_path / "d/bus/x.png").symlink_to("../car/3.png")
    (tmp_path / "d/car/y.png").symlink_to("3.png")
    config = config_of(tmp_path / "d", "images")
    message = (
        r"car/3.png \(class car of the train split\) and bus/x.png \(class bus of .* are the same"
    )
    with pytest.raises(UserError, match=message):
        data.prepare_data(config)
    config.on_bad_file = "skip"
    found = data.prepare_data(config)
    assert found.sample_counts == clean.sample_counts
    assert found.left_out.keys() == {"bus/x.png", "car/y.png"}
    (tmp_path / "d/bus/x.png").unlink()
    (tmp_path / "d/tram").symlink_to("car")
    with pytest.raises(
        UserError, match=r"class car of .*class tram of the train split\) are the same"
    ):
        data.prepare_data(config_of(tmp_path / "d", "images"))


def test_loops_of_links_in_class_folders(tmp_path):
    paint(tmp_path / "d", *CLASSES)
    (tmp_path / "d/bus/up").symlink_to(tmp_path / "d")
    (tmp_path / "d/none").mkdir()
    (tmp_path / "d/none/again").symlink_to(tmp_path / "d/none")
    (tmp_path / "d/none/car").symlink_to(tmp_path / "d/loop")
    (tmp_path / "d/loop").mkdir()
    (tmp_path / "d/loop/none").symlink_to(tmp_path / "d/none")
    facts = data.prepare_data(config_of(tmp_path / "d", "images"))
    assert facts.class_names == CLASSES and "bus/up" in facts.left_out


# ---- encodings

ENCODED = [
    ("utf-16", "UTF-16; convert it, `iconv -f utf-16 -t utf-8`"),
    ("utf-16-le", "`iconv -f utf-16le -t utf-8`"),
    ("utf-16-be", "`iconv -f utf-16be"),
    ("utf-32", "`iconv -f utf-32 -t"),
    ("utf-32-le", "`iconv -f utf-32le"),
    ("latin1", "is not UTF-8 at byte .*`iconv -f latin1"),
    ("cp1252", "`iconv -f cp1252"),
]
RUSSIAN = "Мороз и солнце; день чудесный! Ещё ты дремлешь, друг прелестный; пора, проснись.\n"
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n"
CHINESE = "话说天下大势,分久必合,合久必分。周末七国分争,并入于秦。\n"
SCRIPTS = [
    ("cp1251", "cp1251", RUSSIAN),
    ("koi8-r", "koi8-r", RUSSIAN),
    ("shift_jis", "cp932", JAPANESE),
    ("euc-jp", "euc-jp", JAPANESE),
    ("gb18030", "gb18030", CHINESE),
]


@pytest.mark.parametrize("encoding, named, text", SCRIPTS)
def test_encodings_of_other_scripts_are_guessed(tmp_path, encoding, named, text):
    (tmp_path / "d.txt").write_bytes((text * 40).encode(encoding))
    with pytest.raises(UserError, match=rf"not UTF-8 .*`iconv -f {named} -t utf-8` by its looks"):
        data.prepare_data(config_of(tmp_path / "d.txt"))


@pytest.mark.parametrize("encoding, message", ENCODED)
def test_other_encodings_are_named(tmp_path, encoding, message):
    text = text_of("AA").replace("a", "€" if encoding == "cp1252" else "é")
    (tmp_path / "d.txt").write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=message):
        data.prepare_data(config_of(tmp_path / "d.txt"))


def test_nuls_are_not_text(tmp_path):
    (tmp_path / "d.txt").write_bytes(text_of("AA").encode() + b"\0 rest")
    with pytest.raises(UserError, match=r"holds a NUL at byte \d+, so it is not text"):
        data.prepare_data(config_of(tmp_path / "d.txt"))
