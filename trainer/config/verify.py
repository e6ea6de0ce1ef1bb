"""The keys of `launch/verify.py`, and the faults that it can plant."""

from dataclasses import dataclass, field

from parallel.config_fields import key
from parallel.strategy import StrategyConfig
from trainer.config.choices import DEVICES, RECOMPUTED
from trainer.config.compress import CompressConfig
from trainer.config.launch import LaunchConfig
from trainer.config.lora import LoraConfig
from trainer.config.model import ModelConfig
from trainer.config.optim import OptimConfig

# Each fault that trainer/verify/faults.py plants → the axis it needs a degree above 1 of; empty =
# any.
FAULT_AXES = {
    "skip_gradient_sum": "",
    "local_target_count": "",
    "local_gradient_norm": "",
    "skip_input_gradient_sum": "tensor",
    "skip_output_sum": "tensor",
    "skip_sequence_gather": "tensor",
    "skip_vocabulary_mask": "tensor",
    "skip_partial_gradient_sum": "tensor",
    "skip_norm_gradient_mean": "tensor",
    "stale_stage_input": "pipeline",
    "skip_tied_gradient_sum": "pipeline",
    "skip_shared_gradient_sum": "pipeline",
    "local_loss_scale": "pipeline",
    "skip_ring_step": "context",
    "skip_factor_gradient_sum": "tensor",
    "count_frozen_weight": "",
}
LORA_FAULTS = ("skip_factor_gradient_sum", "count_frozen_weight")  # they need lora.rank
NEEDS = {
    "tensor": "with strategy.tensor above 1",
    "pipeline": "in a pipeline",
    "context": "with strategy.context_method=ring",
}


@dataclass
class VerifyConfig:
    """Comparison of a layout with one process; read by trainer/verify/compare.py."""

    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    # AdamW makes lr / eps of the rounding in a gradient that is zero (a key's bias): no small eps.
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-2, eps=1e-6, warmup_steps=2, max_grad_norm=0.5)
    )
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    task: str = key(
        "auto",
        "Task whose batches and loss are compared, a data.kind",
        choices={"auto": "that of model.family"}
        | dict.fromkeys(
            ("text", "images", "pairs", "chat", "masked_text", "labelled_text", "detection"),
            "",
        ),
    )
    steps: int = key(3, "Optimizer steps compared", at_least=1)
    seed: int = key(0, "Seed of weights and batches", at_least=0)
    tolerance: float = key(
        1e-10, "Largest difference accepted, relative to the largest entry", at_least=0
    )
    activation_checkpointing: str = key("none", "As in training", choices=RECOMPUTED)
    device: str = key("auto", "Device to compute on", choices=DEVICES)
    backend: str = key(
        "auto",
        "Process group of the ranks",
        choices={"auto": "gloo on CPUs, NCCL on GPUs", "nccl_like": "on CPUs, with NCCL's rules"},
    )
    fault: str = key(
        "",
        "Fault to inject, which verify must detect",
        off="",
        choices={"": ""} | {name: NEEDS.get(axis, "") for name, axis in FAULT_AXES.items()},
    )
