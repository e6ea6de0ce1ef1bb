"""Validate a teacher against its student: pure functions that collect all problems."""

from conf.validation.compression import encoder_blocks, encoder_depth
from conf.validation.outputs import rules_of
from trainer.config.train import (
    TrainConfig,
    classes_of,
    inputs_of,
    is_encoder_decoder,
    outputs_of,
)
from trainer.distill.logit_dataset import LogitFacts


def _matched_problems(config: TrainConfig, teacher: TrainConfig) -> list[str]:
    """Return the problems of comparing the teacher's hidden states with the student's."""
    compress, ours, theirs = config.compress, config.model, teacher.model
    if not compress.match or not compress.match_weight:
        return []
    named = f"compress.match={compress.match} compares positions one by one, but "
    found = [
        f"{named}compress.teacher={compress.teacher} has compress.{key}="
        f"{getattr(teacher.compress, key)} and fewer; name another run, or set compress.match=[]"
        for key in ("merge", "pool_after")
        if getattr(teacher.compress, key)
    ]
    found += [
        f"{named}compress.teacher={compress.teacher} has model.{key}={getattr(theirs, key)}; set "
        f"model.{key}={getattr(theirs, key)}, or compress.match=[]"
        for key in ("patch_size", "pool")
        if ours.family == "encoder" and getattr(ours, key) != getattr(theirs, key)
    ]
    near, turns = [], [encoder_blocks(model) for model in (ours, theirs)]
    for block, other in compress.match:
        low, high = (0, turns[1]) if block < turns[0] else (turns[1], encoder_depth(theirs))
        near.append([block, min(max(other, low), high - 1)])
    if near != compress.match:
        two = f", the first {turns[1]} of its encoder, as are the first {turns[0]} here"
        found.append(
            f"compress.match={compress.match}, but compress.teacher={compress.teacher} has "
            f"{encoder_depth(theirs)} blocks{two if is_encoder_decoder(ours) else ''}; "
            f"try "
            f"compress.match={near}"
        )
    return found


def answers_problems(config: TrainConfig, facts: LogitFacts) -> list[str]:
    """Return the problems of training a completed run with recorded logits as compress.teacher."""
    compress, data = config.compress, config.data
    named = f"compress.teacher={compress.teacher}"
    if data.kind != facts.kind:
        return [
            f"{named} is about data.kind={facts.kind}, but data.kind={data.kind} here; name "
            "answers to the same data"
        ]
    found = []
    if not rules_of(config.model).recorded:
        found.append(
            f"{named} holds the most probable classes, which are not all that model.outputs="
            f"{outputs_of(config.model)} gives; name the run that teaches"
        )
    if facts.classes != (classes := classes_of(config.model)):
        found.append(
            f"{named} tells {facts.classes} classes apart, but there are {classes} here; name "
            "answers of a run with the same tokenizer, or the same classes"
        )
    if data.kind != "images" and data.seq_len != facts.seq_len:
        found.append(
            f"{named} is about data.seq_len={facts.seq_len}, but data.seq_len={data.seq_len} "
            f"here; set data.seq_len={facts.seq_len}"
        )
    if data.kind == "images" and data.augment:
        found.append(
            f"{named} is about images as they are, but data.augment=true moves them; set "
            "data.augment=false, or name the run that teaches"
        )
    if compress.match and compress.match_weight:
        found.append(
            f"{named} holds logits alone, but compress.match={compress.match} learns from hidden "
            "states; set compress.match=[], or name the run that teaches"
        )
    return found


def teacher_problems(config: TrainConfig, teacher: TrainConfig) -> list[str]:
    """Return the problems of training a completed run with the teacher in compress.teacher."""
    named = f"compress.teacher={config.compress.teacher}"
    ours, theirs = config.model, teacher.model
    if teacher.lora.rank:
        return [
            f"{named} holds adapters of frozen weights (lora.rank={teacher.lora.rank}), which do "
            "not teach; name a run without"
        ]
    if ours.family != theirs.family:
        return [
            f"{named} is of model.family={theirs.family}, but model.family={ours.family} here; "
            "name a run of the same family"
        ]
    ends = {"inputs": inputs_of, "outputs": outputs_of}
    if different := [key for key, end in ends.items() if end(ours) != end(theirs)]:
        return [
            f"{named} has model.{key}={ends[key](theirs)}, but model.{key}={ends[key](ours)} here; "
            "name a run of the same task"
            for key in different
        ]
    if ours.family == "encoder":
        return _encoder_teacher_problems(config, teacher) + _matched_problems(config, teacher)
    found = _matched_problems(config, teacher)
    if ours.vocab_size != theirs.vocab_size:
        found.append(
            f"{named} has model.vocab_size={theirs.vocab_size}, but model.vocab_size="
            f"{ours.vocab_size} here; name a run with the same tokenizer"
        )
    if theirs.positions == "learned" and theirs.max_positions < config.data.seq_len:
        found.append(
            f"{named} reads at most model.max_positions={theirs.max_positions} tokens, but "
            f"data.seq_len={config.data.seq_len}; set data.seq_len={theirs.max_positions} or less"
        )
    return found


def _encoder_teacher_problems(config: TrainConfig, teacher: TrainConfig) -> list[str]:
    """Return the differences between what two encoders read and tell apart."""
    named = f"compress.teacher={config.compress.teacher}"
    ours, theirs, rules = config.model, teacher.model, rules_of(config.model)
    found = [
        f"{named} has model.{key}={getattr(theirs, key)}, but model.{key}="
        f"{getattr(ours, key)} here; name a run on the same images and classes"
        for key in ("classes", "image_size", "channels", *rules.taught)
        if getattr(ours, key) != getattr(theirs, key)
    ]
    shorter = [key for key in ("merge", "pool_after") if getattr(teacher.compress, key)]
    if outputs_of(ours) == "ctc" and config.compress.distill_weight:
        found += [
            f"{named} has compress.{key}={getattr(teacher.compress, key)} and fewer vectors, but "
            "teaches vector by vector; name another run"
            for key in shorter
        ]
    return found
