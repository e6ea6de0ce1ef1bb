"""Learning rate schedules, and warnings about their less obvious effects."""

import math

from trainer.config.train import OptimConfig

LEAP = 0.01  # relative change of the learning rate on resume that needs no warning


def learning_rate_at(step: int, steps: int, config: OptimConfig) -> float:
    """Return the learning rate of `step` (from 0) in a run of `steps`.

    Linear warm-up, then cosine (arXiv 1608.03983), or stable with a linear decay at the end (wsd,
    arXiv 2404.06395), or constant.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return floor + (config.lr - floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    if config.schedule == "wsd":
        decay_steps = max(1, round(steps * config.decay_share))
        left = min(1.0, max(0.0, (steps - step) / decay_steps))
        return floor + (config.lr - floor) * left
    return config.lr


def lr_jump_message(step: int, steps: int, before: float | None, config: OptimConfig) -> str:
    """Return a warning if the learning rate of `step` (from 0) differs from `before`.

    Empty if it does not, or if `before` is None. A run resumed with other steps or another schedule
    jumps there.
    """
    now = learning_rate_at(step, steps, config)
    if before is None or abs(now - before) <= LEAP * max(now, before):
        return ""
    return (
        f"the learning rate of step {step + 1} is {now:.3g}, where the run that is gone on with "
        f"had {before:.3g}: steps={steps}, or optim.*, was another; to go on smoothly set "
        "them as they were, or optim.schedule=constant with an optim.lr of your choice"
    )


def schedule_warnings(steps: int, config: OptimConfig) -> list[str]:
    """Return warnings about less obvious effects of a schedule."""
    last, warmup = learning_rate_at(steps - 1, steps, config), config.warmup_steps
    if warmup >= steps:
        return [
            f"optim.warmup_steps={warmup} is not below steps={steps}: the learning rate rises to "
            f"the end, where it is {last:.3g} of optim.lr={config.lr:g}, and never falls; set "
            f"optim.warmup_steps={steps // 10}"
        ]
    decay_steps = round(steps * config.decay_share)
    if config.schedule == "wsd" and warmup + decay_steps > steps and warmup:
        peak, after = f"{config.lr:.3g}", f"{learning_rate_at(warmup, steps, config):.3g}"
        return [
            f"optim.warmup_steps={warmup} ends behind step {steps - decay_steps}, where "
            f"optim.decay_share={config.decay_share:g} of steps={steps} begin to fall: the "
            f"learning rate leaps from {peak} to {after} there; set "
            f"optim.warmup_steps={steps - decay_steps}"
        ]
    return []
