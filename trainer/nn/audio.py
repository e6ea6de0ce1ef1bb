"""The embedding of audio: Whisper's two convolutions over log-mel frames."""

# B batch, F frames, M mels, S vectors of the sequence, D width.

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.train import ModelConfig
from trainer.nn.layers import Dropout, Linear
from trainer.nn.positions import sinusoids
from trainer.nn.sequence import SequenceInfo

KERNEL = 3  # frames that one output of a convolution reads
# Features of silence: so much below the loudest one, but no less than those of nothing but zeros.
SPAN, SILENCE = 2.0, -1.5


class AudioEmbedding(nn.Module):
    """Two convolutions with gelu, as in Whisper (arXiv 2212.04356), over frames (B,F,M).

    Of every `audio_stride` frames comes one vector; frames are padded with zeros to a multiple of
    it. Where padding makes samples of a batch equally long, its frames must be zero and
    `stream.valid_BS` false: then a sample's vectors do not depend on the others' lengths.
    Sinusoids are added, unless attention encodes the positions (rope, relative).
    """

    source = "frames"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # The first has a stride only if the second's 2 is not all of it.
        self.convolution_1 = Convolution(config.mels, config.width, config.audio_stride // 2)
        self.convolution_2 = Convolution(config.width, config.width, 2)
        self.dropout = Dropout(config.dropout)

    @staticmethod
    def sequence_length(config: ModelConfig, length: int) -> int:
        """Return the sequence length of `length` frames, with the silence behind them."""
        if config.audio_fill == "silence":
            return config.audio_positions
        return -(-length // config.audio_stride)

    @staticmethod
    def source_positions(config: ModelConfig, frames_BFM: Tensor) -> Tensor:
        """Return the positions of the vectors of frames, (1,S)."""
        length = AudioEmbedding.sequence_length(config, frames_BFM.shape[1])
        return torch.arange(length, device=frames_BFM.device)[None]

    def forward(
        self, frames_BFM: Tensor, positions_BS: Tensor, stream: SequenceInfo, dtype: torch.dtype
    ) -> Tensor:
        odd = -frames_BFM.shape[1] % self.config.audio_stride
        x_BFD = F.gelu(self.convolution_1(F.pad(frames_BFM.to(dtype), (0, 0, 0, odd))))
        if stream.valid_BS is not None:
            # The second one reads across the end of a sample: zeros, as beyond the last frame.
            x_BFD = x_BFD * stream.valid_BS.repeat_interleave(2, dim=1)[..., None]
        x_BSD = stream.context.take_local(F.gelu(self.convolution_2(x_BFD)))
        if self.config.positions in ("learned", "sinusoidal"):
            x_BSD = x_BSD + sinusoids(stream.context.take_local(positions_BS), self.config, dtype)
        return self.dropout(stream.layout.local_positions(x_BSD), stream)


def fill_with_silence(frames_BFM: Tensor, valid_BS: Tensor | None, config: ModelConfig) -> Tensor:
    """Return frames of model.audio_positions vectors, with those of silence behind each sample.

    They are what `log_mel` makes of zeros behind the samples: the smallest feature, which depends
    on the largest. `valid_BS` says which vectors of `audio_stride` frames are of the sample.
    """
    missing = config.audio_positions * config.audio_stride - frames_BFM.shape[1]
    assert missing >= 0, f"{frames_BFM.shape[1]} frames are longer than model.audio_positions"
    if valid_BS is not None:
        real_BF = valid_BS.repeat_interleave(config.audio_stride, dim=1)
        frames_BFM = frames_BFM.masked_fill(~real_BF[:, : frames_BFM.shape[1], None], -torch.inf)
    loudest_B11 = frames_BFM.amax(dim=(1, 2), keepdim=True)
    silence_B11 = (loudest_B11 - SPAN).clamp(min=SILENCE)
    frames_BFM = torch.where(frames_BFM == -torch.inf, silence_B11, frames_BFM)
    return torch.cat((frames_BFM, silence_B11.expand(-1, missing, config.mels)), dim=1)


class Convolution(Linear):
    """A convolution over time, padded with a zero at both ends, as one matrix (D, M × kernel)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__(inputs * KERNEL, outputs)
        self.stride = stride

    def forward(self, x_BFM: Tensor) -> Tensor:
        """Return the outputs (B, F / stride, D) of inputs (B,F,M)."""
        windows_BFMK = F.pad(x_BFM, (0, 0, 1, 1)).unfold(1, KERNEL, self.stride)
        return super().forward(windows_BFMK.flatten(2))
