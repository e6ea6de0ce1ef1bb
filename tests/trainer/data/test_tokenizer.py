"""The tokenizer: exact round trips, special tokens, given files, and rejected ones."""

import json
import math

import pytest
import tokenizers

import trainer.data.tokenizer as tokenizer_module
from trainer import data
from trainer.config.train import DataConfig, UserError
from trainer.data.tokenized import encode_texts
from trainer.data.tokenizer import Tokenizer
from trainer.tasks.language import bits

TEXT = "When shall we three meet again? In thunder, lightning, or in rain? " * 3
ODD = "Häuser\t\r\n\n  naïve 🙂 日本語 \x00 <|endoftext|> <|pad|> 's 12345"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 280)


def own(tmp_path, specials, model=None):
    """Write a tokenizer.json with these special tokens by the `tokenizers` library."""
    backend = tokenizers.Tokenizer(model or tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", *(specials or ["</s>"])],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.enable_truncation(5)  # as published tokenizers often have it
    backend.save(str(tmp_path / "own.json"))
    return backend, tmp_path / "own.json"


def test_any_text_comes_back_and_never_as_a_special_token(tokenizer):
    for text in (TEXT, ODD, "", "\ufeff"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.eot_id, tokenizer.pad_id} & set(ids)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_decode_leaves_out_special_tokens(tokenizer):
    ids = [tokenizer.eot_id, *tokenizer.encode("again"), tokenizer.pad_id]
    assert tokenizer.decode(ids) == "again"


def test_batches_are_encoded_as_single_texts(tokenizer):
    texts = [TEXT, ODD, "", "rain"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_training_merges_and_reaches_the_size(tokenizer):
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 1.5


def test_save_and_load_keep_everything(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    for attribute in ("vocab_size", "eot_id", "pad_id"):
        assert getattr(loaded, attribute) == getattr(tokenizer, attribute)
    assert loaded.encode(ODD) == tokenizer.encode(ODD)


@pytest.mark.parametrize(
    "end, pad", [("</s>", "<pad>"), ("<|end_of_text|>", "[PAD]"), ("<eos>", "<|pad|>")]
)
def test_an_own_tokenizer_keeps_its_ids_and_its_special_tokens(tmp_path, end, pad):
    backend, path = own(tmp_path, [end, pad])
    loaded = Tokenizer.load(path)
    assert (loaded.eot_id, loaded.pad_id) == (backend.token_to_id(end), backend.token_to_id(pad))
    assert loaded.vocab_size == backend.get_vocab_size()
    backend.no_truncation()
    assert loaded.encode(TEXT) == backend.encode(TEXT).ids
    assert loaded.decode([loaded.eot_id, loaded.pad_id]) == ""


def test_nothing_is_added_to_a_given_tokenizer(tmp_path):
    """Without a padding token it pads with its end: padding is masked by position."""
    backend, path = own(tmp_path, ["</s>"])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    loaded = Tokenizer.load(path)
    assert loaded.vocab_size == backend.get_vocab_size()
    assert (loaded.end_ids, loaded.eot_id, loaded.pad_id) == ((7, 1), 7, 7)
    (tmp_path / "copy").mkdir()
    loaded.save(tmp_path / "copy/tokenizer.json")
    for name in ("own.json", "generation_config.json"):
        copy = tmp_path / "copy" / ("tokenizer.json" if name == "own.json" else name)
        assert copy.read_bytes() == (tmp_path / name).read_bytes()


def test_a_grown_tokenizer_of_an_earlier_run_keeps_its_tokens(tmp_path):
    backend, path = own(tmp_path, ["</s>"])
    backend.add_special_tokens(["<|pad|>"])
    backend.save(str(path))
    assert Tokenizer.load(path).pad_id == backend.get_vocab_size() - 1


@pytest.mark.parametrize(
    "files, ends",
    [
        ({"config.json": {"eos_token_id": 5}}, (5,)),
        ({"config.json": {"eos_token_id": 5}, "generation_config.json": {"eos_token_id": 6}}, (6,)),
        ({"tokenizer_config.json": {"eos_token": "<unk>"}}, (0,)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<unk>"}}}, (0,)),
        ({}, (1,)),
    ],
)
def test_the_end_tokens_are_the_models_also_in_a_copy(tmp_path, files, ends):
    _, path = own(tmp_path, ["</s>"])
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    (tmp_path / "copy").mkdir()
    Tokenizer.load(path).save(tmp_path / "copy/tokenizer.json")
    for folder in (path, tmp_path / "copy/tokenizer.json"):
        assert Tokenizer.load(folder).end_ids == ends


def test_a_text_begins_as_its_model_expects(tmp_path):
    backend, path = own(tmp_path, ["</s>", "<s>"])
    assert Tokenizer.load(path).bos_ids == []
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    backend.save(str(path))
    loaded = Tokenizer.load(path)
    assert loaded.encode_prompt("rain") == [2, *loaded.encode("rain")]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "bos_token": "<s>"}')
    assert Tokenizer.load(path).bos_ids == []
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    backend.save(str(path))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<s>"}')
    assert Tokenizer.load(path).bos_ids == [2]
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(path).bos_ids == []  # a token behind a text is none in front of it


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    word_level().save(str(tmp_path / "own.json"))
    with pytest.raises(UserError, match=r"needs a token that ends a text.*generation_config"):
        Tokenizer.load(tmp_path / "own.json")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 999}')
    with pytest.raises(UserError, match=r"eos_token_id=999 must be token ids from 0 to 11"):
        Tokenizer.load(tmp_path / "own.json")


def test_holes_between_ids_count(tmp_path):
    """The embedding needs a row for the largest id, whatever the number of entries."""
    vocabulary = {"a": 0, "b": 700, "<eos>": 3, "<pad>": 4, "[UNK]": 5}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "holes.json"))
    loaded = Tokenizer.load(tmp_path / "holes.json")
    assert loaded.vocab_size == 701
    assert loaded.encode("b a") == [700, 0]
    assert (loaded.eot_id, loaded.pad_id) == (3, 4)


def test_mistakes_name_the_key_and_a_way_out(tmp_path):
    with pytest.raises(UserError, match=r"data\.vocab_size=257 must be at least 258"):
        Tokenizer.train([TEXT], 257)
    with pytest.raises(UserError, match=r"data\.vocab_size=9999: .* for (\d+) entries") as error:
        Tokenizer.train([TEXT], 9999)
    reached = int(str(error.value).split("set data.vocab_size=")[1].split()[0])
    assert Tokenizer.train([TEXT], reached).vocab_size == reached  # the proposed value works
    with pytest.raises(UserError, match=r"data\.tokenizer=.*none\.json: no such file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.tokenizer=.*bad\.json must be a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")


# ---- lossy tokenizers, and those that cannot encode a text

WORDS = [
    "when",
    "shall",
    "we",
    "three",
    "meet",
    "again",
    "in",
    "thunder",
    "lightning",
    "or",
    "in",
    "rain",
]


def word_level(unk="[UNK]", known=WORDS, **parts) -> tokenizers.Tokenizer:
    vocabulary = {word: i for i, word in enumerate([*dict.fromkeys(known), *filter(None, [unk])])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unk or "?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def save_with_end(backend, folder):
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "own.json"))


def metaspace() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram(
            [("<unk>", 0.0), ("▁", -1.0)] + [(c, -2.0) for c in sorted(set("".join(WORDS)))],
            unk_id=0,
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    return backend


BYTE_LEVEL = {
    "pre_tokenizer": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "decoder": tokenizers.decoders.ByteLevel(),
}
LOSSY = {
    "unknown words": (word_level(known=WORDS[:4]), " ".join(WORDS)),
    "line ends": (word_level(), "when shall\nwe meet"),
    "lower case": (word_level(normalizer=tokenizers.normalizers.Lowercase()), "When shall we"),
    "accents": (
        word_level(
            known=["cafe"],
            normalizer=tokenizers.normalizers.Sequence(
                [tokenizers.normalizers.NFD(), tokenizers.normalizers.StripAccents()]
            ),
        ),
        "café",
    ),
    "no byte alphabet": (metaspace(), "when shall 日本"),
    "order": (
        word_level(known=["ab", "ba"], normalizer=tokenizers.normalizers.Replace("ab", "ba")),
        "ab",
    ),
}


@pytest.mark.parametrize("case", LOSSY)
def test_lost_characters_are_counted(tmp_path, case):
    backend, text = LOSSY[case]
    save_with_end(backend, tmp_path)
    lost = encode_texts(Tokenizer.load(tmp_path / "own.json"), ["", text])[1]
    assert 0 < lost <= len(text)


def test_no_characters_are_lost_of_text_that_decodes_exactly(tmp_path, tokenizer):
    save_with_end(metaspace(), tmp_path)
    for lossless in (Tokenizer.load(tmp_path / "own.json"), tokenizer):
        assert encode_texts(lossless, [" ".join(WORDS), "", "rain"])[1] == 0
    assert tokenizer.is_lossless and not Tokenizer.load(tmp_path / "own.json").is_lossless
    assert encode_texts(tokenizer, [ODD])[1] == 0


def test_a_normalizer_makes_a_tokenizer_lossy(tmp_path):
    backend, path = own(tmp_path, [])
    assert Tokenizer.load(path).is_lossless
    backend.normalizer = tokenizers.normalizers.NFKC()
    backend.save(str(path))
    assert not Tokenizer.load(path).is_lossless
    assert encode_texts(Tokenizer.load(path), ["ﬁn"])[1] > 0


def test_bits_per_character_are_not_reported_for_a_lossy_tokenizer(tmp_path, caplog):
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 50))
    save_with_end(word_level(known=WORDS[:8]), tmp_path)
    config = DataConfig(
        path=str(tmp_path / "text.txt"),
        tokenizer=str(tmp_path / "own.json"),
        seq_len=16,
        cache=str(tmp_path / "cache"),
    )
    facts = data.prepare_data(config)
    assert facts.splits["train"].lost > 500
    assert "bits per token are reported instead" in caplog.text
    dataset = data.open_split(config, "test")
    assert bits(2.0, dataset) == {"bits_per_token": pytest.approx(2.0 / math.log(2))}
    dataset.lost = 0
    assert list(bits(2.0, dataset)) == ["bits_per_character"]


@pytest.mark.parametrize(
    "backend",
    [
        word_level(unk=None),
        tokenizers.Tokenizer(tokenizers.models.WordPiece({"when": 0})),
        tokenizers.Tokenizer(tokenizers.models.Unigram([("a", -1.0)])),
    ],
)
def test_a_tokenizer_without_an_unknown_token_gives_one_message(tmp_path, backend):
    save_with_end(backend, tmp_path)
    with pytest.raises(UserError, match=r"data\.tokenizer.*unknown token"):
        Tokenizer.load(tmp_path / "own.json").encode("when hell freezes")


def test_dropout_of_merges_is_off(tmp_path):
    backend, path = own(tmp_path, [])
    backend.model.dropout = 0.5
    backend.save(str(path))
    loaded = Tokenizer.load(path)
    assert loaded.encode_batch([TEXT] * 8) == [loaded.encode(TEXT)] * 8


def test_a_text_without_spaces_is_learned_from_in_pieces():
    words = list(tokenizer_module._first_texts(["日" * 100 + " and " + "ab" * 40]))
    assert max(map(len, words[0].split())) <= 32
    assert words[0].replace("\n", "") == "日" * 100 + " and " + "ab" * 40
