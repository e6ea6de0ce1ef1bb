"""Single files that the fuzzer (tests/fuzz/files.py) found misread, and similar ones."""

import io
import zipfile
from random import Random

import numpy as np
import pytest
import tokenizers
from odd_encodings import drawn
from PIL import Image
from raw_pictures import tiff

from trainer import data
from trainer.config.train import DataConfig, UserError
from trainer.data.archive import read_archive
from trainer.data.dataset import DataFacts, SplitFacts
from trainer.data.files import FilePart, read_text
from trainer.data.folders import split_of
from trainer.data.pictures import pixels_of
from trainer.data.record import read_record, write_record
from trainer.data.tokenizer import Tokenizer

WORDS = "the question is whether it is nobler in the mind to suffer\n" * 40


GREY = np.stack([drawn("grey", number, Random(0)) for number in range(6)])


def archive(folder, **changes):
    """Return the tables of an archive of six 8 × 8 pictures in three classes."""
    arrays = {"x_train": GREY, "y_train": np.arange(6) % 3} | changes
    path = folder / "x.npz"
    np.savez(path, **arrays)
    return read_archive(DataConfig(kind="images", path=str(path)), path).tables


@pytest.mark.parametrize("factor", [4, 16])
def test_sixteen_bits_that_hold_fewer_are_refused(tmp_path, factor):
    thin = GREY.astype(np.uint16) * factor
    with pytest.raises(UserError, match=f"x_train is uint16 from .* to {thin.max()}"):
        archive(tmp_path, x_train=thin)
    for whole in (GREY.astype(np.uint16) * 257, GREY.astype(np.uint16)):
        assert (archive(tmp_path, x_train=whole)["train"].pixels[..., 0] == GREY).all()


@pytest.mark.parametrize("dtype", ["uint8", "int64", "uint16", "bool", "float32", "int8"])
def test_zeros_and_ones_are_black_and_white(tmp_path, dtype):
    bits = GREY > 120
    found = archive(tmp_path, x_train=bits.astype(dtype), x_test=bits[:1].astype(dtype), y_test=[0])
    assert (found["train"].pixels[..., 0] == np.where(bits, 255, 0)).all()
    with pytest.raises(UserError, match="the same in all splits"):
        archive(tmp_path, x_train=bits.astype(dtype), x_test=GREY[:1], y_test=[0])


def test_a_dark_split_has_the_range_of_train(tmp_path):
    dark = np.eye(8, dtype=np.uint8)[None]
    assert archive(tmp_path, x_train=GREY, x_test=dark, y_test=[0])["test"].pixels.max() == 1


@pytest.mark.parametrize("names", [["ä", "b", "c"], ["1", "2", "3"]])
def test_class_names_in_bytes_are_words(tmp_path, names):
    encoded = np.array([name.encode() for name in names])
    assert archive(tmp_path, classes=encoded)["train"].class_names == tuple(names)
    found = archive(tmp_path, y_train=encoded[np.arange(6) % 3])["train"]
    assert found.class_names == tuple(sorted(names))
    latin = archive(tmp_path, classes=np.array([b"\xe4", b"b", b"c"]))["train"]
    assert latin.class_names == ("ä", "b", "c")


def test_labels_without_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="y_val, but no images of the valid split; add x_valid"):
        archive(tmp_path, y_val=np.zeros(3, int))


@pytest.mark.parametrize("label", [float("nan"), float("inf"), 1e300, 0.5, 2**62, 2**40, -1])
def test_labels_outside_the_classes_are_rejected(tmp_path, label):
    with pytest.raises(UserError, match="y_train"):
        archive(tmp_path, y_train=np.array([0, 1, 2, 0, 1, label]))


HEADER = b"\x93NUMPY\x01\x00\x76\x00"
HEADERS = (
    "{'descr': ",
    "(",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (2**70,), }",
    "[]",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999,), }",
)
MEMBERS = [b"", b"text", *(HEADER + text.encode().ljust(118) for text in HEADERS)]


@pytest.mark.parametrize("content", MEMBERS)
def test_members_that_are_not_arrays(tmp_path, content):
    file = io.BytesIO()
    np.savez(file, x_train=GREY)
    with zipfile.ZipFile(file, "a") as members:
        members.writestr("y_train.npy", content)
    (path := tmp_path / "x.npz").write_bytes(file.getvalue())
    with pytest.raises(UserError, match=r"is not an \.npz archive of numbers|it must hold"):
        read_archive(DataConfig(kind="images", path=str(path)), path)


@pytest.mark.parametrize(
    "bits, code, photometric",
    [
        (16, "<u2", 1),
        (16, "<u2", 0),
        (16, ">u2", 1),
        (12, "packed", 1),
        (8, "<u1", 0),
        (4, "packed", 0),
    ],
)
def test_the_values_of_a_tiff_have_its_range(bits, code, photometric):
    top = (1 << bits) - 1
    numbers = np.rint(GREY[3] * (top / 255)).astype(int)
    stored = numbers if photometric else top - numbers
    with Image.open(io.BytesIO(tiff(stored, bits, photometric, code))) as image:
        found = pixels_of(image, 1)[..., 0].astype(int)
    assert abs(found - np.rint(numbers * 255 / top)).max() <= 1


@pytest.mark.parametrize("bits, code, kind", [(8, "<i1", 2), (16, "<i2", 2), (32, "<f4", 3)])
def test_a_tiff_with_signs_or_fractions_is_refused(bits, code, kind):
    with (
        Image.open(io.BytesIO(tiff(GREY[0] // 2, bits, 1, code, kind))) as image,
        pytest.raises(ValueError, match="no stated range"),
    ):
        pixels_of(image, 1)


@pytest.mark.parametrize("top", [65535, 4095, 1000, 255])
@pytest.mark.parametrize("magic", ["P2", "P5"])
def test_a_pgm_has_the_range_that_its_header_states(magic, top):
    numbers = np.rint(GREY[2] * (top / 255)).astype(int)
    body = numbers.astype(">u2" if top > 255 else "u1").tobytes()
    body = body if magic == "P5" else " ".join(map(str, numbers.ravel())).encode()
    with Image.open(io.BytesIO(f"{magic} 8 8 {top}\n".encode() + body)) as image:
        assert abs(pixels_of(image, 1)[..., 0].astype(int) - GREY[2]).max() <= 1


@pytest.mark.parametrize(
    "name, split",
    [
        ("data.val", "valid"),
        ("x.test", "test"),
        ("book.train", "train"),
        ("train.test", "train"),
        ("train and test.txt", None),
        ("notes.txt", None),
        ("test.en", "test"),
    ],
)
def test_a_word_after_a_dot_counts_if_no_other_does(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("name", ["\udcff", "a\udc80b", "\ud800"])
def test_names_that_are_not_utf8_are_recorded(tmp_path, name):
    facts = DataFacts(
        "images",
        name,
        0,
        2,
        8,
        1,
        (name, "x"),
        left_out={name: "hidden"},
        splits={"train": SplitFacts(sources=(name,), samples=1)},
    )
    write_record(tmp_path, facts)
    assert read_record(tmp_path) == facts
    assert ascii(name).strip("'") in (tmp_path / "data.txt").read_text()


def prepared(folder, name, content, **settings):
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / name).write_bytes(content.encode())
    settings = {"seq_len": 8, "vocab_size": 258, "cache": str(folder / "cache")} | settings
    config = DataConfig(path=str(folder / "data"), **settings)
    return config, data.prepare_data(config)


@pytest.mark.parametrize(
    "text, note",
    [
        (WORDS.replace("\n", "\r\n"), "40 carriage returns"),
        (WORDS.replace("\n", "\r"), "40 carriage returns"),
        (WORDS + "\x1b$B", "1 control characters"),
        (WORDS, ""),
        (WORDS + "\t\x0c\u2028é", ""),
    ],
)
def test_rare_characters_are_noted(tmp_path, text, note):
    _, facts = prepared(tmp_path, "book.txt", text)
    assert any(note in said for said in facts.notes) if note else not facts.notes


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_a_byte_order_mark_in_any_block_is_not_text(tmp_path, monkeypatch, block):
    monkeypatch.setattr("trainer.data.files.BLOCK", block)
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffé\ufeff\n".encode())
    size = path.stat().st_size
    assert "".join(read_text(FilePart(path, 0, size))) == "é\ufeff\n"
    assert "".join(read_text(FilePart(path, 5, size))) == "\ufeff\n"


@pytest.mark.parametrize("name", ["README.md", "LICENSE.txt", "readme.rst"])
def test_documentation_is_not_read_as_text(tmp_path, name):
    prepared(tmp_path, "book.txt", WORDS)
    config, facts = prepared(tmp_path, name, "About this text.\n")
    assert facts.left_out == {name: "documentation"}
    (tmp_path / "data/book.txt").unlink()
    (tmp_path / "data" / name).write_text(WORDS)
    assert data.prepare_data(config).left_out == {}  # there is no other file


@pytest.mark.parametrize(
    "first, said",
    [
        ("source\ttarget", True),
        ("en\tde", True),
        ("sentence_en\tsentence_de", True),
        ("English\tGerman", True),
        ("the lamp\tdie Lampe", False),
        ("input\tEingabe", False),
    ],
)
def test_a_header_is_noted(tmp_path, first, said):
    lines = f"{first}\n" + "turn on the lamp\tmach die Lampe an\n" * 30
    _, facts = prepared(tmp_path, "train.tsv", lines, kind="pairs", seq_len=60)
    assert bool(facts.notes) == said
    if said:
        assert "the first line of train.tsv (" in facts.notes[0]


def test_ids_without_end_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    text = tokenizers.Tokenizer(words).to_str()
    path.write_text(text.replace('"b":1', f'"b":{1 << 24}'))
    with pytest.raises(UserError, match=r"has the token id 16777216; a model has a row for each"):
        Tokenizer.load(path)


@pytest.mark.parametrize("special", ["the", "i", "q"])
def test_a_special_token_that_is_a_word_is_not_lossless(tmp_path, special, caplog):
    tokenizer = Tokenizer.train([WORDS], 280)
    tokenizer._backend.add_special_tokens([special])
    tokenizer.save(tmp_path / "tokenizer.json")
    own = Tokenizer.load(tmp_path / "tokenizer.json")
    lost = own.decode(own.encode(WORDS)) != WORDS
    assert not own.is_lossless
    _, facts = prepared(tmp_path, "book.txt", WORDS, tokenizer=str(tmp_path / "tokenizer.json"))
    assert (facts.splits["train"].lost > 0) == lost == ("loses" in caplog.text)
