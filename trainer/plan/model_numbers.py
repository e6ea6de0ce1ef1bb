"""Numbers of a model that do not change with its layout, each worked out once; torch-free."""

from functools import cache, partial

from trainer.config.train import CompressConfig, LoraConfig, ModelConfig, is_encoder_decoder
from trainer.plan import parameters as count
from trainer.plan.block_memory import (
    CAST_GRADIENTS,
    SHARDED_GRADIENTS,
    WHOLE_GRADIENTS,
    Sequence,
    Setting,
    block_bytes,
    embedding_bytes,
    input_bytes,
    layer_extras,
    loss_bytes,
    shared_bytes,
)
from trainer.plan.numbers import Numbers, Part, RankNumbers, StageNumbers
from trainer.plan.parameters import Parameters
from trainer.plan.rank_plan import DECODER, ENCODER, LAST_ENCODER, RankPlan, Stage, rank_plans

# Bytes of a weight at rest, and of what is computed with it.
PRECISION_BYTES = {"fp64": (8, 8), "fp32": (4, 4), "bf16": (4, 2), "fp16": (4, 2), "fp8": (4, 2)}


class ModelNumbers:
    """The numbers of one model's training: of blocks, stages and ranks, under each split."""

    def __init__(
        self,
        model: ModelConfig,
        source: Sequence | None,
        target: Sequence | None,
        *,
        precision: str = "bf16",
        optimizer: str = "adamw",
        lora: LoraConfig | None = None,
        compress: CompressConfig | None = None,
        chunks: int = 1,
        fused_norm: bool = True,
    ):
        """`source` is the encoder's sequence, in vectors; `target` the decoder's."""
        self.model, self.source, self.target = model, source, target
        self._parameter_bytes, self._compute_bytes = PRECISION_BYTES[precision]
        self._optimizer, self._chunks, self._fused_norm = optimizer, chunks, fused_norm
        self._lora, self._compress = lora or LoraConfig(), compress or CompressConfig()
        self._numbers = cache(self._build_numbers)
        self._plans = cache(partial(rank_plans, model))
        self._ends = cache(self._build_ends)
        self._blocks = cache(self._build_blocks)
        self._parameters = cache(self._build_parameters)
        self._ranks = cache(self._build_ranks)

    def _build_ranks(
        self, cut: tuple, split: tuple, mode: str, copies: bool, sharded: bool
    ) -> list[tuple[RankPlan, RankNumbers]]:
        """Return the plan and the numbers of each pipeline rank."""
        numbers, tensor, found = self._numbers(*split), split[0], []
        style = CAST_GRADIENTS if copies else WHOLE_GRADIENTS
        style = SHARDED_GRADIENTS if sharded else style
        made: dict[Stage, StageNumbers] = {}
        for plan in self._plans(*cut):
            blocks, ends = self._parameters(plan.stages, tensor)
            for one in plan.stages:
                if one not in made:
                    made[one] = self._build_stage(one, numbers, tensor, mode, style)
            stages = tuple(made[one] for one in plan.stages)
            found.append((plan, RankNumbers(stages, blocks, ends, blocks + ends)))
        return found

    def _build_stage(
        self, stage: Stage, numbers: Numbers, tensor: int, mode: str, style: str
    ) -> StageNumbers:
        """Return the numbers of a stage."""
        parts, loss, copies = numbers.parts, numbers.loss, style == CAST_GRADIENTS
        block = max((parts[kind] for kind, _ in stage.blocks), key=_size)
        blocks, ends = self._parameters((stage,), tensor)
        work, one = block.bytes.recomputed[mode], block.bytes.kept[mode]
        extras = block.more + copies * block.copies
        if mode == "none":
            one += extras
        else:
            work += extras
        more = sum(number * parts[kind].bytes.gradients for kind, number in stage.blocks)
        head = self._ends(tensor)[1]
        return StageNumbers(
            self._stage_kept(stage, numbers, mode, copies),
            loss.kept if stage.last else 0.0,
            more + (loss.logits if stage.last else 0.0),
            blocks + ends,
            head.learned if stage.last else 0.0,
            stage.last,
            block,
            sum(number for _, number in stage.blocks),
            one,
            (work + block.bytes.backward[style][0], work + block.bytes.backward[style][1]),
            (loss.hidden + copies * numbers.head) if stage.last else 0.0,
        )

    def _stage_kept(self, stage: Stage, numbers: Numbers, mode: str, copies: bool) -> float:
        """Return what one micro-batch keeps in a stage, without its loss."""
        kept, kinds = numbers.shared, [kind for kind, _ in stage.blocks]
        for kind, number in stage.blocks:
            part = numbers.parts[kind]
            more = part.more + copies * part.copies if mode == "none" else 0.0
            kept += number * (part.bytes.kept[mode] + more)
        if DECODER not in kinds:
            kept += numbers.target
        elif LAST_ENCODER not in kinds:
            kept += numbers.memory
        received = numbers.parts[kinds[0]].bytes.received if mode == "none" else 0.0
        kept += numbers.embedding if stage.first else received
        if stage.last:
            return kept + numbers.loss.hidden + copies * numbers.head
        return kept + numbers.parts[kinds[-1]].bytes.output

    def _build_parameters(
        self, stages: tuple[Stage, ...], tensor: int
    ) -> tuple[Parameters, Parameters]:
        """Return the parameters of these stages' blocks, and those of the ends that they have."""
        blocks, ends, kinds = Parameters(), Parameters(), self._blocks(tensor)
        for stage in stages:
            for kind, number in stage.blocks:
                blocks += number * kinds[kind]
        first = any(stage.first for stage in stages)
        last = any(stage.last for stage in stages)
        embedding, head, tied_head, tables = self._ends(tensor)
        ends += embedding if first else Parameters()
        if last:
            ends += tied_head if first else head
        return blocks, ends + tables

    def _build_ends(self, tensor: int) -> tuple[Parameters, Parameters, Parameters, Parameters]:
        model, lora = self.model, self._lora
        return (
            count.embedding_parameters(model, tensor, lora),
            count.head_parameters(model, tensor, lora),
            count.head_parameters(model, tensor, lora, count.is_tied(model)),
            count.bias_tables(model, lora),
        )

    def _build_numbers(
        self, tensor: int, sequence_parallel: bool, context: int, method: str, samples: int
    ) -> Numbers:
        """Return the numbers of each kind of block, the loss, the embedding and what is shared."""
        model = self.model
        setting = Setting(
            samples,
            tensor,
            sequence_parallel,
            context,
            method,
            self._compute_bytes,
            self._parameter_bytes,
            self._fused_norm,
            self._lora,
            self._compress,
        )
        last = self.target or self.source
        assert last is not None
        sequences = [sequence for sequence in (self.source, self.target) if sequence is not None]
        two, vector = is_encoder_decoder(model), self._compute_bytes * model.width
        return Numbers(
            self._build_parts(setting),
            loss_bytes(model, last, setting, self._chunks),
            self._compute_bytes * self._ends(tensor)[1].matrices,
            input_bytes(model, self.source, self.target, samples),
            embedding_bytes(model, self.source, setting),
            shared_bytes(model, sequences, setting),
            setting.rows(self.source.length) * vector if two and self.source else 0.0,
            setting.rows_between(last.length) * vector if two else 0.0,
        )

    def _build_blocks(self, tensor: int) -> dict[str, Parameters]:
        """Return the parameters of each kind of block."""
        two = is_encoder_decoder(self.model)
        return {
            kind: count.block_parameters(
                self.model,
                tensor,
                self._lora,
                two and kind == DECODER,
                two and kind == LAST_ENCODER,
            )
            for kind in (ENCODER, LAST_ENCODER, DECODER)
        }

    def _build_parts(self, setting: Setting) -> dict[str, Part]:
        """Return the numbers of each kind of block."""
        model, parts = self.model, {}
        two = is_encoder_decoder(model)
        for kind, own, memory in (
            (ENCODER, self.source, None),
            (LAST_ENCODER, self.source, None),
            (DECODER, self.target, self.source if two else None),
        ):
            if own is None:
                continue
            turns = two and kind == LAST_ENCODER
            found = self._blocks(setting.tensor)[kind]
            copies = self._compute_bytes * (found.matrices + found.small)
            more = layer_extras(model, own, setting, 3 if memory else 2)
            parts[kind] = Part(block_bytes(model, own, setting, memory, turns), found, copies, more)
        return parts


def _size(part: Part) -> int:
    return part.parameters.total
