"""The contract of a compression: the moments of a run at which it may act, and who does."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from trainer.compress.distillation import Said, ask, divergence_sum, kept_answer, part_of
from trainer.compress.hidden_states import learn
from trainer.compress.quantized_linear import CompressedLinear, Lens
from trainer.compress.sequence_reduction import Drop, Lengthen, Merge, PoolImage, PoolText, Shorten
from trainer.compress.structured_pruning import Pruning
from trainer.config.train import CompressConfig, classes_of
from trainer.model import Transformer
from trainer.nn.embeddings import PatchEmbedding
from trainer.nn.layers import Linear
from trainer.nn.sequence import Flow, Inputs, Resize, Stream


@dataclass
class Compression:
    """All that config.compress asks for. No strategy knows it, and it knows no strategy."""

    config: CompressConfig
    lens: Lens = field(init=False)
    pruning: Pruning | None = field(init=False)
    # Frozen and whole, given by whoever trains to every rank that `asks`; reading needs none.
    teacher: Transformer | None = None
    _said: Said | None = None  # of the micro-batch at hand

    def __post_init__(self) -> None:
        c = self.config
        self.lens = Lens(c.bits, c.group, c.input_bits if c.bits else 0, c.sparse_n, c.sparse_m)
        self.pruning = Pruning(c) if c.prune_heads or c.prune_ffn else None

    def reshape(self, model: Transformer) -> None:
        """Change a model that is built and not yet spread over ranks."""
        if isinstance(model.embed, PatchEmbedding):
            model.resizes |= _of_images(self.config, model)
        elif model.encoder_depth:
            model.resizes |= _of_sources(self.config, model)
        else:
            model.resizes |= _of_texts(self.config, model)
        if self.lens.bits or self.lens.n:
            model.blocks.apply(self._swap)
        if self.pruning is not None:
            self.pruning.reshape(model.blocks)
        for block in self._matched:
            model.watchers[str(block)] = partial(self._match, model, block)

    def loss(self, loss_sum: Callable[..., Tensor], model: Transformer) -> Callable[..., Tensor]:
        """Change what is learned: (logits, targets, inputs) -> sum over valid targets.

        `loss_sum` is that of (logits, targets) alone. Options go to whatever adds up classes.
        """
        weight, temperature = self.config.distill_weight, self.config.temperature

        def changed(logits: Tensor, targets: Tensor, inputs: Inputs, **options: Any) -> Tensor:
            learned = loss_sum(logits, targets, **options)
            said = self._answer(model, inputs) if weight else None
            if said is None:
                return learned
            apart = divergence_sum(logits, said, targets, temperature, **options)
            return (1 - weight) * learned + weight * temperature**2 * apart

        return changed

    @property
    def distills(self) -> bool:
        """Return whether a teacher is to have a say in the loss."""
        return bool(self.config.teacher and (self.config.distill_weight or self._matched))

    def asks(self, model: Transformer) -> bool:
        """Return whether what a rank has of a model learns from the teacher's logits or vectors."""
        return self._ends_on(model) or bool(self._here(model))

    def _ends_on(self, model: Transformer) -> bool:
        """Return whether a rank has the logits, and they learn from the teacher's."""
        return model.head is not None and bool(self.config.distill_weight)

    @property
    def _matched(self) -> dict[int, int]:
        """Return the blocks whose vectors learn, and those of the teacher that they learn from."""
        match = self.config.match if self.config.match_weight else []
        return {pair[0]: pair[1] for pair in match}

    def _here(self, model: Transformer) -> dict[int, int]:
        """Those of the blocks that a rank has."""
        return {ours: theirs for ours, theirs in self._matched.items() if str(ours) in model.blocks}

    def _hear(self, model: Transformer, inputs: Inputs) -> Said:
        """Return what the teacher says of a micro-batch.

        It is asked once, whoever wants to know first.
        """
        if self._said is None or self._said.targets is not inputs["targets"]:
            assert self.teacher is not None
            here = self._here(model).values()
            self._said = ask(self.teacher, inputs, here, logits=self._ends_on(model))
        return self._said

    def _answer(self, model: Transformer, inputs: Inputs) -> Tensor | None:
        """Return the teacher's logits at the positions that are here.

        None where there is no teacher.
        """
        if "answer_classes" in inputs:
            return kept_answer(inputs, classes_of(model.config), model.context)
        if self.teacher is None:
            return None
        logits = self._hear(model, inputs).logits
        self._said = None  # nobody asks about the same micro-batch again
        assert logits is not None
        return part_of(logits, model.context)

    def _match(
        self, model: Transformer, block: int, flow: Flow, streams: dict[str, Stream], inputs: Inputs
    ) -> Flow:
        if self.teacher is None or model.share_of_mean is None:
            return flow
        said = self._hear(model, inputs).states[self._matched[block]]
        return learn(
            model, str(block), flow, streams, inputs, said, weight=self.config.match_weight
        )

    def settle(self, step: int, steps: int) -> None:
        """Get ready for a step (0 = the first of `steps`), behind the one before it.

        All ranks call it.
        """
        self.lens.prunes = step >= self.config.sparse_start * steps
        if self.pruning is not None:
            self.pruning.settle(step / steps)

    def _swap(self, module: nn.Module) -> None:
        if type(module) is Linear:
            module.__class__ = CompressedLinear
            assert isinstance(module, CompressedLinear)
            module.lens = self.lens


def _of_images(config: CompressConfig, model: Transformer) -> dict[int, Resize]:
    """Return what shortens the sequence of an image classifier, by the block that it comes
    behind.
    """
    kept = int(model.config.pool == "class_token")
    side = model.config.image_size // model.config.patch_size
    found: dict[int, Resize] = {}
    if config.drop:
        found[-1] = Drop(config.drop, kept)
    if config.merge:
        found |= {i: Merge(config.merge, kept) for i in range(config.pool_after, model.depth - 1)}
    if config.pool_after:
        found[config.pool_after - 1] = PoolImage(config.pool_stride, side, kept)
    return found


def _of_sources(config: CompressConfig, model: Transformer) -> dict[int, Resize]:
    """Return the same of a translation's source: between the blocks of its encoder."""
    last = model.encoder_depth - 1
    found: dict[int, Resize] = {}
    if config.merge:
        found |= {i: Merge(config.merge, kept=0) for i in range(config.pool_after, last)}
    if config.pool_after:
        found[config.pool_after - 1] = PoolText(config.pool_stride)
    return found


def _of_texts(config: CompressConfig, model: Transformer) -> dict[int, Resize]:
    """Return the middle blocks of a language model: as many are left out in front as behind."""
    if not config.pool_after:
        return {}
    stride, behind = config.pool_stride, model.depth - config.pool_after - 1
    return {config.pool_after - 1: Shorten(stride), behind: Lengthen(stride)}
