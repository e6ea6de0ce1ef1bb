"""Conversations: whole in their rows, apart from each other, and every bad line named."""

import json
from pathlib import Path

import chats
import numpy as np
import pytest

from trainer import data
from trainer.config.loss import IGNORED
from trainer.config.train import DataConfig, UserError
from trainer.data.chat_template import ChatTemplate
from trainer.data.conversations import encode_conversation, read_conversations
from trainer.data.files import FilePart
from trainer.data.packing import pack_lengths
from trainer.data.record import SIDE_FILES, copy_record

SPLITS = ("train", "valid", "test")


def talk(words: int, answers: int = 1) -> dict:
    """A conversation that grows with `words`."""
    turn = [
        {"role": "user", "content": "how " * words},
        {"role": "assistant", "content": "so " * words},
    ]
    return {"messages": turn * answers}


def corpus(folder: Path, lines=None, **values) -> DataConfig:
    """A data section over the lines of train; valid and test are short."""
    folder.mkdir(exist_ok=True)
    written = lines if lines is not None else [talk(1 + i % 7, 1 + i % 2) for i in range(20)]
    for split in SPLITS:
        of_split = written if split == "train" else [talk(2), talk(3)]
        text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in of_split)
        (folder / f"{split}.jsonl").write_text(text)
    tokenizer = chats.byte_level(folder.parent / "tokenizer")
    usual = {"seq_len": 64, "cache": str(folder.parent / "cache"), "tokenizer": str(tokenizer)}
    return DataConfig(kind="chat", path=str(folder), **usual | values)


def encoded(config: DataConfig, split: str):
    """Each conversation's ids and learned ranges, read anew."""
    template = ChatTemplate(data.open_tokenizer(config), chats.CHATML)
    path = Path(config.path) / f"{split}.jsonl"
    found = read_conversations(FilePart(path, 0, path.stat().st_size))
    return [encode_conversation(template, conversation) for conversation in found]


@pytest.mark.parametrize("pack", [True, False])
def test_each_conversation_is_learned_once_and_whole(tmp_path, pack):
    config = corpus(tmp_path / "data", pack=pack, seq_len=128)
    facts = data.prepare_data(config)
    dataset = data.open_split(config, "train")
    assert facts.splits["train"].samples == len(dataset)
    assert (len(dataset) < 20) is pack
    found = []
    for index in range(len(dataset)):
        batch = dataset.collate([dataset.sample(index, 1)])
        tokens, targets = batch["tokens"][0], batch["targets"][0]
        assert len(tokens) == 128 or not pack
        documents = batch.get("documents", np.where(tokens == tokens, 0, 0)[None])[0]
        for document in set(documents.tolist()) - {-1}:
            here = np.flatnonzero(documents == document)
            assert (np.diff(here) == 1).all()
            if "positions" in batch:
                assert batch["positions"][0][here].tolist() == list(range(len(here)))
            found.append((tokens[here].tolist(), targets[here].tolist()))
    expected = []
    for conversation in encoded(config, "train"):
        targets = [IGNORED] * (len(conversation.ids) - 1)
        for low, high in conversation.learned:
            targets[low - 1 : high - 1] = conversation.ids[low:high]
        expected.append((conversation.ids[:-1], targets))
    trim = [  # a row of one conversation has no documents: its padding belongs to it
        next(
            want
            for want in expected
            if want[0] == tokens[: len(want[0])]
            and want[1] == targets[: len(want[1])]
            and {*targets[len(want[1]) :]} <= {IGNORED}
        )
        for tokens, targets in found
    ]
    assert sorted(trim) == sorted(expected)
    assert dataset.targets == sum(t != IGNORED for _, targets in expected for t in targets)
    assert dataset.positions == sum(len(tokens) for tokens, _ in expected)


def test_a_padded_row_keeps_its_padding_apart(tmp_path):
    config = corpus(tmp_path / "data")
    data.prepare_data(config)
    dataset = data.open_split(config, "train")
    samples = [dataset.sample(index, None) for index in range(len(dataset))]
    batch = dataset.collate(samples)
    for sample, documents, targets in zip(
        samples, batch["documents"], batch["targets"], strict=True
    ):
        length = len(sample["tokens"])
        assert (documents[:length] >= 0).all() and (documents[length:] == -1).all()
        assert (targets[length:] == IGNORED).all()


def test_the_end_of_a_turn_is_learned_although_it_is_the_padding(tmp_path):
    """`<|im_end|>` is the tokenizer's pad too: targets go by position, never by id."""
    config = corpus(tmp_path / "data", seq_len=128)
    data.prepare_data(config)
    tokenizer, dataset = data.open_tokenizer(config), data.open_split(config, "train")
    assert tokenizer.pad_id == tokenizer.eot_id or tokenizer.pad_id in tokenizer.end_ids
    learned = [i for index in range(len(dataset)) for i in dataset.sample(index, None)["targets"]]
    assert learned.count(2) == 30  # of 20 conversations, half with two answers


@pytest.mark.parametrize("seed", range(5))
def test_packing_is_tight_and_deterministic(seed):
    lengths = np.random.default_rng(seed).integers(1, 100, 300)
    rows = pack_lengths(lengths, 100)
    assert sorted(item for row in rows for item in row) == list(range(300))
    assert all(lengths[row].sum() <= 100 for row in rows)
    assert len(rows) <= 1.05 * lengths.sum() / 100 + 1
    assert rows == pack_lengths(lengths, 100)
    # Each item was put into the fullest row that had room: one pass over the rows says the same.
    simple: list[list[int]] = []
    for item in np.argsort(-lengths, kind="stable"):
        room = [100 - lengths[row].sum() - lengths[item] for row in simple]
        fits = [left for left in room if left >= 0]
        if fits:
            simple[room.index(min(fits))].append(item)
        else:
            simple.append([item])
    ours, theirs = ([lengths[row].sum() for row in found] for found in (rows, simple))
    assert sorted(ours) == sorted(theirs)


def test_long_conversations_are_cut_and_those_without_a_target_left_out(tmp_path):
    silent = {"messages": [{"role": "user", "content": "anybody?"}]}
    late = {"prompt": "how " * 80, "completion": "late"}
    config = corpus(tmp_path / "data", [talk(2), silent, late, talk(3, 9), talk(1)])
    facts = data.prepare_data(config)
    assert facts.splits["train"].left_out == {
        "no answer to learn": 1,
        "no answer within data.seq_len=64": 1,
    }
    assert "2 conversations of the train split are longer than data.seq_len=64" in facts.notes[0]
    dataset = data.open_split(config, "train")
    longest = max(len(dataset.sample(i, None)["tokens"]) for i in range(len(dataset)))
    assert longest <= 64


def test_prompt_and_completion(tmp_path):
    before = talk(1)["messages"]
    lines = [
        {"prompt": "how", "completion": "so"},
        {
            "prompt": [*before, {"role": "user", "content": "how"}],
            "completion": [{"role": "assistant", "content": "so"}],
            "id": 7,
        },
    ]
    config = corpus(tmp_path / "data", lines)
    data.prepare_data(config)
    one, two = encoded(config, "train")
    assert len(one.learned) == len(two.learned) == 1  # the answer in the prompt is not learned
    assert data.open_split(config, "train").opening(0)[-1]["content"] == "how"


BAD = {
    "{": r"line 2 of .*train\.jsonl is not JSON",
    "[]": r"line 2 of .* is empty; every line must be",
    '{"text": "x"}': r"line 2 of .* has the keys text; every line must be",
    '{"messages": []}': r"line 2 of .*: messages is empty; it must be a list of messages",
    '{"messages": ["hi"]}': r"messages\[0\] is text; it must have a role and a content",
    '{"messages": [{"role": "bot", "content": "x"}]}': r"messages\[0\]\.role='bot' must be one of "
    "system, user, assistant",
    '{"messages": [{"role": "user", "content": null}]}': r"messages\[0\]\.content is null; it must",
    '{"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}': r"calls is not sup",
    '{"prompt": 3, "completion": "x"}': r"prompt is 3; it must be a list of messages",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named(tmp_path, line):
    config = corpus(tmp_path / "data", [talk(1), line])
    with pytest.raises(UserError, match=BAD[line]):
        data.prepare_data(config)


def test_a_chat_template_is_for_chats_alone(tmp_path):
    config = corpus(tmp_path / "data", chat_template="plain")
    config.kind = "pairs"
    with pytest.raises(UserError, match=r"=plain is for data\.kind=chat, but data\.kind=pairs"):
        data.prepare_data(config)


def test_files_without_a_conversation_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.jsonl is empty"):
        data.prepare_data(corpus(tmp_path / "data", []))
    only = {"messages": [{"role": "user", "content": "anybody?"}]}
    with pytest.raises(UserError, match=r"train split holds no conversation with an answer"):
        data.prepare_data(corpus(tmp_path / "data", [only]))


def test_one_file_is_held_out_at_line_ends(tmp_path):
    config = corpus(tmp_path / "data", held_out=0.4)
    long = json.dumps({"prompt": "how", "completion": "so " * 60_000}) + "\n"
    (tmp_path / "one.jsonl").write_text(long * 6)
    config.path = str(tmp_path / "one.jsonl")
    facts = data.prepare_data(config)
    assert [facts.splits[split].samples for split in SPLITS] == [4, 1, 1]


def test_the_tokens_depend_on_the_template(tmp_path):
    config = corpus(tmp_path / "data")
    data.prepare_data(config)
    before = data.data_fingerprint(config)
    config.chat_template = "plain"
    data.prepare_data(config)
    assert data.data_fingerprint(config) != before


def test_a_record_takes_the_files_beside_the_tokenizer_along(tmp_path):
    config = corpus(tmp_path / "data")
    data.prepare_data(config)
    for folder in ("run", "copy"):
        (tmp_path / folder).mkdir()
    data.open_tokenizer(config).save(tmp_path / "run/tokenizer.json")
    copy_record(tmp_path / "run", tmp_path / "copy")
    for name in ("tokenizer.json", *SIDE_FILES[:3]):
        theirs = (Path(config.tokenizer) / name).read_bytes()
        assert (tmp_path / "copy" / name).read_bytes() == theirs
