"""Refuse what does not go with audio and CTC, with the key."""

from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from conf import schema
from conf.validation.validate import fill_from_data, find_problems
from launch.cli.inputs import with_audio_of_model
from parallel.errors import ConfigError
from trainer.data import DataFacts

CONF = Path(__file__).parents[2] / "conf"
JOINT = "model=whisper-tiny model.ctc_weight=0.3"
BAD = {
    "model.ctc_weight=0.3": "set model.ctc_weight=0",
    f"{JOINT} lora.rank=2 init_from=runs/other": "freezes the projection that model.ctc_weight=0.3",
    f"{JOINT} compress=merge": "set compress.merge=0, or model.ctc_weight=0",
    "model=gpt-tiny model.inputs=audio": "model.inputs=audio is for model.family=encoder and",
    "model.audio_stride=3": "model.audio_stride=3 must be 2 or 4",
    "model=vit-tiny model.outputs=ctc": "model.outputs=ctc is for model.family=encoder with",
    "model.outputs=classes": "is learned by CTC, but model.outputs=classes gives classes; set "
    "model.outputs=ctc",
    "loss.label_smoothing=0.1": "set loss.label_smoothing=0",
    "loss.chunks=2": "couples all of an utterance; set loss.chunks=1",
    "compress=merge": "set data.merged_vectors=6",
    "compress.pool_after=1": "set data.pooled_vectors=2",
    "compress=drop": "needs the vectors of all characters, in order; set compress.drop=0",
    "compress.teacher=runs/other compress.merge=1": "teaches vector by vector, but compress.merge",
    "compress.match=[[0,0]] compress.match_weight=1": "set compress.match=[]",
}


def configured(*overrides):
    schema.register_schemas("now")
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return schema.build_config("train", compose("train", ["experiment=speech", *overrides]))


@pytest.mark.parametrize("overrides", BAD)
def test_what_does_not_go_with_speech_is_refused(overrides):
    found = find_problems(configured(*overrides.split()), 1)
    assert any(BAD[overrides] in problem for problem in found), found


def test_the_model_fixes_what_is_read_and_learned():
    whisper = with_audio_of_model(configured("model=whisper-tiny"), []).data
    assert (whisper.targets, whisper.sample_rate, whisper.standardize) == ("tokens", 16_000, False)
    assert (whisper.mels, whisper.audio_stride, whisper.path) == (80, 2, "bundled:speech")
    joint = with_audio_of_model(configured(*JOINT.split()), []).data
    assert joint.targets == "both"
    given = configured("model=whisper-tiny", "data.mels=40")
    with pytest.raises(ConfigError, match=r"data\.mels=40, but this model reads .*data\.mels=80"):
        with_audio_of_model(given, ["data.mels=40"])
    ours = configured()
    assert with_audio_of_model(ours, []) == ours


def test_more_ranks_than_heads_or_layers_are_answered_with_what_fits():
    for preset, near in (("tensor", "try 1, 2, 4"), ("pipeline", "strategy.pipeline=4")):
        found = find_problems(configured(f"strategy={preset}"), 8)
        assert any(near in problem for problem in found), found


def test_the_frames_of_a_model_are_those_of_its_data():
    config = configured("model.mels=80", "model.audio_stride=2")
    with pytest.raises(ConfigError) as refused:
        fill_from_data(config, DataFacts(vocab_size=30, mels=40))
    assert refused.value.problems == [
        "model.mels=80, but data.mels=40; set data.mels=80, or the model's as the data's",
        "model.audio_stride=2, but data.audio_stride=4; set data.audio_stride=2, or the model's as "
        "the data's",
    ]
    whole = replace(config, model=replace(config.model, mels=0, audio_stride=4))
    assert fill_from_data(whole, DataFacts(vocab_size=30, mels=40)).model.mels == 40
