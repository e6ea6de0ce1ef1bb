"""Validate how a model's attention sees positions and keys: pure functions."""

from trainer.config.train import ModelConfig, fast_turns, head_width_of


def attention_problems(model: ModelConfig) -> list[str]:
    """Return the problems of a model's window and rotary embedding, whose heads have a width."""
    found = []
    if model.sliding_window and model.family != "decoder":
        found.append(
            f"model.sliding_window={model.sliding_window} is for model.family=decoder, but "
            f"model.family={model.family}; set model.sliding_window=0"
        )
    if model.positions != "rope":
        return found
    head_width = head_width_of(model)
    if head_width % 2:
        found.append(
            f"model.positions=rope turns pairs of numbers, but a head is {head_width} wide; "
            f"set model.head_width={head_width + 1}, or model.positions=learned"
        )
    return found + (_scaling_problems(model) if model.rope_scaling != 1.0 else [])


def _scaling_problems(model: ModelConfig) -> list[str]:
    """Return the problems of an extended context."""
    kind, found = f"model.rope_type={model.rope_type}", []
    if model.rope_type in ("llama3", "yarn") and fast_turns(model) <= model.rope_slow_turns:
        found.append(
            f"{kind} blends frequencies between model.rope_slow_turns={model.rope_slow_turns:g} "
            f"and model.rope_fast_turns={fast_turns(model):g}, which must be more; set "
            f"model.rope_fast_turns={4 * model.rope_slow_turns:g}"
        )
    if model.rope_type == "yarn" and model.rope_theta <= 1.0:
        found.append(
            f"{kind} needs a base above 1, but model.rope_theta={model.rope_theta:g}; set "
            "model.rope_theta=10000"
        )
    if model.rope_type == "dynamic" and head_width_of(model) <= 2:
        found.append(
            f"{kind} needs heads of more than one pair of numbers; set model.head_width=4 or more, "
            "or model.rope_type=linear"
        )
    return found
