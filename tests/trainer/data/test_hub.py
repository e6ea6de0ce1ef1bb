"""Hugging Face data sets: empty cells, columns, languages and pictures."""

import json
from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image

from trainer import data
from trainer.config.train import DataConfig, UserError
from trainer.data import huggingface as hub

SIDE = 4


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return a function that returns the config of the test's local data set."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    (tmp_path / "set").mkdir()

    def of(kind, **settings):
        return DataConfig(
            kind=kind,
            path=f"hf:{tmp_path / 'set'}",
            seq_len=40,
            vocab_size=270,
            cache=str(tmp_path / "cache"),
            **settings,
        )

    return of


def export(config):
    return hub.export_dataset(config, data.READERS[config.kind].hub)


def write(tmp_path, rows, split="train"):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "set" / f"{split}.jsonl").write_text(lines)


def pairs_of(config):
    lines = (export(config) / "train.tsv").read_text().splitlines()
    return [tuple(line.split("\t")) for line in lines]


@pytest.mark.parametrize("columns", [["messages"], ["prompt", "completion"]])
def test_conversations(config, tmp_path, columns):
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"day {i}", "name": None},
                {"role": "assistant", "content": f"Tag {i}", "name": None},
            ],
            "prompt": f"day {i}",
            "completion": f"Tag {i}",
            "id": i,
        }
        for i in range(40)
    ]
    write(tmp_path, [{name: talk[name] for name in [*columns, "id"]} for talk in talks])
    settings = config("chat", chat_template="plain")
    data.prepare_data(settings)
    dataset, tokenizer = data.open_split(settings, "train"), data.open_tokenizer(settings)
    opening = dataset.opening(0)
    assert [message["role"] for message in opening] == ["user"]
    assert "assistant\nTag" in tokenizer.decode(dataset.sample(0, None)["tokens"])


def test_pairs_with_an_empty_cell_are_left_out_and_counted(config, tmp_path, caplog):
    rows = [{"source": f"day {i}", "target": f"Tag {i}"} for i in range(9)]
    rows[0]["target"] = rows[3]["source"] = None
    rows[5]["target"] = "  "
    write(tmp_path, rows)
    found = pairs_of(config("pairs"))
    assert found == [(f"day {i}", f"Tag {i}") for i in (1, 2, 4, 6, 7, 8)]
    assert hub.left_out_rows(config("pairs")) == {"3 rows of train": "a cell is empty"}
    assert "3 rows of train have an empty cell" in caplog.text


def test_languages_and_their_order_are_chosen(config, tmp_path):
    rows = [{"translation": {"en": f"day {i}", "de": f"Tag {i}", "fr": None}} for i in range(4)]
    rows[0] = {"translation": None}  # the first row has no languages
    rows[3]["translation"]["fr"] = "jour"
    write(tmp_path, rows)
    chosen = config("pairs", fields=["de", "en"])
    assert pairs_of(chosen) == [(f"Tag {i}", f"day {i}") for i in (1, 2, 3)]
    assert pairs_of(config("pairs", fields=["fr", "translation.en"])) == [("jour", "day 3")]
    for fields in ([], ["translation"], ["de"], ["de", "it"]):
        with pytest.raises(UserError, match=r"translation\.fr.* set data\.fields to 2"):
            export(config("pairs", fields=fields))


def test_any_two_columns_are_pairs(config, tmp_path):
    write(tmp_path, [{"id": i, "answer": f"a{i}", "question": f"q{i}", "n": [i]} for i in range(3)])
    chosen = config("pairs", fields=["question", "answer"])
    assert pairs_of(chosen) == [("q0", "a0"), ("q1", "a1"), ("q2", "a2")]
    with pytest.raises(UserError, match=r"column n of the train split holds a list; .*reads text"):
        export(config("pairs", fields=["question", "n"]))
    with pytest.raises(UserError, match=r"column id of the train split holds a int; .*reads text"):
        export(config("text", fields=["id"]))


def test_texts_that_are_null_are_left_out(config, tmp_path):
    write(tmp_path, [{"text": "one"}, {"text": None}, {"text": "two"}])
    folder = export(config("text"))
    assert (folder / "train.txt").read_text() == "one<|endoftext|>two"
    assert hub.left_out_rows(config("text")) == {"1 rows of train": "a cell is empty"}


def encoded(image, **options):
    content = BytesIO()
    image.save(content, "PNG", **options)
    return {"bytes": content.getvalue(), "path": None}


def write_pictures(tmp_path, cells, labels):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    table = datasets.Dataset.from_dict({"image": cells, "label": labels}, features)
    table.to_parquet(str(tmp_path / "set" / "train.parquet"))


def test_pictures_are_decoded_by_the_same_rule(config, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 3
    half = np.zeros((SIDE, SIDE), np.uint8)
    half[0] = 200
    cells = [
        encoded(Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))),
        encoded(Image.fromarray(np.full((SIDE, SIDE), 32896, np.uint16))),
        encoded(Image.fromarray(half), exif=turned.tobytes()),
        None,
        encoded(Image.new("L", (SIDE, SIDE), 9)),
    ]
    write_pictures(tmp_path, cells, [0, 1, 0, 1, None])
    with np.load(export(config("images"))) as stored:
        found, labels = stored["x_train"], stored["y_train"]
    assert found.shape == (3, SIDE, SIDE, 3) and labels.tolist() == [0, 1, 0]
    assert (found[0] == 255).all() and (found[1] == 128).all()
    assert (found[2, -1] == 200).all() and (found[2, 0] == 0).all()
    assert hub.left_out_rows(config("images")) == {"2 rows of train": "a cell is empty"}


def test_damaged_pictures_stop_or_are_left_out(config, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    cells = [encoded(Image.fromarray(noise)) for _ in range(24)]
    cells[5]["bytes"], cells[7]["bytes"] = cells[5]["bytes"][:60], b"no picture"
    write_pictures(tmp_path, cells, [i % 2 for i in range(24)])
    message = r"image 5 of train cannot be read .* and 1 more; .*data\.on_bad_file=skip"
    with pytest.raises(UserError, match=message):
        export(config("images"))
    facts = data.prepare_data(config("images", on_bad_file="skip", held_out=0.2))
    assert sum(facts.sample_counts.values()) == 22
    assert facts.left_out == {"2 images of train": "damaged"}
    with pytest.raises(UserError, match=message):  # a record of left-out pictures is not reused
        data.prepare_data(config("images"))


def test_pictures_of_two_sizes_are_refused(config, tmp_path):
    cells = [encoded(Image.new("L", (side, side))) for side in (4, 5)]
    write_pictures(tmp_path, cells, [0, 1])
    with pytest.raises(UserError, match=r"of the shapes \(4, 4, 1\), \(5, 5, 1\)"):
        export(config("images"))


def test_rows_of_numbers_are_pictures_too(config, tmp_path):
    write(tmp_path, [{"image": [[i, 255], [0, 7]], "label": i} for i in range(3)])
    with np.load(export(config("images"))) as stored:
        assert stored["x_train"][:, 0, 0, 0].tolist() == [0, 1, 2]
    write(tmp_path, [{"image": [[1, 255], [0]], "label": 0}])
    with pytest.raises(UserError, match=r"image 0 of train is not an array"):
        export(config("images"))
