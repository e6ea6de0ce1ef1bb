"""Interface between compression and training: one method for each point at which it acts."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule

from parallel.grad_norm import local_tensor
from trainer.compress.distillation import (
    TeacherOutput,
    local_logits,
    recorded_teacher_logits,
    run_teacher,
)
from trainer.compress.hidden_states import add_hidden_state_loss
from trainer.compress.quantized_linear import CompressedLinear, QuantizationSpec
from trainer.compress.sequence_reduction import (
    DropPatches,
    LengthenText,
    MergeTokens,
    PoolImage,
    PoolText,
    ShortenText,
)
from trainer.compress.structured_pruning import Pruning
from trainer.config.train import CompressConfig, classes_of
from trainer.model import Transformer
from trainer.nn.embeddings import PatchEmbedding
from trainer.nn.heads import Head
from trainer.nn.layers import Linear
from trainer.nn.sequence import Flow, Inputs, Resize, Sequences

log = logging.getLogger(__name__)


@dataclass
class Compression:
    """All techniques that config.compress enables; independent of the parallel strategy."""

    config: CompressConfig
    lens: QuantizationSpec = field(init=False)
    pruning: Pruning | None = field(init=False)
    # The full frozen teacher, set by training on every rank that `asks`; None in evaluation.
    teacher: Transformer | None = None
    _said: TeacherOutput | None = None  # teacher output for the current micro-batch

    def __post_init__(self) -> None:
        c = self.config
        self.lens = QuantizationSpec(
            c.bits, c.group, c.input_bits if c.bits else 0, c.sparse_n, c.sparse_m
        )
        self.pruning = Pruning(c) if c.prune_heads or c.prune_ffn else None

    def reshape_model(self, model: Transformer) -> None:
        """Apply compression to a built model; call it before parallelism is applied."""
        if isinstance(model.embed, PatchEmbedding):
            model.resizes |= _image_resizes(self.config, model)
        elif model.encoder_depth:
            model.resizes |= _source_resizes(self.config, model)
        else:
            model.resizes |= _text_resizes(self.config, model)
        if self.lens.bits or self.lens.n:
            model.blocks.apply(self._quantize_layer)
        if self.pruning is not None:
            self.pruning.register_masks(model.blocks)
        assert isinstance(model.head, Head)
        model.head.shows_logits = bool(self.config.teacher and self.config.distill_weight)
        for block in self._matched_blocks:
            hook = partial(self._match_hidden_state, model, block)
            model.block_hooks[str(block)].append(hook)

    def wrap_loss(
        self,
        loss_sum: Callable[..., Tensor],
        divergence_sum: Callable[..., Tensor],
        model: Transformer,
    ) -> Callable[..., Tensor]:
        """Return the loss function (logits, targets, inputs, count) -> sum over valid targets.

        `loss_sum` takes no inputs, `divergence_sum` (logits, teacher's logits, targets,
        temperature). Options are passed to the cross-entropy. With distillation the result is the
        weighted sum of the loss and the divergence times temperature².
        """
        weight, temperature = self.config.distill_weight, self.config.temperature

        def distilled(
            logits: Tensor, targets: Tensor, inputs: Inputs, count: int, **options: Any
        ) -> Tensor:
            total = loss_sum(logits, targets, count, **options)
            teacher_logits = self._teacher_logits(model, inputs) if weight else None
            if teacher_logits is None:
                return total
            divergence = divergence_sum(logits, teacher_logits, targets, temperature, **options)
            return (1 - weight) * total + weight * temperature**2 * divergence

        return distilled

    @property
    def uses_distillation(self) -> bool:
        """Return whether a teacher contributes to the loss."""
        return bool(self.config.teacher and (self.config.distill_weight or self._matched_blocks))

    def needs_teacher(self, model: Transformer) -> bool:
        """Return whether the local part of a model needs the teacher's logits or hidden states."""
        return self._ends_on(model) or bool(self._local_matches(model))

    def _ends_on(self, model: Transformer) -> bool:
        """Return whether this rank has the head and distills the teacher's logits."""
        return model.head is not None and bool(self.config.distill_weight)

    @property
    def _matched_blocks(self) -> dict[int, int]:
        """Return the teacher's block for each block whose hidden states are matched."""
        match = self.config.match if self.config.match_weight else []
        return {pair[0]: pair[1] for pair in match}

    def _local_matches(self, model: Transformer) -> dict[int, int]:
        """Return the matched blocks that are on this rank, with the teacher's."""
        return {
            ours: theirs
            for ours, theirs in self._matched_blocks.items()
            if str(ours) in model.blocks
        }

    def _run_teacher(self, model: Transformer, inputs: Inputs) -> TeacherOutput:
        """Return the teacher's output for a micro-batch; it is computed once, then cached."""
        if self._said is None or self._said.targets is not inputs["targets"]:
            assert self.teacher is not None
            blocks = self._local_matches(model).values()
            self._said = run_teacher(self.teacher, inputs, blocks, logits=self._ends_on(model))
        return self._said

    def _teacher_logits(self, model: Transformer, inputs: Inputs) -> Tensor | None:
        """Return the teacher's logits at the local positions, or None without a teacher."""
        if "answer_classes" in inputs:
            return recorded_teacher_logits(inputs, classes_of(model.config), model.context)
        if self.teacher is None:
            return None
        logits = self._run_teacher(model, inputs).logits
        self._said = None  # its last use for this micro-batch
        assert logits is not None
        return logits if model.head_type.whole else local_logits(logits, model.context)

    def _match_hidden_state(
        self,
        model: Transformer,
        block: int,
        flow: Flow,
        streams: Sequences,
        inputs: Inputs,
    ) -> Flow:
        if self.teacher is None or model.scale_auxiliary_loss is None:
            return flow
        states = self._run_teacher(model, inputs).states[self._matched_blocks[block]]
        return add_hidden_state_loss(
            model, str(block), flow, streams, inputs, states, weight=self.config.match_weight
        )

    def prepare_step(self, step: int, steps: int) -> None:
        """Update pruning for a step (0 to `steps` - 1), after the previous optimizer step.

        All ranks must call it.
        """
        self.lens.prunes = step >= self.config.sparse_start * steps
        if self.pruning is not None:
            self.pruning.prune_due(step / steps)

    @torch.no_grad()
    def pack_frozen(self, model: Transformer) -> None:
        """Round the frozen weights of the blocks once, and keep them in few bits, in place.

        Logs their bytes on this rank before and after. Shards of FSDP are rounded, but stay as wide
        as they are.
        """
        before = after = 0
        for module in model.blocks.modules():
            if not isinstance(module, CompressedLinear) or module.weight.requires_grad:
                continue
            if isinstance(model, FSDPModule):
                part = local_tensor(module.weight)
                part.copy_(module.rounded(part).unpack(part.dtype))
                module.is_rounded = True
                before, after = before + part.nbytes, after + part.nbytes
                continue
            weight = module.local_part("weight").detach()
            module.packed = module.rounded(weight)
            module.register_parameter("weight", None)
            before, after = before + weight.nbytes, after + module.packed.nbytes
        if before and dist.get_rank() == 0:
            log.info(
                "the blocks' frozen weights, of %.4g MB on this rank, take %.4g MB in %d bits",
                *(before / 1e6, after / 1e6, self.lens.bits),
            )

    def _quantize_layer(self, module: nn.Module) -> None:
        if type(module) is Linear:
            module.__class__ = CompressedLinear
            assert isinstance(module, CompressedLinear)
            module.lens = self.lens


def rounded_weight(weight: Tensor, config: CompressConfig) -> Tensor:
    """Return a whole frozen weight as its layer uses it, in float32 or wider."""
    with torch.device("meta"):
        layer = CompressedLinear(1, 1)
    layer.lens = Compression(config).lens
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return layer.rounded(wide).unpack(wide.dtype)


def _image_resizes(config: CompressConfig, model: Transformer) -> dict[int, Resize]:
    """Return the resizes of an image classifier, by the block that each follows."""
    kept = int(model.config.pool == "class_token")
    side = model.config.image_size // model.config.patch_size
    found: dict[int, Resize] = {}
    if config.drop:
        found[-1] = DropPatches(config.drop, kept)
    if config.merge:
        found |= {
            i: MergeTokens(config.merge, kept) for i in range(config.pool_after, model.depth - 1)
        }
    if config.pool_after:
        found[config.pool_after - 1] = PoolImage(config.pool_stride, side, kept)
    return found


def _source_resizes(config: CompressConfig, model: Transformer) -> dict[int, Resize]:
    """Return the resizes of an encoder-decoder's source, by the encoder block that each follows."""
    last = model.encoder_depth - 1
    found: dict[int, Resize] = {}
    if config.merge:
        found |= {i: MergeTokens(config.merge, kept=0) for i in range(config.pool_after, last)}
    if config.pool_after:
        found[config.pool_after - 1] = PoolText(config.pool_stride)
    return found


def _text_resizes(config: CompressConfig, model: Transformer) -> dict[int, Resize]:
    """Return the resizes of a decoder: the first and last `pool_after` blocks stay full length."""
    if not config.pool_after:
        return {}
    stride, last = config.pool_stride, model.depth - config.pool_after - 1
    return {config.pool_after - 1: ShortenText(stride), last: LengthenText(stride)}
