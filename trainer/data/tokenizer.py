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

log = logging.getLogger(__name__)

# Usual names of the end-of-text and padding tokens; the first are those of our own BPE.
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
MOST_TOKENS = 1 << 24  # the library takes minutes to save larger ids
SMALLEST = 258  # 256 bytes and the two special tokens
TRAINING_CHARACTERS = 500_000_000  # a larger text trains the BPE by its beginning only
# BPE training time grows with the square of the longest word: text without spaces is cut for
# training, but not for encoding.
LONG_WORD = re.compile(r"\S{32}(?=\S)")


class Tokenizer:
    """A tokenizer with an end-of-text token (BOS and EOS of a sentence too) and a padding token."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # text that spells a special token stays text
        if getattr(backend.model, "dropout", None):  # BPE dropout is random
            backend.model.dropout = None
        self.eot_id = _find_special(backend, END_NAMES)
        self.pad_id = _find_special(backend, PAD_NAMES)
        # The largest id, not the number of entries: a given vocabulary can have gaps.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.is_lossless = _is_byte_level(backend)  # decoding reproduces any text

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE of exactly `vocab_size` entries.

        Raises ConfigError if that is too few for all bytes, or too many for the text.
        """
        if vocab_size < SMALLEST:
            raise ConfigError(too_small(vocab_size))
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_NAMES[0], PAD_NAMES[0]],
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
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer.json, with its own end and padding tokens if it has any.

        Raises ConfigError if it is missing or not a tokenizer.
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
            return cls(backend)
        except BaseException as error:  # the library raises bare exceptions, and panics
            _reraise_interrupts(error)
            raise ConfigError(
                f"data.tokenizer={path} must be a tokenizer.json of the `tokenizers` library, but "
                f"reading it fails: {error}"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json atomically; raises OSError."""
        write_atomically(Path(path), self._backend.to_str(pretty=True))

    def is_same_file(self, path: str | Path) -> bool:
        """Return whether a file holds an identical tokenizer."""
        return Tokenizer.load(path)._backend.to_str() == self._backend.to_str()

    def token_ids(self) -> dict[str, int]:
        """Return the id of each token, with the same names of end and padding for any tokenizer."""
        ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        special = {self.eot_id: END_NAMES[0], self.pad_id: PAD_NAMES[0]}
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


def _find_special(backend: tokenizers.Tokenizer, names: Sequence[str]) -> int:
    """Return the id of the first of these names in the vocabulary; add names[0] if none is."""
    name = next((n for n in names if backend.token_to_id(n) is not None), names[0])
    backend.add_special_tokens([name])  # a known one is only marked as special
    token_id = backend.token_to_id(name)
    assert token_id is not None, name
    return token_id


def _first_texts(texts: Iterable[str]) -> Iterator[str]:
    characters = 0
    for text in texts:
        if characters > TRAINING_CHARACTERS:
            log.info("The BPE is trained on the first %d characters.", characters)
            return
        characters += len(text)
        yield LONG_WORD.sub("\\g<0>\n", text)
