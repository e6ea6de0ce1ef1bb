"""Encoding of text as token ids: a byte-level BPE trained on it, or a given tokenizer.json."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from trainer.atomic_files import write_atomically
from trainer.config.train import ConfigError, UserError
from trainer.data.tokenizer_files import TokenizerFiles

log = logging.getLogger(__name__)

# Usual names of the end-of-text and padding tokens; the first are those of our own BPE.
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
MASK_NAMES = ("<|mask|>", "[MASK]", "<mask>")
BEGIN_NAMES = ("[CLS]", "<s>", "<cls>", "<bos>")  # of a sequence that is classified
MOST_TOKENS = 1 << 24  # the library takes minutes to save larger ids
SMALLEST = 258  # 256 bytes and the two special tokens
TRAINING_CHARACTERS = 500_000_000  # a larger text trains the BPE by its beginning only
# BPE training time grows with the square of the longest word: text without spaces is cut for
# training, but not for encoding.
LONG_WORD = re.compile(r"\S{32}(?=\S)")


class Tokenizer:
    """A tokenizer with an end-of-text token (BOS and EOS of a sentence too) and a padding token.

    Nothing is added to the vocabulary of a given one: it pads with its end token if it has no
    other. `files` lie beside it, and name its end tokens and the beginning of a text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, files: TokenizerFiles | None = None):
        self._backend = backend
        self._json = ""  # the file as it was read; empty = trained here
        self.files = files or TokenizerFiles(Path(), {})
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # text that spells a special token stays text
        if getattr(backend.model, "dropout", None):  # BPE dropout is random
            backend.model.dropout = None
        # The largest id, not the number of entries: a given vocabulary can have gaps.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.end_ids = _find_ends(backend, self.files, self.vocab_size)  # any ends a text
        self.eot_id = self.end_ids[0]
        found = _mark_special(backend, PAD_NAMES)
        self.pad_id = self.eot_id if found is None else found
        self.bos_ids = _find_beginning(backend, self.files)  # of a text; mostly none
        self.is_lossless = _is_byte_level(backend)  # decoding reproduces any text

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, masks: bool = False) -> "Tokenizer":
        """Train a byte-level BPE of exactly `vocab_size` entries; `masks`: one is a mask token.

        Raises ConfigError if that is too few for all bytes, or too many for the text.
        """
        if vocab_size < SMALLEST:
            raise ConfigError(too_small(vocab_size))
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_NAMES[0], PAD_NAMES[0], *MASK_NAMES[:masks]],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(_first_texts(texts), trainer)
        reached = backend.get_vocab_size()
        if reached < vocab_size:
            raise ConfigError(
                f"data.vocab_size={vocab_size}: the train split has text for {reached} entries "
                f"only; set data.vocab_size={reached} or less, or give more text"
            )
        return cls(backend)

    @classmethod
    def train_characters(cls, texts: Iterable[str]) -> "Tokenizer":
        """Return a tokenizer with a token for each character of the texts; it skips others."""
        characters = sorted({character for text in texts for character in text})
        tokens = [END_NAMES[0], PAD_NAMES[0], *characters]
        vocabulary = {token: row for row, token in enumerate(tokens)}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        backend.decoder = tokenizers.decoders.Fuse()
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer.json and the files beside it.

        Raises ConfigError if it is missing, not a tokenizer, or has no end token.
        """
        if not Path(path).is_file():
            raise ConfigError(f"data.tokenizer={path}: no such file; it must be a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
            largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
            if largest >= MOST_TOKENS:
                raise ConfigError(
                    f"data.tokenizer={path} has the token id {largest}; a model has a row for each "
                    f"id up to the largest, and at most {MOST_TOKENS} are allowed"
                )
            loaded = cls(backend, TokenizerFiles.read(Path(path).parent))
            loaded._json = Path(path).read_text(encoding="utf-8")
            return loaded
        except BaseException as error:  # the library raises bare exceptions, and panics
            _reraise_interrupts(error)
            raise ConfigError(
                f"data.tokenizer={path} must be a tokenizer.json of the `tokenizers` library, but "
                f"reading it fails: {error}"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json, as it was read, and the files beside it; raises OSError."""
        write_atomically(Path(path), self._json or self._backend.to_str(pretty=True))
        self.files.write(Path(path).parent, write_atomically)

    @property
    def mask_id(self) -> int | None:
        """Return the id of the mask token; None = it has none."""
        return self.find_token(MASK_NAMES)

    def find_token(self, names: Sequence[str]) -> int | None:
        """Return the id of the first of these tokens that is in the vocabulary."""
        found = (self._backend.token_to_id(name) for name in names)
        return next((token_id for token_id in found if token_id is not None), None)

    def is_same_file(self, path: str | Path) -> bool:
        """Return whether a file holds an identical tokenizer."""
        return Tokenizer.load(path)._backend.to_str() == self._backend.to_str()

    def token_ids(self) -> dict[str, int]:
        """Return the id of each token, with the same names of end and padding for any tokenizer."""
        ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        special = {self.pad_id: PAD_NAMES[0], self.eot_id: END_NAMES[0]}
        return {special.get(row, token): row for token, row in ids.items()}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of the text, without special tokens; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, encoded on all cores.

        Raises ConfigError if the tokenizer has neither a token for some of the text nor an unknown
        token.
        """
        with _explain_errors("encode"):
            # The fast variant skips character offsets, which are not used.
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a text to continue, with what its model begins a text with."""
        return [*self.bos_ids, *self.encode(text)]

    def encode_markup(self, text: str, as_text: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Return the token ids of a text in which special tokens count, except in ranges `as_text`.

        There, what spells a special token is encoded as the text that it is.
        """
        self._backend.encode_special_tokens = False
        try:
            with _explain_errors("encode"):
                encoding = self._backend.encode(text, add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = True
        ids, special = [], self._special_ids()
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in special and any(start < high and low < end for low, high in as_text):
                ids += self.encode(text[start:end])
            else:
                ids.append(token)
        return ids

    def special_tokens(self) -> list[str]:
        """Return the texts of all special tokens."""
        return list(self._special_ids().values())

    def _special_ids(self) -> dict[int, str]:
        added = self._backend.get_added_tokens_decoder()
        return {row: token.content for row, token in added.items() if token.special}

    def named_tokens(self) -> dict[str, str]:
        """Return the texts of the tokens that a chat template may name, e.g. eos_token."""
        names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
        found = {name: text for name in names if (text := self.files.tokenizer_value(name))}
        bos = {"bos_token": self._backend.id_to_token(self.bos_ids[0])} if self.bos_ids else {}
        return {"eos_token": self._backend.id_to_token(self.eot_id), **bos, **found}

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; special tokens are left out."""
        return self.decode_batch([[int(i) for i in ids]])[0]

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each sequence of ids, decoded on all cores."""
        with _explain_errors("decode"):
            texts: list[str] = self._backend.decode_batch(list(ids), skip_special_tokens=True)
        return texts


@contextmanager
def _explain_errors(what: str) -> Iterator[None]:
    """Convert exceptions and panics of the library to ConfigError."""
    try:
        yield
    except BaseException as error:
        _reraise_interrupts(error)
        raise ConfigError(
            f"data.tokenizer cannot {what} this text ({error}); give it an unknown token or a byte "
            "alphabet, or leave data.tokenizer empty for a byte-level BPE trained on the text"
        ) from error


def _reraise_interrupts(error: BaseException) -> None:
    """Raise `error` again if it is an interrupt, an exit or a UserError, not the library's."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | UserError):
        raise error


def characters_lost(text: str, decoded: str) -> int:
    """Return how many characters of the text are missing from its decoded tokens."""
    if text == decoded:
        return 0
    common = Counter(text) & Counter(decoded)
    return max(1, len(text) - common.total())


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Return whether every byte has a token and the text is not changed otherwise."""
    before, alphabet = backend.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return (
        isinstance(backend.model, tokenizers.models.BPE)
        and isinstance(before, tokenizers.pre_tokenizers.ByteLevel)
        and isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        and backend.normalizer is None
        and not before.add_prefix_space
        and set(alphabet) <= backend.get_vocab(with_added_tokens=False).keys()
        and not any(
            token.lstrip or token.rstrip or token.normalized
            for token in backend.get_added_tokens_decoder().values()
        )
        and not _special_in_text(backend)
    )


def _special_in_text(backend: tokenizers.Tokenizer) -> bool:
    """Return whether plain text can encode to a special token, which decoding omits."""
    special = {
        row: token.content
        for row, token in backend.get_added_tokens_decoder().items()
        if token.special
    }
    texts = [text for content in special.values() for text in (content, f" {content}")]
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    return any(row in special for encoding in encodings for row in encoding.ids)


def too_small(vocab_size: int) -> str:
    """Return the error message for a vocabulary too small to hold every byte."""
    return (
        f"data.vocab_size={vocab_size} must be at least {SMALLEST} (256 bytes and 2 special "
        f"tokens); set data.vocab_size={SMALLEST} or more"
    )


def _find_ends(
    backend: tokenizers.Tokenizer, files: TokenizerFiles, vocab_size: int
) -> tuple[int, ...]:
    """Return the ids of the end tokens, the first of which separates documents.

    They are those of generation_config.json (or config.json), else the eos_token of
    tokenizer_config.json, else the first of END_NAMES. Raises ConfigError if there is none.
    """
    if ends := files.end_ids(vocab_size):
        return tuple(ends)
    names = [name] if (name := files.tokenizer_value("eos_token")) else END_NAMES
    end_id = _mark_special(backend, names)
    if end_id is None:
        found = f"eos_token={name} of tokenizer_config.json is not in it" if name else "it has none"
        raise ConfigError(
            f"data.tokenizer needs a token that ends a text, but {found}; name one of its tokens "
            f"{END_NAMES[0]} or {END_NAMES[2]}, or give its id as eos_token_id in a "
            "generation_config.json beside tokenizer.json"
        )
    return (end_id,)


def _mark_special(backend: tokenizers.Tokenizer, names: Sequence[str]) -> int | None:
    """Mark the first of these names in the vocabulary as special; return its id, None if none is.

    The id stays, and no token is added.
    """
    name = next((n for n in names if backend.token_to_id(n) is not None), None)
    if name is None:
        return None
    backend.add_special_tokens([name])
    return backend.token_to_id(name)


def _find_beginning(backend: tokenizers.Tokenizer, files: TokenizerFiles) -> list[int]:
    """Return the ids that the model's tokenizer puts in front of a text: BOS, or none.

    `add_bos_token` of tokenizer_config.json decides, else the post-processor. A tokenizer that
    closes texts too (that of an encoder) puts nothing in front here.
    """
    adds = files.tokenizer_value("add_bos_token")
    if adds is not None:
        bos = files.tokenizer_value("bos_token")
        token_id = backend.token_to_id(bos) if adds and bos else None
        return [] if token_id is None else [token_id]
    if not backend.encode("", add_special_tokens=True).ids:
        return []
    known = next(iter(backend.get_vocab(with_added_tokens=False)))  # some text that has a token
    with _explain_errors("encode"):
        encoding = backend.encode(known, add_special_tokens=True)
    mask = encoding.special_tokens_mask
    inner = mask.index(0) if 0 in mask else 0
    return encoding.ids[:inner] if not any(mask[inner:]) else []


def _first_texts(texts: Iterable[str]) -> Iterator[str]:
    characters = 0
    for text in texts:
        if characters > TRAINING_CHARACTERS:
            log.info("The BPE is trained on the first %d characters.", characters)
            return
        characters += len(text)
        yield LONG_WORD.sub("\\g<0>\n", text)
