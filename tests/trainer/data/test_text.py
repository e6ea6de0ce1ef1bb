"""Text: every token once, separate documents, and the cuts between splits."""

import numpy as np
import pytest
import tokenizers

from trainer import data
from trainer.config.train import DataConfig, UserError
from trainer.data import files as source
from trainer.data import text as reader
from trainer.data.tokenizer import Tokenizer

PLAY = (source.locate_data(DataConfig(path="bundled:shakespeare")) / "test.txt").read_text()[
    :30_000
]


@pytest.fixture
def corpus(tmp_path):
    """Return a function that writes a folder of text files and returns its config."""

    def write(seq_len=16, vocab_size=300, path="corpus", **contents):
        for name, content in contents.items():
            file = tmp_path / "corpus" / f"{name.replace('__', '/')}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return DataConfig(
            path=str(tmp_path / path),
            seq_len=seq_len,
            vocab_size=vocab_size,
            cache=str(tmp_path / "cache"),
        )

    return write


def targets_of(dataset):
    """Return all targets of a split in evaluation, in order."""
    samples = [dataset.sample(i, None) for i in range(len(dataset))]
    return np.concatenate([s["targets"][s["targets"] != -100] for s in samples])


def documents_of(config, split):
    """Return the documents of a split, separated at their end tokens."""
    tokenizer = data.open_tokenizer(config)
    targets = targets_of(data.open_split(config, split))
    pieces = np.split(targets, np.flatnonzero(targets == tokenizer.eot_id))
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize("seq_len", [1, 7, 64])
def test_evaluation_predicts_every_token_once(corpus, monkeypatch, seq_len):
    monkeypatch.setattr(reader, "PIECE", 1000)  # tokenised in several pieces
    text = "Häuser 🙂\r\n" + PLAY[:3000]
    config = corpus(seq_len, train=PLAY, valid=text, test="x")
    facts = data.prepare_data(config)
    dataset = data.open_split(config, "valid")
    assert documents_of(config, "valid") == [text]
    assert len(targets_of(dataset)) == dataset.targets
    assert dataset.characters == len(text)
    assert len(dataset) == facts.sample_counts["valid"] == -(-dataset.targets // seq_len)
    assert data.open_tokenizer(config).vocab_size == facts.vocab_size == 300


def test_a_split_shorter_than_a_window_is_padded(corpus):
    config = corpus(50, train=PLAY, valid="Out, out!", test="x")
    data.prepare_data(config)
    dataset, tokenizer = data.open_split(config, "valid"), data.open_tokenizer(config)
    ids = tokenizer.encode("Out, out!")
    assert len(dataset) == 1
    sample = dataset.sample(0, None)
    padding = 50 - len(ids)
    assert sample["tokens"].tolist() == [tokenizer.eot_id, *ids[:-1], *[tokenizer.pad_id] * padding]
    assert sample["targets"].tolist() == [*ids, *[-100] * padding]


def test_training_windows_move_by_one_offset_an_epoch(corpus):
    config = corpus(32, train=PLAY[:6000], valid="x", test="x")
    data.prepare_data(config)
    dataset = data.open_split(config, "train")
    tokenizer = data.open_tokenizer(config)
    stream = np.array([tokenizer.eot_id, *tokenizer.encode(PLAY[:6000])])
    offsets = set()
    for seed in range(8):
        starts = []
        for i in range(len(dataset)):
            sample = dataset.sample(i, seed)
            window = np.append(sample["tokens"], sample["targets"][-1])
            assert (sample["tokens"][1:] == sample["targets"][:-1]).all()
            near = range(max(0, i * 32 - 32), min(i * 32 + 32, len(stream) - 32))
            starts.append([s for s in near if (stream[s : s + 33] == window).all()])
        fit = set.intersection(*({s - i * 32 for s in at} for i, at in enumerate(starts[:-2])))
        assert len(fit) == 1 and 0 <= min(fit) < 32  # one offset for the whole epoch
        assert len(stream) - 33 in starts[-1]  # the last window ends where the text ends
        offsets |= fit
    assert len(offsets) > 4


def test_documents_start_with_the_end_token_of_the_previous_one(corpus):
    config = corpus(8, train=PLAY + "<|endoftext|>" + PLAY, valid="one<|endoftext|>two", test="x")
    data.prepare_data(config)
    tokenizer = data.open_tokenizer(config)
    one, two = tokenizer.encode("one"), tokenizer.encode("two")
    expected = [*one, tokenizer.eot_id, *two]
    assert targets_of(data.open_split(config, "valid")).tolist() == expected
    assert documents_of(config, "valid") == ["one", "two"]
    assert data.open_split(config, "valid").characters == 6


def test_documents_and_positions_of_a_micro_batch(corpus):
    config = corpus(8, train=PLAY, valid="x", test="x")
    data.prepare_data(config)
    dataset, eot = data.open_split(config, "train"), data.open_tokenizer(config).eot_id
    rows = [[5, 6, eot, 7, eot, 8, 9, 10], [eot, 5, 6, 7, 8, 9, 10, 11]]
    samples = [{"tokens": np.array(row), "targets": np.array(row)} for row in rows]
    batch = dataset.collate(samples)
    assert batch["documents"].tolist() == [[0, 0, 1, 1, 2, 2, 2, 2], [0] * 8]
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 0, 1, 2, 3], list(range(8))]
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int64)}
    assert set(dataset.collate(samples[1:])) == {"tokens", "targets"}  # no boundary inside


def test_one_file_gives_its_end_to_valid_and_test(corpus):
    config = corpus(path="corpus/all.txt", all=PLAY)
    data.prepare_data(config)
    parts = [documents_of(config, split) for split in ("train", "valid", "test")]
    assert "".join(part for split in parts for part in split) == PLAY
    sizes = [len("".join(split)) / len(PLAY) for split in parts]
    assert sizes == pytest.approx([0.9, 0.05, 0.05], abs=0.01)
    assert all("".join(split).endswith("\n") for split in parts[:2])  # whole lines


def test_a_text_without_lines_is_cut_between_characters(corpus):
    text = "日本語" * 3001
    config = corpus(vocab_size=270, path="corpus/all.txt", all=text)
    data.prepare_data(config)
    splits = [documents_of(config, split) for split in ("train", "valid", "test")]
    assert "".join(part for split in splits for part in split) == text


def test_an_unsplit_folder_is_one_document_a_file(corpus):
    config = corpus(a=PLAY[:9000], b=PLAY[9000:18000], sub__c=PLAY[18000:])
    data.prepare_data(config)
    train = documents_of(config, "train")
    assert train[:2] == [PLAY[:9000], PLAY[9000:18000]]
    rest = [part for split in ("valid", "test") for part in documents_of(config, split)]
    assert "".join([*train, *rest]) == PLAY


def test_split_folders_and_other_spellings(corpus):
    config = corpus(
        train__b=PLAY[500:], train__a=PLAY[:500], validation="valid", test__0="te", test__1="st"
    )
    data.prepare_data(config)
    assert documents_of(config, "train") == [PLAY[:500], PLAY[500:]]
    assert documents_of(config, "valid") == ["valid"]
    assert documents_of(config, "test") == ["te", "st"]


def test_only_the_split_that_is_missing_is_held_out(corpus):
    config = corpus(train=PLAY, valid="valid")
    data.prepare_data(config)
    assert documents_of(config, "valid") == ["valid"]
    assert "".join(documents_of(config, "train") + documents_of(config, "test")) == PLAY


@pytest.mark.parametrize("piece", [100, 1000])
@pytest.mark.parametrize("block", [7, 64])
def test_pieces_change_neither_text_nor_tokens(corpus, monkeypatch, piece, block):
    blank = "".join("so" + "\n" * (3 + i % 7) for i in range(90))  # cuts fall into white space
    odd = "Häuser 🙂 \r\n\n  it's"
    text = "<|endoftext|>".join([PLAY[:2000], odd, "", blank, PLAY[2000:4000]])
    config = corpus(train=text)
    tokenizer = Tokenizer.train([PLAY, blank], 400)
    monkeypatch.setattr(reader, "PIECE", piece)
    monkeypatch.setattr(source, "BLOCK", block)
    path = source.locate_data(config) / "train.txt"
    part = source.FilePart(path, 0, path.stat().st_size)
    documents: list[list[str]] = []
    for begins, found in reader.document_pieces(part, "<|endoftext|>"):
        assert 0 < len(found) <= piece
        documents = [*documents, []] if begins else documents
        documents[-1].append(found)
    expected = [document for document in text.split("<|endoftext|>") if document]
    assert ["".join(found) for found in documents] == expected
    for found, whole in zip(documents, expected, strict=True):
        ids = [i for piece_ids in tokenizer.encode_batch(found) for i in piece_ids]
        assert ids == tokenizer.encode(whole)


@pytest.mark.parametrize("block", range(5, 18))
def test_separators_between_blocks_are_found(corpus, monkeypatch, block):
    """Also find them if a piece is full and has no white space to be cut at."""
    documents = ["x" * length for length in range(85, 115)]
    config = corpus(train="<|endoftext|>".join(documents))
    monkeypatch.setattr(reader, "PIECE", 100)
    monkeypatch.setattr(source, "BLOCK", block)
    path = source.locate_data(config) / "train.txt"
    part = source.FilePart(path, 0, path.stat().st_size)
    found = list(reader.document_pieces(part, "<|endoftext|>"))
    assert sum(begins for begins, _ in found) == len(documents)
    assert "".join(text for _, text in found) == "".join(documents)


def test_a_byte_order_mark_is_not_text(corpus):
    config = corpus(train=PLAY, valid=b"\xef\xbb\xbfHail", test="x")
    data.prepare_data(config)
    assert documents_of(config, "valid") == ["Hail"]


def test_an_own_tokenizer_and_its_changes(corpus, tmp_path):
    config = corpus(train=PLAY, valid="x y", test="x y")
    data.prepare_data(config)
    config.tokenizer = str(tmp_path / "own.json")
    Tokenizer.train([PLAY], 350).save(config.tokenizer)
    assert data.prepare_data(config).vocab_size == 350
    Tokenizer.train([PLAY], 360).save(config.tokenizer)
    assert data.prepare_data(config).vocab_size == 360


def test_a_document_begins_with_the_bos_of_the_model(corpus, tmp_path):
    config = corpus(5, train="a b<|endoftext|>a b", valid="b", test="b")
    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2, "<s>": 3, "</s>": 4}, "?")
    own = tokenizers.Tokenizer(words)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.add_special_tokens(["<s>", "</s>"])
    config.tokenizer = f"{config.path}/tokenizer.json"
    own.save(config.tokenizer)
    data.prepare_data(config)
    plain = data.data_fingerprint(config)
    settings = '{"add_bos_token": true, "bos_token": "<s>"}'
    (tmp_path / "corpus/tokenizer_config.json").write_text(settings)
    data.prepare_data(config)
    assert data.data_fingerprint(config) != plain
    dataset = data.open_split(config, "train")
    batch = dataset.collate([dataset.sample(0, None)])
    assert batch["tokens"][0].tolist() == [4, 3, 0, 1, 4]
    assert batch["targets"][0].tolist() == [3, 0, 1, 4, 3]
    assert batch["positions"][0].tolist() == [0, 0, 1, 2, 3]


def test_a_large_vocabulary_takes_four_bytes(corpus):
    config = corpus(1, train="a b a", valid="b", test="b")
    words = tokenizers.models.WordLevel({"a": 0, "b": 70_000, "?": 1, "</s>": 2}, unk_token="?")
    own = tokenizers.Tokenizer(words)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config.tokenizer = f"{config.path}/own.json"
    own.add_special_tokens(["</s>"])
    own.save(config.tokenizer)
    assert data.prepare_data(config).vocab_size == 70_001
    assert targets_of(data.open_split(config, "train")).tolist() == [0, 70_000, 0]


MISTAKES = [
    ({"train": PLAY, "seq_len": 99_999}, r"data\.seq_len=99999: .* holds \d+ tokens"),
    ({"train": PLAY, "valid": "", "test": "x"}, r"valid\.txt is empty"),
    ({"train": PLAY, "valid": "\ufeff", "test": "x"}, r"valid split holds no text"),
    ({"train": PLAY.encode() + b"caf\xe9", "test": "x"}, r"train.txt is not UTF-8 at byte 30003"),
    ({"valid": PLAY, "test": PLAY}, r"has test, valid but no train split; add train\.txt"),
    ({"train": "x\n", "vocab_size": 258}, r"data\.held_out=0\.1: none of the 2 bytes"),
    ({"train": PLAY, "vocab_size": 20000}, r"data\.vocab_size=20000: .* set data\.vocab_size=\d+"),
]


@pytest.mark.parametrize("given, message", MISTAKES)
def test_mistakes(corpus, given, message):
    config = corpus(**given)
    with pytest.raises(UserError, match=message):
        data.prepare_data(config)


def test_the_window_that_the_message_names_works(corpus):
    config = corpus(5000, 258, train=PLAY[:900], valid="x", test="x")
    with pytest.raises(UserError) as error:
        data.prepare_data(config)
    config.seq_len = int(str(error.value).split("set data.seq_len=")[1].split()[0])
    data.prepare_data(config)
    dataset = data.open_split(config, "train")
    assert len(dataset) == 1
    assert (dataset.sample(0, 3)["targets"] != -100).all()
    config.seq_len += 1
    with pytest.raises(UserError):
        data.prepare_data(config)


def test_the_byte_that_is_no_utf8_is_named_in_any_block(corpus, monkeypatch):
    monkeypatch.setattr(source, "BLOCK", 5)
    config = corpus(train=b"a" + "äöü".encode() * 7 + b"\xff", valid="x", test="x")
    with pytest.raises(UserError, match=r"byte 43 \(0xff\)"):
        data.prepare_data(config)
