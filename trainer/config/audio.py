"""Settings of the data that a model of audio fixes."""

from trainer.config.model import ModelConfig, inputs_of, is_encoder_decoder

WHISPER_RATE = 16_000  # Hz


def audio_settings(model: ModelConfig) -> dict[str, object]:
    """Return the values of `data.*` that a model fixes: none, if it reads no audio.

    A model that fills with silence reads what Whisper's extractor makes (arXiv 2212.04356).
    """
    if inputs_of(model) != "audio":
        return {}
    targets = "ctc"
    if is_encoder_decoder(model):
        targets = "both" if model.ctc_weight else "tokens"
    if model.audio_fill != "silence":
        return {"targets": targets}
    frames = {"mels": model.mels} if model.mels else {}
    return {
        "targets": targets,
        "sample_rate": WHISPER_RATE,
        "audio_stride": model.audio_stride,
        "standardize": False,
        **frames,
    }
