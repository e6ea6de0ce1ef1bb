"""Output heads, from hidden states to logits; one class for each value of model.outputs."""

# B batch, S sequence, D width, V vocabulary.

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.config.loss import IGNORED
from trainer.config.train import ModelConfig, classes_of, outputs_of
from trainer.nn.boxes import patch_targets
from trainer.nn.layers import ACTIVATIONS, Linear, Norm, final_norm
from trainer.nn.sequence import Context, SequenceInfo


class Head(nn.Module):
    """Final norm (see `final_norm`) and projection to next-token logits at each position.

    With `defers_output` a model in training returns the hidden states; the loss projects them.
    """

    defers_output = False
    shows_logits = False  # whether more than the loss reads a model's logits in training
    bias = False  # whether the projection has a bias
    pools = False  # whether the logits are of the sequence, on every rank that shares it
    whole = False  # whether every rank that shares a sequence has all its logits in training

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = final_norm(config)
        self.scale = config.output_scale
        self.ctc_weight = config.ctc_weight  # of the loss, beside that of the logits
        # At each position, so that a rank works on its own ones; only what is pooled is read.
        self.dense = self.dense_norm = None
        if config.head_dense:
            self.dense = Linear(config.width, config.width, bias=config.bias)
            self.dense_norm = self.norm_of_dense(config)
        self.activation = self.activation_of(config)
        bias = self.bias or config.head_dense
        self.output = Linear(config.width, classes_of(config), bias=bias)

    def forward(self, x_BSD: Tensor, stream: SequenceInfo) -> Tensor:
        x_BSD = self.pooled(stream.gather_local(self.normalized(x_BSD)), stream)
        x_BSD = x_BSD if self.scale == 1.0 else x_BSD * self.scale
        return x_BSD if self.defers_output and self.training else self.output(x_BSD)

    def normalized(self, x_BSD: Tensor) -> Tensor:
        """Return the hidden states behind the final norm and the dense layer, if there is one."""
        x_BSD = self.norm(x_BSD)
        if self.dense is not None and self.dense_norm is not None:
            x_BSD = self.dense_norm(self.activation(self.dense(x_BSD)))
        return x_BSD

    @staticmethod
    def activation_of(config: ModelConfig) -> Callable[[Tensor], Tensor]:
        """Return the activation of the dense layer."""
        return ACTIVATIONS[config.activation]

    @staticmethod
    def norm_of_dense(config: ModelConfig) -> nn.Module:
        """Return the norm behind the dense layer."""
        return Norm(config)

    def pooled(self, x_BSD: Tensor, stream: SequenceInfo) -> Tensor:
        """Return the hidden states to project: those of the local positions, unpooled."""
        return x_BSD

    @staticmethod
    def logits_shape(config: ModelConfig, length: int) -> tuple[int, ...]:
        """Return the shape of one sample's logits on a rank with `length` local positions."""
        return length, classes_of(config)

    @staticmethod
    def position_targets(config: ModelConfig, targets: Tensor) -> Tensor:
        """Return what each position learns, of the targets of the data."""
        return targets

    @staticmethod
    def resized_targets(targets: Tensor, length_left: Callable[[int], int]) -> Tensor:
        """Return the targets for a sequence that an encoder shortens: the same."""
        return targets

    @staticmethod
    def local_targets(targets_BS: Tensor, context: Context) -> Tensor:
        """Return the targets of the local positions; IGNORED where this rank's slice is padding."""
        if not context.shares:
            return targets_BS
        real_S = (
            context.local_positions(targets_BS.shape[1], targets_BS.device) < targets_BS.shape[1]
        )
        return torch.where(real_S, context.take_local(targets_BS), IGNORED)


class ClassifierHead(Head):
    """Classification head: pool the full sequence, then project to class logits."""

    bias = True
    pools = whole = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.pool = config.pool

    @staticmethod
    def activation_of(config: ModelConfig) -> Callable[[Tensor], Tensor]:
        """Return the activation of the dense layer."""
        return torch.tanh

    @staticmethod
    def norm_of_dense(config: ModelConfig) -> nn.Module:
        """Return no norm: the classes are read from the dense layer."""
        return nn.Identity()

    def pooled(self, x_BSD: Tensor, stream: SequenceInfo) -> Tensor:
        """Return one vector per sample, (B,D): the class token or the (size-weighted) mean."""
        x_BSD = stream.context.gather_sequence(x_BSD, stream.total)
        if self.pool == "class_token":
            return x_BSD[:, 0]
        if stream.marks_BS2 is not None or stream.valid_BS is not None:
            sizes_BS = stream.marks_of(len(x_BSD))[..., 0].to(x_BSD.dtype)
            return (x_BSD * (sizes_BS / sizes_BS.sum(1, keepdim=True))[..., None]).sum(dim=1)
        return x_BSD.mean(dim=1)

    @staticmethod
    def logits_shape(config: ModelConfig, length: int) -> tuple[int, ...]:
        """Return the shape of one sample's logits."""
        return (classes_of(config),)

    @staticmethod
    def local_targets(targets_B: Tensor, context: Context) -> Tensor:
        """Return the targets on the first context rank, else IGNORED: every rank has all logits."""
        if not context.shares or context.first:
            return targets_B
        return torch.full_like(targets_B, IGNORED)


class CTCHead(Head):
    """Head of CTC (Graves 2006): the logits of a character, or none, for each vector.

    The loss couples all vectors of a sample: in training every rank of the context axis has them.
    """

    whole = True

    def pooled(self, x_BSD: Tensor, stream: SequenceInfo) -> Tensor:
        """Return the hidden states of all positions; of the local ones, in evaluation."""
        return stream.context.gather_sequence(x_BSD, stream.total) if self.training else x_BSD

    @staticmethod
    def resized_targets(targets_BS: Tensor, length_left: Callable[[int], int]) -> Tensor:
        """Return the same classes, behind which are as many vectors as are left of a sample."""
        lengths = [length_left(length) for length in range(targets_BS.shape[1] + 1)]
        vectors_B1 = (targets_BS != IGNORED).sum(1, keepdim=True)
        left_B1 = torch.tensor(lengths, device=targets_BS.device)[vectors_B1]
        places_S = torch.arange(lengths[-1], device=targets_BS.device)
        return torch.where(places_S < left_B1, targets_BS[:, : lengths[-1]], IGNORED)

    @staticmethod
    def local_targets(targets_BS: Tensor, context: Context) -> Tensor:
        """Return the targets on the first context rank, else IGNORED: every rank has all logits."""
        return ClassifierHead.local_targets(targets_BS, context)


class BoxHead(Head):
    """Head of a dense detector: at each patch the logits of classes and a box (box_logits.py)."""

    bias = True

    @staticmethod
    def position_targets(config: ModelConfig, targets_BN6: Tensor) -> Tensor:
        """Return what each patch learns (B,P,6), of the boxes of the samples."""
        return patch_targets(targets_BN6, config.image_size // config.patch_size)

    @staticmethod
    def local_targets(targets_BP6: Tensor, context: Context) -> Tensor:
        """Return the targets of the local patches; IGNORED where this rank's slice is padding."""
        if not context.shares:
            return targets_BP6
        patches = targets_BP6.shape[1]
        real_S = context.local_positions(patches, targets_BP6.device) < patches
        return torch.where(real_S[:, None], context.take_local(targets_BP6), float(IGNORED))


class QueryHead(BoxHead):
    """Head of a detector of sets (DETR): the logits of classes and a box for each query.

    Matching couples the queries: in training every rank of the context axis has them all.
    """

    whole = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.queries = config.queries

    def pooled(self, x_BSD: Tensor, stream: SequenceInfo) -> Tensor:
        """Return the hidden states of all queries; of the local ones, in evaluation."""
        return stream.context.gather_sequence(x_BSD, stream.total) if self.training else x_BSD

    @staticmethod
    def position_targets(config: ModelConfig, targets_BN6: Tensor) -> Tensor:
        """Return the boxes: which query learns which is found by the loss."""
        return targets_BN6

    @staticmethod
    def local_targets(targets_BN6: Tensor, context: Context) -> Tensor:
        """Return the targets on the first context rank, else IGNORED: every rank has all logits."""
        return ClassifierHead.local_targets(targets_BN6, context)


OUTPUTS: dict[str, type[Head]] = {
    "tokens": Head,
    "classes": ClassifierHead,
    "ctc": CTCHead,
    "boxes": BoxHead,
}


def head_type(config: ModelConfig) -> type[Head]:
    """Return the class of a model's head."""
    if config.queries and outputs_of(config) == "boxes":
        return QueryHead
    return OUTPUTS[outputs_of(config)]


def auxiliary_heads(config: ModelConfig) -> dict[str, Head]:
    """Build the heads behind all decoder blocks but the last, by the block's name."""
    if not config.auxiliary_heads:
        return {}
    first = config.encoder_layers or config.layers
    return {str(first + i): head_type(config)(config) for i in range(config.layers - 1)}
