"""The steps of one process, in plain torch, that a layout is compared with."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainer.compress.compression import Compression
from trainer.config.train import CompressConfig, VerifyConfig
from trainer.lora.adapter import add_adapters
from trainer.model import Transformer
from trainer.nn.heads import Head
from trainer.optim.lr_schedule import learning_rate_at
from trainer.optim.registry import reference_optimizers
from trainer.tasks.registry import task_of_model
from trainer.tasks.task import Task
from trainer.verify.auxiliary_losses import reference_joint_loss, reference_match
from trainer.verify.cases import draw_rows, make_batch, random_teacher, round_frozen

LABEL_SMOOTHING = 0.1


@dataclass
class Record:
    """Losses, norms and gradients per step, and the last weights; of a layout, the local shards."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    places: dict[str, tuple[slice, ...]] = field(default_factory=dict)


def reference_loss(
    model: Transformer,
    batch: dict[str, Tensor],
    teacher: Transformer | None,
    compress: CompressConfig,
    task: Task,
) -> Tensor:
    """Return the mean loss of a global batch, by torch's own functions alone."""
    heads = [head for head in model.auxiliary_heads.values() if isinstance(head, Head)]
    turn = [] if model.ctc is None else [model.encoder_depth - 1]
    matched = [ours for ours, _ in compress.match]
    blocks = [*map(int, model.auxiliary_heads), *matched, *turn]
    logits, made = _forward_with_blocks(model, batch, blocks)
    batch = batch | {"targets": model.resized_targets(batch["targets"])}
    loss = task.reference_loss(logits, batch, LABEL_SMOOTHING)
    if turn:
        loss = reference_joint_loss(model, made.pop(), batch, loss)
    for head in heads:
        early = head.output(head.normalized(made.pop(0)))
        loss = loss + task.reference_loss(early, batch, LABEL_SMOOTHING)
    if teacher is None:
        return loss
    with torch.no_grad():
        told, theirs = _forward_with_blocks(teacher, batch, [block for _, block in compress.match])
    apart = task.reference_divergence(logits, told, batch, compress.temperature)
    weight = compress.distill_weight
    loss = (1 - weight) * loss + weight * compress.temperature**2 * apart
    for (block, _), ours, his in zip(compress.match, made, theirs, strict=True):
        of_source = model.blocks[str(block)].stream == "source"
        loss = loss + compress.match_weight * reference_match(ours, his, batch, of_source)
    return loss


def _forward_with_blocks(
    model: Transformer, batch: dict[str, Tensor], blocks: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits and the blocks' outputs; the last encoder block puts its own second."""
    outputs: dict[int, tuple] = {}
    hooks = [
        model.blocks[str(i)].register_forward_hook(lambda _m, _x, y, i=i: outputs.update({i: y}))
        for i in blocks
    ]
    logits = model(batch)
    for hook in hooks:
        hook.remove()
    turns = model.encoder_depth - 1 if model.decodes else -1
    return logits, [outputs[i][int(i == turns)] for i in blocks]


def run_reference(config: VerifyConfig, size: int) -> Record:
    """Take the same steps, of `size` samples, in one process with plain torch alone."""
    model_config, optim = config.model, config.optim
    model = Transformer(model_config, torch.float64).double()
    compression = Compression(CompressConfig() if config.lora.rank else config.compress)
    compression.reshape_model(model)
    add_adapters(model, config.lora)
    for name, parameter in model.named_parameters():
        rows = draw_rows(model_config, config.seed, name, parameter.shape, 0, parameter.shape[0])
        parameter.data.copy_(rows)
    if config.lora.rank and config.compress.bits:
        round_frozen(model, config.compress)
    teacher = random_teacher(model_config, config.seed) if config.compress.teacher else None
    names = dict(model.named_parameters())
    optimizers = reference_optimizers(names, optim)
    record = Record([], [], [], {})
    compression.prepare_step(0, config.steps)
    for step in range(config.steps):
        batch = make_batch(model_config, config.seed, step, size, config.task)
        task = task_of_model(model_config, config.task)
        loss = reference_loss(model, batch, teacher, config.compress, task)
        model.zero_grad()
        loss.backward()
        record.losses.append(loss.item())
        record.gradients.append({n: p.grad.clone() for n, p in names.items() if p.grad is not None})
        norm = nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm or math.inf)
        record.norms.append(norm.item())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config.steps, optim)
            optimizer.step()
        compression.prepare_step(step + 1, config.steps)
    record.weights = {n: p.detach().clone() for n, p in names.items()}
    return record
