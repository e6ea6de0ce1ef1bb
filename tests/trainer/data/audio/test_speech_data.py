"""Speech: layouts, decoding, features, augmentation, and data that are rejected."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import tiny

from trainer import data
from trainer.config.loss import IGNORED, NO_CHARACTER
from trainer.config.train import ConfigError, UserError
from trainer.data.audio import frames as frames_module
from trainer.data.audio.augment import augment_frames, change_tempo
from trainer.data.audio.decode import audio_features, read_audio
from trainer.data.audio.utterances import unknown_characters
from trainer.data.loader import TrainLoader
from trainer.data.tokenizer import Tokenizer

RATE = 8000
SAID = "abc cab"


@pytest.fixture
def config(tmp_path):
    return tiny.speech_data(tmp_path / "own")


def test_the_bundled_speech_is_read(tmp_path):
    settings = {"sample_rate": RATE, "mels": 10, "audio_stride": 4, "characters": True}
    config = data.DataConfig(kind="speech", path="bundled:speech", cache=str(tmp_path), **settings)
    facts = data.prepare_data(config)
    assert facts.sample_counts == {"train": 439, "valid": 31, "test": 38}
    assert facts.vocab_size == 30  # 26 letters, apostrophe, space, and two special tokens
    assert not facts.notes and not facts.left_out
    test = data.open_split(config, "test")
    assert test.target_text(2) == "the conference cannot be extended"
    assert sum(len(test.target_text(i).split()) for i in range(len(test))) == 447


def test_a_sample_is_the_features_and_the_characters(config):
    facts = data.prepare_data(config)
    train, tokenizer = data.open_split(config, "train"), data.open_tokenizer(config)
    every = np.concatenate([train.sample(i, None)["frames"] for i in range(len(train))])
    assert np.abs(every.mean(0)).max() < 2e-3 and np.abs(every.std(0) - 1).max() < 2e-3
    for index in (0, 5):
        sample = train.sample(index, None)
        samples = read_audio(train_path(train, index), RATE).samples_N
        expected = (audio_features(samples, RATE, 8) - facts.mean) / facts.std
        np.testing.assert_allclose(sample["frames"], expected, atol=5e-3)
        ids = sample["targets"][sample["targets"] >= 0]
        assert tokenizer.decode(ids) == train.target_text(index)
        assert len(sample["targets"]) == -(-len(sample["frames"]) // 2)
        assert (sample["targets"][len(ids) :] == NO_CHARACTER).all()


def train_path(dataset, index):
    return type(dataset._lines)(dataset.source_text(index))


def test_padding_is_no_frame_and_no_target(config):
    data.prepare_data(config)
    config = replace(config, audio_stride=4)
    data.prepare_data(config)
    train = data.open_split(config, "train")
    samples = [train.sample(i, None) for i in range(3)]
    batch = train.collate(samples)
    vectors = [-(-len(sample["frames"]) // 4) for sample in samples]
    assert batch["frames"].shape == (3, 4 * max(vectors), 8)
    assert batch["source_valid"].sum(1).tolist() == vectors
    for row, sample in enumerate(samples):
        assert (batch["frames"][row, len(sample["frames"]) :] == 0).all()
        assert (batch["targets"][row, vectors[row] :] == IGNORED).all()
    assert "source_valid" not in train.collate(samples[:1])


def test_batches_are_of_like_length_and_the_same_for_any_ranks(config):
    data.prepare_data(config)
    train = data.open_split(config, "train")
    assert train.sample_lengths().tolist() == [len(train.frames(i, None)) for i in range(20)]

    def load(micro_batch_size, rank, ranks):
        loader = TrainLoader(train, 3, 4, micro_batch_size, rank, ranks, 0)
        steps = [next(loader) for _ in range(6)]
        loader.close()
        return steps

    def by_seed(steps):
        rows = {}
        for batch in (batch for step in steps for batch in step):
            for frames, targets, seed in zip(
                batch["frames"], batch["targets"], batch["seeds"], strict=True
            ):
                valid = targets != IGNORED
                rows[int(seed)] = frames[: 2 * int(valid.sum())], targets[valid]
        return rows

    whole, parts = by_seed(load(0, 0, 1)), {}
    for rank in range(2):
        parts |= by_seed(load(1, rank, 2))
    assert whole.keys() == parts.keys() and len(whole) == 24
    for seed, (frames, targets) in whole.items():
        assert frames.equal(parts[seed][0]) and targets.equal(parts[seed][1])


def test_augmentation_is_a_function_of_seed_and_sample(config):
    data.prepare_data(config)
    train = data.open_split(config, "train")
    plain, once = train.frames(1, None), train.frames(1, 7)
    assert np.array_equal(once, train.frames(1, 7))
    assert np.array_equal(plain, train.frames(1, None))
    changes = [len(train.frames(i, 7)) / len(train.frames(i, None)) for i in range(9)]
    assert max(changes) - min(changes) > 0.05  # each utterance has its own
    lengths = {len(train.frames(1, seed)) for seed in range(40)}
    assert min(lengths) < len(plain) < max(lengths)
    assert min(lengths) / len(plain) > 0.9 and max(lengths) / len(plain) < 1.12
    off = replace(config, augment=False)
    assert np.array_equal(data.open_split(off, "train").frames(1, 7), plain)


def test_masks_are_ranges_of_frames_and_of_mels(config):
    settings = replace(config, tempo=0.0, time_masks=1, time_mask=5, mel_masks=1, mel_mask=2)
    seen = set()
    for seed in range(200):
        masked = augment_frames(np.ones((30, 8), np.float32), settings, seed) == 0
        rows, columns = masked.all(1).sum(), masked.all(0).sum()
        assert rows <= 5 and columns <= 2
        assert masked.sum() == rows * 8 + columns * 30 - rows * columns
        seen.add((rows, columns))
    assert len(seen) == 18  # each width from none to the widest


def test_a_faster_tempo_leaves_frames_for_every_character(config):
    rising = np.arange(20.0, dtype=np.float32)[:, None].repeat(3, 1)
    assert change_tempo(rising, 39)[:, 0] == pytest.approx(np.arange(39) / 2)
    fast = replace(config, tempo=0.9)
    assert min(len(augment_frames(rising, fast, seed, least=18)) for seed in range(50)) == 18


def write_lines(config, *lines, split="train"):
    (tiny.Path(config.path) / f"{split}.tsv").write_text("".join(f"{line}\n" for line in lines))


def write_sound(config, name, samples, rate=RATE):
    soundfile.write(tiny.Path(config.path) / name, samples, rate)


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_other_formats_say_the_same(config, suffix):
    wav, other = (f"own.{name}" for name in ("wav", suffix))
    for name in (wav, other):
        write_sound(config, name, tiny.sound_of(SAID, RATE))
    write_lines(config, f"{wav}\t{SAID}", f"{other}\t{SAID}")
    data.prepare_data(config)
    plain, coded = (data.open_split(config, "train").frames(i, None) for i in (0, 1))
    assert abs(len(plain) - len(coded)) <= 12  # an encoder of mp3 pads
    assert np.corrcoef(plain[5:35].ravel(), coded[5:35].ravel())[0, 1] > 0.6


def test_opus_is_read(config, tmp_path):
    path = tmp_path / "own.opus"
    soundfile.write(path, tiny.sound_of(SAID, 48_000), 48_000, format="OGG", subtype="OPUS")
    assert abs(len(read_audio(path, RATE).samples_N) - 7 * 480) < 20


def test_other_rates_and_channels_are_converted_and_said(config):
    mono = tiny.sound_of(SAID, 16_000)
    write_sound(config, "fast.wav", mono, 16_000)
    write_sound(config, "two.wav", np.stack([tiny.sound_of(SAID, RATE)] * 2, 1))
    write_sound(config, "plain.wav", tiny.sound_of(SAID, RATE))
    write_lines(config, *(f"{name}.wav\t{SAID}" for name in ("fast", "two", "plain")))
    facts = data.prepare_data(config)
    assert facts.notes[:2] == (
        "1 recordings of 16,000 Hz, resampled to 8,000 Hz",
        "1 recordings of 2 channels, mixed down to one",
    )
    train = data.open_split(config, "train")
    fast, two, plain = (train.frames(i, None) for i in range(3))
    assert np.array_equal(two, plain)
    assert np.abs(fast - plain)[3:-3].mean() < 0.1 and fast.shape == plain.shape


def test_common_voice_names_its_columns(config):
    rows = ["client_id\tpath\tsentence\tage", *(f"x\ttrain{i}.wav\t{SAID}\t" for i in range(3))]
    write_lines(config, *rows)
    write_lines(config, "clip\tduration[ms]", "a.mp3\t1", split="clip_durations")
    facts = data.prepare_data(config)
    assert facts.sample_counts["train"] == 3
    assert facts.left_out["clip_durations.tsv"] == "outside the splits"
    assert data.open_split(config, "train").target_text(2) == SAID


def test_librispeech_has_a_folder_for_each_chapter(config, tmp_path):
    root = tmp_path / "LibriSpeech"
    for split, count in (("train-clean-100", 4), ("dev-clean", 2), ("test-other", 2)):
        folder = root / split / "84" / "121123"
        folder.mkdir(parents=True)
        for i in range(count):
            soundfile.write(folder / f"84-{i:04d}.flac", tiny.sound_of("ABC", RATE), RATE)
        lines = "".join(f"84-{i:04d} ABC CAB\n" for i in range(count))
        (folder / "84-121123.trans.txt").write_text(lines)
    (root / "SPEAKERS.TXT").write_text("84 | F | dev-clean\n")
    config = replace(config, path=str(root))
    assert data.prepare_data(config).sample_counts == {"train": 4, "valid": 2, "test": 2}
    assert data.open_split(config, "valid").target_text(1) == "ABC CAB"


def test_a_single_file_has_its_end_held_out(config):
    facts = data.prepare_data(replace(config, path=f"{config.path}/train.tsv", held_out=0.2))
    assert [facts.sample_counts[split] for split in ("train", "valid", "test")] == [16, 2, 2]


def test_features_computed_elsewhere_are_read(config):
    draw = np.random.default_rng(0)
    features = [draw.standard_normal((50, 8)) for _ in range(3)]
    folder = tiny.Path(config.path)
    np.savez(folder / "a.npz", features=features[0], other=np.zeros(3))
    np.savez(folder / "b.npz", features[1])
    np.save(folder / "c.npy", features[2])
    write_lines(config, *(f"{name}\tabc" for name in ("a.npz", "b.npz", "c.npy")))
    config = replace(config, standardize=False)
    data.prepare_data(config)
    train = data.open_split(config, "train")
    for i in range(3):
        np.testing.assert_allclose(train.frames(i, None), features[i], rtol=1e-3)


def test_processes_give_what_one_does(config, monkeypatch):
    data.prepare_data(config)
    alone = data.data_fingerprint(config)
    monkeypatch.setattr(frames_module, "WORTH", 5)
    monkeypatch.setattr(frames_module.os, "cpu_count", lambda: 2)
    elsewhere = replace(config, cache=f"{config.cache}-2")
    data.prepare_data(elsewhere)
    assert data.data_fingerprint(elsewhere) == alone


BAD = {
    "no tab": (["clips/train0.wav abc"], "line 1 of .* has 0 tabs, not 1; every line must be"),
    "missing": (
        ["clips/train0.wav\tabc", "no.wav\tabc"],
        r"line 2 of .*: .*no\.wav does not exist",
    ),
    "empty transcript": (["clips/train0.wav\t "], "line 1 of .* has an empty transcript"),
    "no audio": (["train.tsv\tabc"], "line 1 of .*: .* cannot be decoded as audio .*; it must be"),
    "zero length": (["zero.wav\tabc"], "holds no samples: its length is zero"),
    "a header alone": (["short.wav\tabc"], "cannot be decoded as audio"),
    "cut off": (["short.mp3\tabc"], r"is damaged: it ends after [\d,]+ of 8,000 samples"),
    "cut off, wav": (["half.wav\tabc"], r"is cut off: it holds [\d,]+ of [\d,]+ bytes of samples"),
    "NaN": (["nan.wav\tabc"], "samples that are no finite numbers"),
    "other mels": (["wide.npz\tabc"], "has 9 values a frame, but data.mels=8; set data.mels=9"),
    "no array": (["none.npz\tabc"], "must hold one array, or one named features"),
    "not two dims": (["flat.npy\tabc"], r"is float64 of shape \(9,\); it must be numbers of shape"),
    "large": (["large.npy\tabc"], "has features up to 1e.06; they must be within"),
    "damaged array": (["bad.npz\tabc"], "cannot be read as an array"),
    "too short": (["tiny.wav\tabcabc"], "none of the 1 utterances of the train split can be used"),
}


@pytest.fixture
def oddities(config):
    folder = tiny.Path(config.path)
    write_sound(config, "zero.wav", np.zeros(0))
    write_sound(config, "tiny.wav", np.zeros(100))
    whole = (folder / "clips" / "train0.wav").read_bytes()
    (folder / "short.wav").write_bytes(whole[:30])
    (folder / "half.wav").write_bytes(whole[: len(whole) // 2])
    write_sound(config, "short.mp3", np.random.default_rng(0).standard_normal(8000) / 10)
    coded = (folder / "short.mp3").read_bytes()
    (folder / "short.mp3").write_bytes(coded[: len(coded) // 2])
    soundfile.write(folder / "nan.wav", np.full(800, np.nan), RATE, subtype="FLOAT")
    np.savez(folder / "wide.npz", np.zeros((20, 9)))
    np.savez(folder / "none.npz", a=np.zeros(3), b=np.zeros(3))
    np.save(folder / "flat.npy", np.zeros(9))
    np.save(folder / "large.npy", np.full((20, 8), 1e6))
    (folder / "bad.npz").write_bytes(b"PK no archive")
    return config


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_message(oddities, case):
    lines, expected = BAD[case]
    write_lines(oddities, *lines)
    with pytest.raises(UserError, match=expected) as found:
        data.prepare_data(oddities)
    assert len(found.value.problems) == 1 and "\n" not in str(found.value)


def test_bad_recordings_are_left_out_and_counted(oddities, caplog):
    write_lines(oddities, "zero.wav\tabc", f"clips/train0.wav\t{SAID}", "no.wav\tabc")
    facts = data.prepare_data(replace(oddities, on_bad_file="skip"))
    assert facts.sample_counts["train"] == 1 and len(facts.left_out) == 2
    assert any("line 3" in name and "does not exist" in why for name, why in facts.left_out.items())


def test_an_ogg_file_without_its_end_is_read_and_counted(config):
    folder = tiny.Path(config.path)
    noise_N = np.random.default_rng(0).standard_normal(4 * RATE) / 10
    write_sound(config, "whole.ogg", noise_N)
    coded = (folder / "whole.ogg").read_bytes()
    (folder / "cut.ogg").write_bytes(coded[: int(0.9 * len(coded))])
    write_lines(config, "whole.ogg\tabc", "cut.ogg\tabc")
    facts = data.prepare_data(config)
    assert facts.sample_counts["train"] == 2
    assert facts.notes[0] == (
        "1 recordings without the mark of an Ogg file's end, read as far as they go: cut off?"
    )


def test_a_stream_that_states_no_size_is_read(config):
    path = tiny.Path(config.path) / "clips" / "train0.wav"
    content = bytearray(path.read_bytes())
    before = read_audio(path, RATE).samples_N
    at = content.index(b"data") + 4
    content[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    np.testing.assert_array_equal(read_audio(path, RATE).samples_N, before)


def test_utterances_that_cannot_be_learned_are_counted(config):
    write_sound(config, "short.wav", tiny.sound_of("a", RATE))
    write_sound(config, "long.wav", tiny.sound_of("a" * 30, RATE))
    lines = ["short.wav\taab", "short.wav\taabb", "long.wav\ta", f"clips/train0.wav\t{SAID}"]
    write_lines(config, *lines)
    write_lines(config, "short.wav\t?!", "long.wav\ta", split="valid")
    facts = data.prepare_data(replace(config, max_seconds=1.0, audio_stride=2))
    # Six frames are three vectors: `aab` needs four with the blank between the two.
    too_few = "with fewer vectors of data.audio_stride=2 frames than characters"
    assert facts.splits["train"].left_out == {too_few: 2, "longer than data.max_seconds=1": 1}
    assert facts.splits["valid"].left_out == {"without a known character": 1}
    assert (facts.sample_counts["train"], facts.sample_counts["valid"]) == (1, 1)


def test_unknown_characters_are_listed_with_their_counts(config):
    write_lines(config, "clips/valid0.wav\té aé", "clips/valid1.wav\tß", split="valid")
    facts = data.prepare_data(config)
    expected = "characters of the valid split unknown to the tokenizer and left out: é (2), ß (1)"
    assert facts.notes == (expected,)
    valid = data.open_split(config, "valid")
    assert len(valid) == 1 and valid.target_text(0) == "é aé"  # what is said stays the reference
    assert valid.tokenizer.decode(valid.ids(0)) == " a"


def test_a_byte_level_tokenizer_knows_every_character(config):
    assert not unknown_characters(Tokenizer.train(["abc"] * 9, 258), ["é ß"])


def test_a_tokenizer_whose_first_token_is_text_is_refused(config, tmp_path):
    tokenizer = Tokenizer.train_characters([SAID])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    parsed = json.loads(path.read_text())
    vocabulary = parsed["model"]["vocab"]
    vocabulary["a"], vocabulary["<|endoftext|>"] = 0, vocabulary["a"]
    parsed["added_tokens"] = []
    path.write_text(json.dumps(parsed))
    write_lines(config, f"clips/train0.wav\t{SAID}")
    with pytest.raises(UserError, match="has the id 0 for a part of `abc cab`, but CTC reads"):
        data.prepare_data(replace(config, tokenizer=str(path)))


def test_settings_without_data_are_checked(config):
    for settings, expected in (
        ({"sample_rate": 22_050}, "must be a multiple of 100; set data.sample_rate=2"),
        ({"characters": False, "vocab_size": 30}, "or data.characters=true"),
    ):
        with pytest.raises(ConfigError, match=expected):
            data.prepare_data(replace(config, **settings))


def test_a_folder_without_transcripts_is_refused(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.tsv file of .* reads train\.tsv, valid\.tsv"):
        data.prepare_data(replace(config, path=str(tmp_path / "empty")))
    (tmp_path / "empty" / "test.tsv").write_text("a.wav\tb\n")
    with pytest.raises(UserError, match="has test but no train split; add train"):
        data.prepare_data(replace(config, path=str(tmp_path / "empty")))


def test_a_changed_recording_is_read_again(config, caplog):
    data.prepare_data(config)
    before = data.open_split(config, "train").frames(0, None)
    write_sound(config, "clips/train0.wav", tiny.sound_of("z" * 9, RATE))
    with pytest.raises(ConfigError, match="prepared again"):
        data.open_split(config, "train")
    with caplog.at_level(logging.WARNING):
        data.prepare_data(config)
    assert len(data.open_split(config, "train").frames(0, None)) != len(before)
