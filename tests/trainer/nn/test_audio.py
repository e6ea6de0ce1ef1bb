"""The embedding of audio beside Whisper's of transformers, and its independence of padding."""

import pytest
import torch
from reference_models import build_reference
from tiny import build
from torch.nn import functional as F

from trainer.config.train import ModelConfig
from trainer.model import Transformer

ENCODER = ModelConfig(
    family="encoder",
    inputs="audio",
    outputs="tokens",
    layers=1,
    width=16,
    heads=2,
    ffn_width=32,
    vocab_size=11,
    mels=5,
    positions="learned",
    sinusoid="whisper",
    init_std=0.3,
    tied=False,
)


def embed(model: Transformer, frames_BFM: torch.Tensor, valid_BS=None) -> torch.Tensor:
    """Return what the first block reads."""
    inputs = {"frames": frames_BFM} | ({} if valid_BS is None else {"source_valid": valid_BS})
    return model._embed_inputs(inputs, model._sequence_infos(inputs, None), None)[0]


def random_frames(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_vectors_are_those_of_whispers_encoder():
    fields = {"d_model": 16, "num_mel_bins": 5, "max_source_positions": 6, "encoder_layers": 0}
    fields |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    theirs = build_reference("WhisperModel", "WhisperConfig", **fields).encoder
    ours, frames_BFM = build(ENCODER), random_frames(2, 12)
    state = theirs.state_dict()
    for i in (1, 2):
        layer = getattr(ours.embed, f"convolution_{i}")
        layer.weight.data = state[f"conv{i}.weight"].flatten(1)
        layer.bias.data = state[f"conv{i}.bias"]
    with torch.no_grad():
        theirs.layer_norm = torch.nn.Identity()
        expected = theirs(frames_BFM.transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(embed(ours, frames_BFM), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("frames", [8, 9, 10, 11])
def test_vectors_do_not_depend_on_padding(frames, stride):
    model = build(ModelConfig(**{**vars(ENCODER), "audio_stride": stride}))
    alone_BFM = random_frames(2, frames)
    expected = embed(model, alone_BFM)
    assert expected.shape[1] == model.embed.sequence_length(model.config, frames)
    padded_BFM = F.pad(alone_BFM, (0, 0, 0, 9))
    longest = model.embed.sequence_length(model.config, frames + 9)
    valid_BS = (torch.arange(longest) < expected.shape[1]).expand(2, -1)
    vectors_BSD = embed(model, padded_BFM, valid_BS)[:, : expected.shape[1]]
    torch.testing.assert_close(vectors_BSD, expected, rtol=0, atol=1e-14)


def test_a_stride_of_four_is_two_strides_of_two():
    model = build(ModelConfig(**{**vars(ENCODER), "audio_stride": 4, "positions": "rope"}))
    frames_BFM, embedding = random_frames(2, 12), model.embed
    x = frames_BFM.transpose(1, 2)
    for layer in (embedding.convolution_1, embedding.convolution_2):
        weight = layer.weight.unflatten(1, (-1, 3))
        x = F.gelu(F.conv1d(x, weight, layer.bias, stride=2, padding=1))
    torch.testing.assert_close(embed(model, frames_BFM), x.transpose(1, 2), rtol=0, atol=1e-14)
