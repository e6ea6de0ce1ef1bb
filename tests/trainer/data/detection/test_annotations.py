"""COCO, Pascal VOC and YOLO files give the same boxes; bad ones get one message or a count."""

import json

import numpy as np
import pytest
from boxed import boxed_data, write_coco, write_picture
from PIL import Image

from parallel.errors import UserError
from trainer.data import open_split, prepare_data

COUNTS = {"train": 4, "valid": 2, "test": 2}
CORNERS = np.array([[4, 2, 12, 12], [14, 2, 22, 12]], np.float32)
VOC = """<annotation><filename>{name}</filename><size><width>40</width><height>20</height></size>
<object><name>dot</name><difficult>0</difficult>
<bndbox><xmin>5</xmin><ymin>3</ymin><xmax>12</xmax><ymax>12</ymax></bndbox></object>
<object><name>bar</name>{difficult}
<bndbox><xmin>15</xmin><ymin>3</ymin><xmax>22</xmax><ymax>12</ymax></bndbox></object></annotation>"""


def write_voc(folder, difficult=""):
    for split, count in COUNTS.items():
        for i in range(count):
            name = f"{split}-{i}.png"
            write_picture(folder / split / name, i)
            text = VOC.format(name=name, difficult=difficult)
            (folder / split / f"{split}-{i}.xml").write_text(text)


def write_yolo(folder, names="names: {0: dot, 1: bar}"):
    for split, count in COUNTS.items():
        (folder / "labels" / split).mkdir(parents=True)
        for i in range(count):
            write_picture(folder / "images" / split / f"{i}.png", i)
            lines = "0 0.2 0.35 0.2 0.5\n1 0.45 0.35 0.2 0.5\n"
            (folder / "labels" / split / f"{i}.txt").write_text(lines)
    (folder / "data.yaml").write_text(names)


WRITERS = {"coco": lambda f: write_coco(f, COUNTS), "voc": write_voc, "yolo": write_yolo}


@pytest.mark.parametrize("kind", WRITERS)
def test_each_format_gives_the_same_boxes(tmp_path, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS[kind](folder)
    facts = prepare_data(boxed_data(folder))
    assert facts.sample_counts == COUNTS and sorted(facts.class_names) == ["bar", "dot"]
    for split in COUNTS:
        dataset = open_split(boxed_data(folder), split)
        truth = dataset.truth(1)
        assert [dataset.class_names[i] for i in truth.classes_N] == ["dot", "bar"]
        assert truth.corners_N4 == pytest.approx(CORNERS, abs=1e-4)
        assert truth.areas_N == pytest.approx([80, 80], abs=1e-3) and not truth.crowd_N.any()


def test_a_picture_is_letterboxed_with_its_boxes(tmp_path):
    folder = tmp_path / "data"
    write_coco(folder, COUNTS)
    prepare_data(boxed_data(folder))
    dataset = open_split(boxed_data(folder), "valid")
    pixels, boxes = dataset.picture(0, None)  # 40 × 20 in a square of 16: 16 × 8, 4 below the top
    assert pixels.shape == (16, 16, 3)
    assert (pixels[:4] == 114).all() and (pixels[12:] == 114).all() and pixels[5].std() > 10
    assert boxes.corners_N4 == pytest.approx(CORNERS * 0.4 + np.array([0, 4, 0, 4]))
    sides = boxes.corners_N4 / 16
    assert dataset.letterbox(0).restore_corners(sides) == pytest.approx(CORNERS, abs=1e-4)


def test_missing_splits_are_held_out_and_differ(tmp_path):
    folder = tmp_path / "data"
    write_coco(folder, {"train": 8})
    facts = prepare_data(boxed_data(folder))
    assert facts.sample_counts == {"train": 4, "valid": 2, "test": 2}
    one_file = boxed_data(folder / "train.json", cache=str(tmp_path / "other"))
    assert prepare_data(one_file).sample_counts == facts.sample_counts


def edit_coco(folder, change):
    path = folder / "train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def no_name(content):
    content["categories"][1].pop("name")


def huge(content):
    content["annotations"][0]["bbox"] = [-5, 2, 30, 10]


def flat(content):
    content["annotations"][0]["bbox"] = [4, 2, 0, 10]
    content["annotations"][2]["bbox"] = [90, 2, 5, 10]


def stray(content):
    content["annotations"][0]["image_id"] = 999


def empty(content):
    content["annotations"] = content["annotations"][2:]


def repeated(content):
    content["annotations"].append(content["annotations"][0] | {"id": 99})


COUNTED = {
    "1 boxes are listed twice in their picture and are counted once": repeated,
    "1 categories have no name and are called after their number": no_name,
    "1 boxes reach over the edge of their picture and are clipped": huge,
    "2 boxes are outside their picture, or have no area, and are left out": flat,
    "1 boxes are of pictures that are not listed, and left out": stray,
    "1 pictures have no box and are background": empty,
}


@pytest.mark.parametrize("note", COUNTED)
def test_odd_boxes_are_counted(tmp_path, note):
    folder = tmp_path / "data"
    write_coco(folder, {"train": 4})
    edit_coco(folder, COUNTED[note])
    assert prepare_data(boxed_data(folder)).notes == (note,)


def test_a_crowd_is_kept_as_one_and_difficult_objects_too(tmp_path):
    write_coco(tmp_path / "coco", COUNTS, iscrowd=1)
    (tmp_path / "voc").mkdir()
    write_voc(tmp_path / "voc", "<difficult>1</difficult>")
    for name, crowd in {"coco": [True, True], "voc": [False, True]}.items():
        facts = prepare_data(boxed_data(tmp_path / name))
        assert bool(facts.notes) == (name == "voc")
        assert open_split(boxed_data(tmp_path / name), "test").truth(0).crowd_N.tolist() == crowd


def refused(folder, **keys):
    with pytest.raises(UserError) as raised:
        prepare_data(boxed_data(folder, **keys))
    (message,) = raised.value.problems
    return message


def test_missing_damaged_and_other_pictures_stop_or_are_left_out(tmp_path):
    folder = tmp_path / "data"
    write_coco(folder, {"train": 6, "valid": 1, "test": 1})
    (folder / "images/train-0.png").unlink()
    (folder / "images/train-1.png").write_bytes(b"no picture")
    write_picture(folder / "images/train-2.png", size=(20, 40))
    message = refused(folder)
    assert "3 of 8 pictures cannot be read: " in message and "no such file" in message
    assert "20 × 40 pixels, annotated as 40 × 20" in message and "on_bad_file=skip" in message
    facts = prepare_data(boxed_data(folder, on_bad_file="skip"))
    assert sum(facts.sample_counts.values()) == 5
    assert sum(why.startswith("damaged") for why in facts.left_out.values()) == 3


def test_mixtures_and_empty_folders_are_refused(tmp_path):
    folder = tmp_path / "data"
    write_coco(folder, COUNTS)
    write_voc(folder)
    message = refused(folder)
    assert "COCO's annotations (test.json, train.json, valid.json) and Pascal VOC's" in message
    write_picture(tmp_path / "bare" / "a.png")
    assert "holds no boxes" in refused(tmp_path / "bare")


def test_a_class_that_train_lacks_is_refused(tmp_path):
    folder = tmp_path / "data"
    write_coco(folder, COUNTS)
    edit_coco(folder, lambda c: (c["categories"].pop(), c.update(annotations=c["annotations"][:1])))
    assert "bar of the test split is not a class of the train split" in refused(folder)


def test_a_bad_line_is_named(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_yolo(folder)
    (folder / "labels/train/2.txt").write_text("0 0.2 0.35 0.2 0.5\n0 0.1 0.2\n")
    assert "labels/train/2.txt:2 is not a line of a class number and x, y" in refused(folder)


def test_unnamed_classes_and_pictures_without_text_are_counted(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_yolo(folder, names="nc: 2")
    (folder / "labels/valid/1.txt").unlink()
    facts = prepare_data(boxed_data(folder))
    assert facts.class_names == ("class 0", "class 1")
    assert facts.notes == (
        "1 pictures have no text file and are background",
        "2 classes have no name and are called after their number",
        "1 pictures have no box and are background",
    )


@pytest.mark.parametrize("content", ["{", "[1]", '{"images": [{}], "annotations": []}'])
def test_damaged_annotations_are_refused(tmp_path, content):
    folder = tmp_path / "data"
    write_picture(folder / "a.png")
    (folder / "train.json").write_text(content)
    assert "train.json" in refused(folder) or "holds no boxes" in refused(folder)


def same_image_id(content):
    content["images"][1]["id"] = content["images"][0]["id"]


def same_category_id(content):
    content["categories"][1]["id"] = content["categories"][0]["id"]


def same_file(content):
    content["images"][1]["file_name"] = content["images"][0]["file_name"]


def crowd_in_words(content):
    content["annotations"][0]["iscrowd"] = "no"


def box_as_text(content):
    content["annotations"][0]["bbox"] = "1234"


def empty_ids(content):
    content["annotations"][0]["category_id"] = None


def endless(content):
    content["images"][0]["width"] = float("inf")


def nothing_to_learn(content):
    for annotation in content["annotations"]:
        annotation["bbox"] = [90, 2, 5, 10]


AMBIGUOUS = {
    "entry 0 of annotations, is not written as COCO's annotations are": box_as_text,
    "an id is None": empty_ids,
    "entry 0 of images, is not": endless,
    "no picture of the train split has a box: 8 boxes are outside": nothing_to_learn,
    "has image id 0 more than once": same_image_id,
    "has category id 7 more than once": same_category_id,
    "images/train-0.png is annotated twice in the train split": same_file,
    "invalid literal for int": crowd_in_words,
}


@pytest.mark.parametrize("expected", AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, expected):
    folder = tmp_path / "data"
    write_coco(folder, {"train": 4})
    edit_coco(folder, AMBIGUOUS[expected])
    assert expected in refused(folder)


def test_areas_that_are_no_numbers_are_those_of_the_boxes(tmp_path):
    folder = tmp_path / "data"
    write_coco(folder, {"train": 4, "valid": 1, "test": 1}, area=float("nan"))
    prepare_data(boxed_data(folder))
    assert open_split(boxed_data(folder), "train").truth(0).areas_N.tolist() == [80.0, 80.0]


def test_ids_are_one_whether_text_or_number(tmp_path):
    folder = tmp_path / "data"
    write_coco(folder, {"train": 4})
    edit_coco(
        folder,
        lambda content: [image.update(id=str(image["id"])) for image in content["images"]],
    )
    assert prepare_data(boxed_data(folder)).notes == ()


def voc_lists(folder, lists):
    """All pictures in one folder, and VOC's lists of the splits."""
    folder.mkdir()
    write_voc(folder)
    for path in list(folder.glob("*/*.*")):
        place = folder / {".xml": "Annotations"}.get(path.suffix, "JPEGImages") / path.name
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
    (folder / "ImageSets/Main").mkdir(parents=True)
    for split, count in COUNTS.items():
        names = [f"{split}-{i}" for i in range(count)]
        (folder / f"ImageSets/Main/{split}.txt").write_text(lists(split, names))


def test_lists_of_other_tools_are_read_and_gaps_are_counted(tmp_path):
    voc_lists(tmp_path / "mark", lambda split, names: "\ufeff" + "  1\r\n".join([*names, ""]))
    facts = prepare_data(boxed_data(tmp_path / "mark"))
    assert facts.sample_counts == COUNTS and not facts.notes and not facts.left_out
    voc_lists(tmp_path / "gaps", lambda split, names: "\n".join([*names[1:], f"{split}-9"]))
    facts = prepare_data(boxed_data(tmp_path / "gaps", cache=str(tmp_path / "other")))
    assert "3 XML files are in no list of ImageSets/Main, and left out" in facts.notes
    assert len(facts.left_out) == 3 and facts.notes[0].startswith("3 names of the lists")


def test_lists_that_share_a_name_are_refused(tmp_path):
    voc_lists(tmp_path / "data", lambda split, names: "\n".join([*names, "train-0"]))
    assert "train-0 is in the lists of" in refused(tmp_path / "data")


def test_an_xml_file_has_the_picture_of_its_own_name(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_voc(folder)
    path = folder / "train/train-1.xml"
    path.write_text(path.read_text().replace("<filename>train-1.png", "<filename>IMG_7.jpg"))
    facts = prepare_data(boxed_data(folder))
    assert facts.sample_counts == COUNTS
    assert facts.notes == (
        "1 XML files name a picture that is not there, and have that of their own name",
    )
    path.write_text(path.read_text().replace("<name>bar</name>", "<name>bar</name><bndbox/>"))
    assert "train-1.xml is not written as Pascal VOC's" in refused(folder)
    path.write_text('<?xml version="1.0" encoding="nonsense"?><annotation/>')
    assert "train-1.xml is not an XML file" in refused(folder)


YOLO = {
    "0 12 7 4 4": "labels/train/2.txt:1 has more than 1 for x, y, width or height",
    "0 0,2 0,35 0,2 0,5": "labels/train/2.txt:1 is not a line",
    "0.5 0.2 0.35 0.2 0.5": "labels/train/2.txt:1 is not a line",
    "0 0.2 0.35 0.2 1_0": "labels/train/2.txt:1 is not a line",
}


@pytest.mark.parametrize("line", YOLO)
def test_lines_that_are_no_shares_are_refused(tmp_path, line):
    folder = tmp_path / "data"
    folder.mkdir()
    write_yolo(folder)
    (folder / "labels/train/2.txt").write_text(line)
    assert YOLO[line] in refused(folder)


def test_names_are_read_as_they_are_written_and_of_one_file(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_yolo(folder, names="names: [no, yes]")
    text = folder / "labels/train/2.txt"
    text.write_bytes(b"\xef\xbb\xbf0.0 0.2 0.35 0.2 0.5\r\n")
    (folder / "labels/train/notes.txt").write_text("0 0 0 0 0")
    facts = prepare_data(boxed_data(folder))
    assert facts.class_names == ("no", "yes") and not facts.notes
    assert facts.left_out == {"labels/train/notes.txt": "a text without a picture of its name"}
    (folder / "classes.txt").write_text("yes\nno\n")
    assert "classes.txt and data.yaml name the classes differently" in refused(folder)
    (folder / "classes.txt").unlink()
    write_picture(folder / "images/train/2.jpg")
    assert "labels/train/2.txt is of images/train/2.jpg and of" in refused(folder)


def test_what_is_written_twice_or_not_read_is_said(tmp_path):
    folder = tmp_path / "data"
    write_coco(folder, COUNTS)
    write_picture(folder / "images/more.png")
    edit_coco(folder, lambda content: content["categories"][1].update(name="dot"))
    (folder / "info.json").write_text("{}")
    for split in ("valid", "test"):
        text = (folder / f"{split}.json").read_text()
        (folder / f"{split}.json").write_text(text.replace("bar", "dot"))
    facts = prepare_data(boxed_data(folder))
    assert facts.notes == ("1 classes have the name of another one, and are one class with it",)
    assert facts.left_out.keys() == {"images/more.png", "info.json"}
    text = (folder / "train.json").read_text()
    (folder / "train.json").write_text(text.replace('"images":', '"images": [], "images":', 1))
    assert "train.json has the key 'images' twice in one object" in refused(folder)


def test_pictures_that_exif_turns_are_said(tmp_path):
    folder = tmp_path / "data"
    write_coco(folder, {"train": 4})
    exif = Image.Exif()
    for turn, message in {3: None, 6: "annotated as 40 × 20, as EXIF turns it"}.items():
        exif[0x0112] = turn
        Image.open(folder / "images/train-0.png").save(folder / "images/train-0.png", exif=exif)
        if message:
            assert message in refused(folder)
        else:
            notes = prepare_data(boxed_data(folder)).notes
            assert notes[0].startswith("1 pictures are turned by their EXIF")
