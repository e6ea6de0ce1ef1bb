"""Validate models of audio, and training by CTC: pure functions that collect all problems."""

from trainer.config.train import (
    CompressConfig,
    DataConfig,
    ModelConfig,
    TrainConfig,
    inputs_of,
    outputs_of,
)


def audio_problems(model: ModelConfig) -> list[str]:
    """Return the problems of a model's audio, and of logits of CTC."""
    found = []
    if inputs_of(model) == "audio" and model.family == "decoder":
        found.append(
            "model.inputs=audio is for model.family=encoder and encoder_decoder, but model.family="
            "decoder reads tokens; set model.inputs=auto"
        )
    if model.audio_stride == 3:
        found.append("model.audio_stride=3 must be 2 or 4: a convolution halves; try 2, 4")
    if model.audio_fill == "silence" and (inputs_of(model) != "audio" or not model.audio_positions):
        found.append(
            "model.audio_fill=silence fills audio up to model.audio_positions, but model.inputs="
            f"{inputs_of(model)} and model.audio_positions={model.audio_positions}; set "
            "model.audio_fill=mask, or model.audio_positions, e.g. 1500 vectors for 30 s"
        )
    if outputs_of(model) == "ctc" and (model.family, inputs_of(model)) != ("encoder", "audio"):
        found.append(
            "model.outputs=ctc is for model.family=encoder with model.inputs=audio, but they are "
            f"{model.family} and {inputs_of(model)}; set model.outputs=auto"
        )
    if (model.family, inputs_of(model), outputs_of(model)) == ("encoder", "audio", "classes"):
        found.append(
            "model.inputs=audio of model.family=encoder is learned by CTC, but model.outputs="
            f"{model.outputs} gives classes; set model.outputs=ctc"
        )
    joint = 0 < model.ctc_weight < 1  # other values are refused by their range
    if joint and (model.family, inputs_of(model)) != ("encoder_decoder", "audio"):
        found.append(
            f"model.ctc_weight={model.ctc_weight:g} is for model.family=encoder_decoder with "
            f"model.inputs=audio, but they are {model.family} and {inputs_of(model)}; set "
            "model.ctc_weight=0"
        )
    return found


def audio_data_problems(model: ModelConfig, data: DataConfig) -> list[str]:
    """Return the differences of a model's frames from those of the data."""
    seconds = model.audio_positions * model.audio_stride / 100
    found = []
    if 0 < seconds < data.max_seconds:
        found.append(
            f"data.max_seconds={data.max_seconds:g} is more than model.audio_positions="
            f"{model.audio_positions} hold; set data.max_seconds={seconds:g}"
        )
    return found + [
        f"model.{key}={ours}, but data.{key}={theirs}; set data.{key}={ours}, or the model's as "
        "the data's"
        for key in ("mels", "audio_stride")
        if (ours := getattr(model, key)) != (theirs := getattr(data, key))
    ]


def joint_ctc_problems(config: TrainConfig) -> list[str]:
    """Return the options of training that a joint CTC loss has no meaning for."""
    compress, weight = config.compress, config.model.ctc_weight
    if not 0 < weight < 1:
        return []
    learner = f"model.ctc_weight={weight:g}"
    found = [
        f"compress.{key}={getattr(compress, key):g} leaves fewer vectors than data.audio_stride="
        f"{config.data.audio_stride} was checked with, and {learner} needs one for each "
        f"character, in order; set compress.{key}=0, or model.ctc_weight=0"
        for key in ("merge", "pool_after", "drop")
        if getattr(compress, key)
    ]
    if config.lora.rank:
        found.append(
            f"lora.rank={config.lora.rank} freezes the projection that {learner} learns; set "
            "model.ctc_weight=0"
        )
    return found


def ctc_problems(config: TrainConfig) -> list[str]:
    """Return the options of training that CTC has no meaning for."""
    found, loss = [], config.loss
    if loss.label_smoothing:
        found.append(
            f"loss.label_smoothing={loss.label_smoothing:g} spreads the target of one position, "
            "but model.outputs=ctc sums over alignments; set loss.label_smoothing=0"
        )
    if loss.chunks > 1:
        found.append(
            f"loss.chunks={loss.chunks} computes positions apart, but model.outputs=ctc couples "
            "all of an utterance; set loss.chunks=1"
        )
    return found + _shortened_problems(config.model, config.data, config.compress)


def ctc_compression_problems(compress: CompressConfig, model: ModelConfig) -> list[str]:
    """Return the compression that CTC has no meaning for."""
    found = []
    if compress.drop:
        found.append(
            f"compress.drop={compress.drop:g} leaves patches of images out, but model.outputs=ctc "
            "needs the vectors of all characters, in order; set compress.drop=0"
        )
    found += [
        f"compress.teacher={compress.teacher} teaches vector by vector, but compress.{key}="
        f"{getattr(compress, key)} leaves fewer; set compress.{key}=0, or compress.teacher= for "
        "none"
        for key in ("merge", "pool_after")
        if compress.teacher and compress.distill_weight and getattr(compress, key)
    ]
    if compress.match and compress.match_weight:
        found.append(
            f"compress.match={compress.match} weighs a sample by its targets, one for each "
            "position, which model.outputs=ctc does not have; set compress.match=[]"
        )
    return found


def _shortened_problems(
    model: ModelConfig, data: DataConfig, compress: CompressConfig
) -> list[str]:
    """Return the vectors that compression takes from utterances checked without them."""
    merges = max(0, model.layers - 1 - compress.pool_after)
    wanted = {
        "pooled_vectors": compress.pool_stride if compress.pool_after else 1,
        "merged_vectors": compress.merge * merges,
    }
    return [
        f"data.{key}={getattr(data, key)} is what utterances are checked with, to have vectors "
        f"left for their characters, but with compress.merge={compress.merge} and "
        f"compress.pool_after={compress.pool_after} it is {count}; set data.{key}={count}"
        for key, count in wanted.items()
        if getattr(data, key) != count
    ]
