"""Tokenizers of every kind that `tokenizers` builds, for one short text or a table of pairs."""

from collections.abc import Callable
from random import Random
from typing import Any

import tokenizers
from drafts import ROOT, Case, Draft, make_case, options_of
from judge import Pairs, Texts
from odd_texts import LINES, WORDS
from odd_tokenizer_files import FILES, finish
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from trainer.data.tokenizer import END_NAMES

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
RARE = (
    "naïve",
    "Ünder",
    "日本",
    "don't",
    "3.14",
    "x=y;",
    "😀",
    "tab\there",
    "two  spaces",
    "it's.",
)


def _begin(rng: Random) -> Draft:
    kind = rng.choice(("text", "text", "pairs"))
    words = [*WORDS, *rng.choice(((), RARE, ("İ", "ﬁ", "e\u0301")))]
    draft = Draft(kind, rng, Texts({}), settings={"seq_len": 64, "tokenizer": "tokenizer.json"})
    draft.traits |= {"finish": finish, "words": words}
    # What a tokenizer does to the text is right where it is said.
    draft.may_differ = True
    for split, count in LINES.items():
        if kind == "text":
            lines = [" ".join(rng.choices(words, k=7)) for _ in range(count)]
            content = "\n".join(lines) + "\n"
            draft.clean.splits[split] = [content]
        else:
            rows = [
                tuple(" ".join(rng.choices(words, k=4)).replace("\t", " ") for _ in "st")
                for _ in range(count)
            ]
            content = "".join("\t".join(row) + "\n" for row in rows)
            draft.clean = Pairs({**draft.clean.splits, split: rows})
        draft.files[f"{ROOT}/{split}.{'tsv' if kind == 'pairs' else 'txt'}"] = content.encode()
    draft.traits["tokenizer"] = _byte_level(draft)
    return draft


def _text(draft: Draft) -> list[str]:
    return [content.decode() for name, content in draft.files.items() if name.startswith(ROOT)]


def _byte_level(draft: Draft, vocab_size: int = 300) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(draft), trainer)
    return tokenizer


def _model(make: Callable[[Draft], Tokenizer]) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        tokenizer = make(draft)
        known = tokenizer.get_vocab().keys()
        if known and not known & set(END_NAMES):  # one without an end token is refused
            tokenizer.add_special_tokens([END_NAMES[0]])
        draft.traits["tokenizer"] = tokenizer

    return apply


def _trained(model: Any, trainer: Any, **parts: Any) -> Callable[[Draft], None]:
    def make(draft: Draft) -> Tokenizer:
        tokenizer = Tokenizer(model())
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        tokenizer.train_from_iterator(_text(draft), trainer())
        return tokenizer

    return _model(make)


def _bpe(*special: str, **settings: Any) -> Callable[[], Any]:
    return lambda: tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), show_progress=False, **settings
    )


def _words_trainer(*special: str) -> Callable[[], Any]:
    return lambda: tokenizers.trainers.WordLevelTrainer(
        vocab_size=40, special_tokens=list(special), show_progress=False
    )


def _built(model: Callable[[list[str]], Any], **parts: Any) -> Callable[[Draft], None]:
    """A model over a list of pieces: training WordPiece or Unigram twice gives two tokenizers."""

    def make(draft: Draft) -> Tokenizer:
        tokenizer = Tokenizer(model([*"abcdefghijklmnopqrstuvwxyz", *WORDS[:20]]))
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        return tokenizer

    return _model(make)


def _word_piece(*special: str, **settings: Any) -> Callable[[list[str]], Any]:
    def model(pieces: list[str]) -> Any:
        tokens = dict.fromkeys([*special, *pieces, *(f"##{piece}" for piece in pieces)])
        return models.WordPiece({token: row for row, token in enumerate(tokens)}, **settings)

    return model


def _unigram(*special: str, **settings: Any) -> Callable[[list[str]], Any]:
    def model(pieces: list[str]) -> Any:
        tokens = dict.fromkeys([*special, "▁", *pieces, *(f"▁{piece}" for piece in pieces)])
        return models.Unigram([(token, -2.0 / len(token)) for token in tokens], **settings)

    return model


def _byte_fallback(draft: Draft) -> Tokenizer:
    """SentencePiece's way: characters that are not known are bytes."""
    vocab = {"<unk>": 0, "</s>": 1, "▁": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _unigram_bytes(draft: Draft) -> Tokenizer:
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    space = decoders.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), space, decoders.Fuse()])
    return tokenizer


def _characters(draft: Draft) -> Tokenizer:
    letters = sorted(set("".join(_text(draft))))
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _wide_ids(draft: Draft) -> Tokenizer:
    """Ids with holes, beyond 16 bits."""
    vocab = {token: 70_000 + 3 * i for token, i in _byte_level(draft, 258).get_vocab().items()}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _empty(model: Any) -> Callable[[Draft], Tokenizer]:
    return lambda draft: Tokenizer(model())


SPACE = pre_tokenizers.Whitespace
MODELS = {
    "byte-level BPE": _model(_byte_level),
    "byte-level BPE of few bytes": _trained(
        models.BPE,
        _bpe("</s>"),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    ),
    "byte-level BPE with a space before": _trained(
        models.BPE,
        _bpe("</s>", initial_alphabet=ALPHABET),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True),
        decoder=decoders.ByteLevel(),
    ),
    "byte-level BPE without a decoder": _trained(
        models.BPE, _bpe("</s>"), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
    "BPE": _trained(models.BPE, _bpe("</s>")),
    "BPE of words": _trained(models.BPE, _bpe("</s>", "[PAD]"), pre_tokenizer=SPACE()),
    "BPE with unk": _trained(
        lambda: models.BPE(unk_token="[UNK]"), _bpe("[UNK]", limit_alphabet=9)
    ),
    "BPE with fused unk": _trained(
        lambda: models.BPE(unk_token="[UNK]", fuse_unk=True), _bpe("[UNK]", limit_alphabet=9)
    ),
    "BPE with an unk that is not there": _trained(
        lambda: models.BPE(unk_token="[UNK]"), _bpe("</s>", limit_alphabet=9)
    ),
    "BPE of few letters": _trained(models.BPE, _bpe("</s>", limit_alphabet=9)),
    "BPE with a suffix": _trained(
        lambda: models.BPE(end_of_word_suffix="</w>"),
        _bpe("<s>", end_of_word_suffix="</w>"),
        pre_tokenizer=SPACE(),
        decoder=decoders.BPEDecoder(),
    ),
    "BPE with dropout": _trained(
        lambda: models.BPE(dropout=0.4), _bpe("</s>"), decoder=decoders.Fuse()
    ),
    "BPE that ignores merges": _trained(lambda: models.BPE(ignore_merges=True), _bpe("</s>")),
    "BPE with byte fallback": _model(_byte_fallback),
    "Unigram with byte fallback": _model(_unigram_bytes),
    "WordLevel": _trained(
        lambda: models.WordLevel(unk_token="[UNK]"), _words_trainer("[UNK]"), pre_tokenizer=SPACE()
    ),
    "WordLevel without unk": _trained(models.WordLevel, _words_trainer(), pre_tokenizer=SPACE()),
    "WordLevel without pieces": _trained(models.WordLevel, _words_trainer("[UNK]")),
    "WordPiece": _built(
        _word_piece("[UNK]", "[SEP]", "[PAD]", unk_token="[UNK]"),
        decoder=decoders.WordPiece(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    ),
    "WordPiece without unk": _built(
        _word_piece(), pre_tokenizer=SPACE(), decoder=decoders.WordPiece()
    ),
    "WordPiece of short words": _built(
        _word_piece("[UNK]", unk_token="[UNK]", max_input_chars_per_word=4),
        pre_tokenizer=SPACE(),
        decoder=decoders.WordPiece(cleanup=True),
    ),
    "Unigram": _built(
        _unigram("<unk>", unk_id=0),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    ),
    "Unigram without unk": _built(
        _unigram(), pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()
    ),
    "characters": _model(_characters),
    "wide ids with holes": _model(_wide_ids),
    "an empty BPE": _model(_empty(models.BPE)),
    "an empty WordLevel": _model(_empty(models.WordLevel)),
    "an empty WordPiece": _model(_empty(models.WordPiece)),
    "an empty Unigram": _model(_empty(models.Unigram)),
}


def _part(name: str, part: Callable[[], Any]) -> Callable[[Draft], None]:
    """Put another normaliser, pre-tokenizer, post-processor or decoder into the tokenizer."""
    return lambda draft: setattr(draft.traits["tokenizer"], name, part())


PARTS = {
    **{
        f"normaliser {name}": _part("normalizer", part)
        for name, part in {
            "NFC": normalizers.NFC,
            "NFKC": normalizers.NFKC,
            "NFD": normalizers.NFD,
            "Lowercase": normalizers.Lowercase,
            "StripAccents": normalizers.StripAccents,
            "Strip": normalizers.Strip,
            "Bert": normalizers.BertNormalizer,
            "Nmt": normalizers.Nmt,
            "Replace": lambda: normalizers.Replace("o", "0"),
            "Prepend": lambda: normalizers.Prepend("▁"),
            "Replace all": lambda: normalizers.Replace(Regex(r"\s+"), ""),
            "ByteLevel": normalizers.ByteLevel,
            "several": lambda: normalizers.Sequence(
                [normalizers.NFD(), normalizers.StripAccents()]
            ),
        }.items()
    },
    **{
        f"pieces by {name}": _part("pre_tokenizer", part)
        for name, part in {
            "Whitespace": SPACE,
            "WhitespaceSplit": pre_tokenizers.WhitespaceSplit,
            "Punctuation": pre_tokenizers.Punctuation,
            "Digits": lambda: pre_tokenizers.Digits(True),
            "Bert": pre_tokenizers.BertPreTokenizer,
            "Metaspace": pre_tokenizers.Metaspace,
            "a letter": lambda: pre_tokenizers.CharDelimiterSplit("e"),
            "scripts": pre_tokenizers.UnicodeScripts,
            "removal": lambda: pre_tokenizers.Split(" ", "removed"),
            "several": lambda: pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)]
            ),
            "bytes without words": lambda: pre_tokenizers.ByteLevel(False, use_regex=False),
        }.items()
    },
    **{
        f"decoder {name}": _part("decoder", part)
        for name, part in {
            "ByteLevel": decoders.ByteLevel,
            "WordPiece": decoders.WordPiece,
            "CTC": decoders.CTC,
            "Metaspace": decoders.Metaspace,
            "BPE": decoders.BPEDecoder,
            "Fuse": decoders.Fuse,
            "Strip": lambda: decoders.Strip(" ", 1, 1),
            "Replace": lambda: decoders.Replace("e", "3"),
            "ByteFallback": decoders.ByteFallback,
        }.items()
    },
    "post-processor Template": _part(
        "post_processor",
        lambda: processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 5), ("</s>", 6)]
        ),
    ),
    "post-processor Bert": _part(
        "post_processor", lambda: processors.BertProcessing(("[SEP]", 1), ("[CLS]", 2))
    ),
    "post-processor ByteLevel": _part(
        "post_processor", lambda: processors.ByteLevel(trim_offsets=True)
    ),
    "post-processor Roberta": _part(
        "post_processor", lambda: processors.RobertaProcessing(("</s>", 1), ("<s>", 2))
    ),
}


def _call(change: Callable[[Tokenizer, Draft], Any]) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        change(draft.traits["tokenizer"], draft)

    return apply


ADDED = tokenizers.AddedToken
TOKENS = {
    "truncation": _call(lambda t, draft: t.enable_truncation(draft.rng.choice((1, 5, 20)))),
    "padding": _call(lambda t, draft: t.enable_padding(length=50, pad_id=1, pad_token="<pad>")),
    "padding to multiples": _call(lambda t, draft: t.enable_padding(pad_to_multiple_of=8)),
    "added words": _call(lambda t, draft: t.add_tokens(["question", "outrageous fortune", "the"])),
    "added with white space": _call(
        lambda t, draft: t.add_tokens([ADDED("the", lstrip=True, rstrip=True)])
    ),
    "added single words": _call(lambda t, draft: t.add_tokens([ADDED("is", single_word=True)])),
    "added, normalised": _call(lambda t, draft: t.add_tokens([ADDED("THE", normalized=True)])),
    "special words": _call(lambda t, draft: t.add_special_tokens(["the", "question"])),
    "special white space": _call(lambda t, draft: t.add_special_tokens([ADDED(" ", special=True)])),
    "a special end of line": _call(lambda t, draft: t.add_special_tokens(["\n"])),
    "several ends": _call(
        lambda t, draft: t.add_special_tokens(["[SEP]", "<|end_of_text|>", "<eos>"])
    ),
    "an end that is a word": _call(lambda t, draft: t.add_tokens(["</s>", "<|endoftext|>"])),
    "many added": _call(
        lambda t, draft: (
            t.add_tokens([f"<extra_{i}>" for i in range(70_000)])
            if draft.rng.random() < 0.2
            else t.add_tokens([f"<x{i}>" for i in range(99)])
        )
    ),
    "an odd added token": _call(lambda t, draft: t.add_tokens(["\u2581", "é", "\t", "  "])),
}


def _in_folder(draft: Draft) -> None:
    """data.tokenizer names the folder of the file."""
    finish(draft)
    draft.files["folder/tokenizer.json"] = draft.files.pop("tokenizer.json")
    draft.settings["tokenizer"] = "folder"
    draft.traits.pop("finish")


def _no_file(draft: Draft) -> None:
    draft.settings["tokenizer"] = draft.rng.choice(("gone.json", "data", "data/train.txt", "."))
    draft.odd()


def _hopeful(draft: Draft) -> None:
    draft.readable = False  # a tokenizer may have no token for a part of the text


OPTIONS = [
    *options_of("tokenizer", MODELS),
    *options_of("encoding", PARTS),
    *options_of("settings", TOKENS),
    *options_of("damage", FILES),
    *options_of("layout", {"in a folder": _in_folder, "no file": _no_file}),
]


def case(number: int, seed: int) -> Case:
    """Return a tokenizer with what it is to read."""
    return make_case("tokenizers", _begin, OPTIONS, number, seed, _hopeful)
