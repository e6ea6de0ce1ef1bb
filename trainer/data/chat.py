"""Conversations: answers are learned, in rows of several whole conversations.

B rows of a micro-batch · S tokens of a row · N conversations · L tokens of a conversation
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from trainer.config.loss import IGNORED
from trainer.config.train import ConfigError, DataConfig, DataError
from trainer.data.cache import (
    Record,
    build_folder,
    load_prepared,
    prepared_folder,
    progress_bar,
)
from trainer.data.chat_template import ChatTemplate, Message, find_template
from trainer.data.conversations import Conversation, encode_conversation, read_conversations
from trainer.data.dataset import DataFacts, Dataset, Sample, SplitFacts
from trainer.data.files import FilePart, name_of, split_parts
from trainer.data.packing import pack_lengths
from trainer.data.reader import DataReader, HubFormat, HubRows, text_problems
from trainer.data.token_file import TokenFile
from trainer.data.tokenized import (
    Parts,
    find_tokenizer,
    load_tokenizer,
    prepare_tokens,
    rare_characters,
    size_of,
    source_name,
    token_dtype,
    tokenizer_record,
    tokens_folder,
)
from trainer.data.tokenizer import Tokenizer

LINES = 256  # conversations between two marks of the progress bar
SUFFIXES = (".jsonl", ".ndjson")
NO_ANSWER = "no answer to learn"


def prepare_splits(config: DataConfig, root: Path, progress: bool = False) -> DataFacts:
    """Tokenise the splits into `data.cache`, unless already done; raises UserError."""

    def iter_texts(part: FilePart) -> Iterator[str]:
        for talk in read_conversations(part):
            yield from (f"{message['role']}\n{message['content']}" for message in talk.messages)

    def write_folder(parts: Parts, folder: Path) -> Record:
        return _write_splits(config, parts, folder, progress)

    found = prepare_tokens(
        config, root, SUFFIXES, iter_texts, write_folder, progress, partial(_ingredients, config)
    )
    rows = _pack_splits(config, found.folder, found.record)
    splits, notes = {}, list[str]()
    for split, entry in found.record["splits"].items():
        talks = Conversations(found.folder, found.record, split, config.seq_len)
        if cut := int((talks.full_lengths > config.seq_len).sum()):
            longer = f"longer than data.seq_len={config.seq_len}"
            notes.append(f"{cut:,} conversations of the {split} split are {longer}, and cut")
        lost = {f"no answer within data.seq_len={config.seq_len}": len(talks) - len(talks.kept)}
        reasons = {NO_ANSWER: entry["no_answer"]} | lost
        splits[split] = SplitFacts(
            sources=tuple(source_name(part, root) for part in found.parts[split]),
            samples=len(rows[split]) - 1,
            tokens=int(talks.full_lengths.sum()) + len(talks),
            characters=entry["characters"],
            left_out={reason: count for reason, count in reasons.items() if count},
        )
        if not splits[split].samples:
            raise ConfigError(
                f"data.seq_len={config.seq_len}: no conversation of the {split} split has an "
                "answer that begins within it; set a larger data.seq_len"
            )
    if found.record["unended"]:
        notes.append(
            f"{found.record['unended']:,} answers hold no end token of the tokenizer: a model that "
            "learns them does not end its own"
        )
    return found.data_facts(splits, notes)


def open_split(config: DataConfig, root: Path, split: str) -> "Chats":
    """Return a prepared split."""
    parts = split_parts(config, root, SUFFIXES)
    folder = tokens_folder(config, parts, _ingredients(config, parts))
    talks = Conversations(folder, load_prepared(folder), split, config.seq_len)
    packed = _rows_folder(config, folder)
    load_prepared(packed)
    rows = np.load(packed / f"{split}.rows.npy"), np.load(packed / f"{split}.items.npy")
    return Chats(talks, rows, config.seq_len if config.pack else 0)


def open_tokenizer(config: DataConfig, root: Path) -> Tokenizer:
    """Return the tokenizer of the conversations, with their chat template beside it."""
    tokenizer = load_tokenizer(config, root, SUFFIXES)
    tokenizer.files = tokenizer.files.with_template(find_template(config, tokenizer))
    return tokenizer


class Conversations:
    """The prepared conversations of a split; those over `seq_len` targets are cut at their end."""

    def __init__(self, folder: Path, record: Record, split: str, seq_len: int):
        self.pad_id = record["pad_id"]
        self._seq_len, self._text = seq_len, folder / f"{split}.jsonl"
        # Starts of ids, learned ranges and text (N + 1, 3); the ranges, within their ids (…, 2).
        self._starts: np.ndarray = np.load(folder / f"{split}.npy")
        self._learned: np.ndarray = np.load(folder / f"{split}.learned.npy")
        count, size = int(self._starts[-1, 0]), record["vocab_size"]
        self._ids = TokenFile(folder / f"{split}.bin", record["dtype"], count, size)
        self.full_lengths = np.diff(self._starts[:, 0]) - 1  # tokens that predict the next one
        self.lengths = np.minimum(self.full_lengths, seq_len)
        first_N = self._learned[self._starts[:-1, 1], 0]
        self.kept = np.flatnonzero(first_N <= seq_len)  # those with a target

    def __len__(self) -> int:
        return len(self.lengths)

    def count_targets(self) -> int:
        """Return the number of targets of the conversations that are kept."""
        low, high = np.minimum(self._learned, self._seq_len + 1).T
        per_range = high - np.maximum(low, 1)
        sums = np.concatenate([[0], np.cumsum(np.maximum(per_range, 0))])
        per_talk = np.diff(sums[self._starts[:, 1]])
        return int(per_talk[self.kept].sum())

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens (L,) and targets (L,) of a conversation."""
        (start, first, _), (end, last, _) = self._starts[number : number + 2]
        ids = self._ids.read(int(start), min(int(end), int(start) + self._seq_len + 1))
        targets_L = np.full(len(ids) - 1, IGNORED, np.int64)
        for low, high in self._learned[first:last].tolist():
            targets_L[max(low - 1, 0) : high - 1] = ids[max(low, 1) : high]
        return ids[:-1], targets_L

    def messages(self, number: int) -> list[Message]:
        """Return the messages of a conversation before its first answer to learn."""
        start, end = self._starts[number : number + 2, 2].tolist()
        with self._text.open("rb") as file:
            file.seek(start)
            found: list[Message] = json.loads(file.read(end - start))
        return found


class Chats(Dataset):
    """A split of conversations; sample i is row i of `rows`: starts (rows + 1,), and items.

    `padded_length`: every row is padded to so many tokens; 0 = to the longest of its micro-batch.
    """

    def __init__(
        self, talks: Conversations, rows: tuple[np.ndarray, np.ndarray], padded_length: int
    ):
        self.targets = talks.count_targets()
        self.positions = int(talks.lengths[talks.kept].sum())
        self._talks, self._padded_length = talks, padded_length
        self._starts, self._items = rows

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _row(self, index: int) -> list[int]:
        found: list[int] = self._items[self._starts[index] : self._starts[index + 1]].tolist()
        return found

    def sample(self, index: int, seed: int | None) -> Sample:
        """Return tokens, targets, documents and positions (S,) int64 of a row."""
        found = [self._talks.read(number) for number in self._row(index)]
        lengths = [len(tokens_L) for tokens_L, _ in found]
        return {
            "tokens": np.concatenate([tokens_L for tokens_L, _ in found]),
            "targets": np.concatenate([targets_L for _, targets_L in found]),
            "documents": np.repeat(np.arange(len(found)), lengths),
            "positions": np.concatenate([np.arange(length) for length in lengths]),
        }

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Return tokens and targets (B, S) int64, padded at the end.

        If a row has several conversations: also documents, numbered from 0 in each row, and
        positions, counted from the start of the conversation (B, S).
        """
        length = self._padded_length or max(len(sample["tokens"]) for sample in samples)
        fill = {"tokens": self._talks.pad_id, "targets": IGNORED}
        if any(sample["documents"][-1] for sample in samples):
            fill |= {"documents": -1, "positions": 0}
        batch = {}
        for key, value in fill.items():
            batch[key] = np.full((len(samples), length), value, np.int64)
            for row, sample in zip(batch[key], samples, strict=True):
                row[: len(sample[key])] = sample[key]
        return batch

    def sample_lengths(self) -> np.ndarray | None:
        """Return each sample's length (len,), unless all are padded to the same one."""
        if self._padded_length:
            return None
        lengths: np.ndarray = self._talks.lengths[self._items]
        return lengths

    def opening(self, index: int) -> list[Message]:
        """Return the messages before the first answer of a sample."""
        return self._talks.messages(self._row(index)[0])


def _ingredients(config: DataConfig, parts: Parts) -> list[str]:
    """Return what the tokens depend on besides files and tokenizer: the chat template."""
    return [find_template(config, Tokenizer.load(find_tokenizer(config, parts)))]


def _rows_folder(config: DataConfig, tokens: Path) -> Path:
    return prepared_folder(
        config, f"{name_of(config)}-rows", [tokens.name, config.seq_len, config.pack]
    )


def _pack_splits(config: DataConfig, tokens: Path, record: Record) -> dict[str, np.ndarray]:
    """Write the rows of each split into `data.cache`, unless already done; return their starts."""

    def write_folder(folder: Path) -> Record:
        for split in record["splits"]:
            talks = Conversations(tokens, record, split, config.seq_len)
            lengths = talks.lengths[talks.kept]
            alone = [[item] for item in range(len(lengths))]
            rows = pack_lengths(lengths, config.seq_len) if config.pack else alone
            starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
            items = np.array([item for row in rows for item in row], np.int64)
            np.save(folder / f"{split}.rows.npy", starts)
            np.save(folder / f"{split}.items.npy", talks.kept[items])
        return {}

    folder = _rows_folder(config, tokens)
    build_folder(folder, write_folder)
    return {split: np.load(folder / f"{split}.rows.npy") for split in record["splits"]}


def _write_splits(config: DataConfig, parts: Parts, folder: Path, progress: bool) -> Record:
    tokenizer = Tokenizer.load(find_tokenizer(config, parts))
    template = ChatTemplate(tokenizer, find_template(config, tokenizer))
    total, splits, unended = sum(map(size_of, parts.values())), {}, 0
    with progress_bar("Tokenising", total, progress) as advance:
        for split, of_split in parts.items():
            found = (talk for part in of_split for talk in read_conversations(part))
            written = _SplitWriter(tokenizer, template, folder, split)
            splits[split] = written.write(found, advance)
            unended += splits[split].pop("unended")
            if not splits[split]["conversations"]:
                raise DataError(
                    f"data.path={config.path}: the {split} split holds no conversation with an "
                    f"answer to learn; {splits[split]['no_answer']} have none"
                )
    return tokenizer_record(tokenizer) | {"splits": splits, "unended": unended}


class _SplitWriter:
    """The prepared files of one split, and what is counted while they are written."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, folder: Path, split: str):
        self._template, self._path = template, folder / split
        self._dtype, self._ends = token_dtype(tokenizer), set(tokenizer.end_ids)
        self._starts, self._learned = [(0, 0, 0)], list[tuple[int, int]]()
        self._rare = rare_characters([])
        names = ("no_answer", "unended", "characters")
        self._counts = dict.fromkeys(names, 0) | {"largest_id": 0, "lost": 0}

    def write(self, found: Iterator[Conversation], advance: Callable[[int], None]) -> Record:
        """Write the conversations that have an answer; return the counts."""
        with (
            self._path.with_suffix(".bin").open("wb") as ids,
            self._path.with_suffix(".jsonl").open("wb") as texts,
        ):
            while batch := list(islice(found, LINES)):
                for talk in batch:
                    characters = [message["content"] for message in talk.messages]
                    self._counts["characters"] += sum(map(len, characters))
                    self._rare.update(rare_characters(characters))
                    if not talk.answers:
                        self._counts["no_answer"] += 1
                        continue
                    ids_bytes, text = self._encode(talk)
                    ids.write(ids_bytes)
                    texts.write(text)
                    advance(sum(len(content.encode()) for content in characters))
        np.save(self._path.with_suffix(".npy"), np.array(self._starts, np.int64))
        learned = np.array(self._learned, np.int64).reshape(-1, 2)
        np.save(self._path.with_suffix(".learned.npy"), learned)
        return self._counts | {"conversations": len(self._starts) - 1, "rare": self._rare}

    def _encode(self, talk: Conversation) -> tuple[bytes, bytes]:
        found = encode_conversation(self._template, talk)
        for low, high in found.learned:
            self._counts["unended"] += not self._ends & set(found.ids[low:high])
        self._learned += found.learned
        self._counts["largest_id"] = max(self._counts["largest_id"], *found.ids)
        text = json.dumps(talk.messages[: talk.answers[0]]).encode() + b"\n"
        start, ranges, byte = self._starts[-1]
        self._starts.append((start + len(found.ids), ranges + len(found.learned), byte + len(text)))
        return np.array(found.ids, self._dtype).tobytes(), text


def write_rows(config: DataConfig, folder: Path, rows: HubRows) -> None:
    """Write one file per split, one conversation per line."""
    for split, cells in rows.splits.items():
        lines = (
            json.dumps(dict(zip(("messages",) if len(row) == 1 else PAIR, row, strict=True)))
            for row in cells
        )
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


PAIR = ("prompt", "completion")

READER = DataReader(
    "chat",
    ("decoder",),
    "tokens",
    prepare_splits,
    open_split,
    HubFormat((("messages",), PAIR), write_rows),
    find_problems=partial(text_problems, least_tokens=2),
    open_tokenizer=open_tokenizer,
)
