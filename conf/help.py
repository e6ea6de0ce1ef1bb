"""The text of `--help`: examples, groups, and every key with its meaning."""

import re
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from parallel.config_fields import facts_of, value_text

CONF = Path(__file__).parent
EXAMPLES = {
    "train": """\
Train a Transformer. The layout over ranks is a choice of cost; the trained model stays the same.

  python launch/train.py                                        the language job, on this machine
  python launch/train.py experiment=images steps=500            another job, shorter
  python launch/train.py strategy=fsdp launch.ranks=2           two processes on this host
  torchrun --nproc_per_node=8 launch/train.py strategy=fsdp model=llama-1b data.seq_len=2048
  python launch/train.py -m strategy=ddp,fsdp optim.lr=1e-3,3e-4    a sweep: one job per point
  python launch/train.py run_dir=RUN                            go on from its newest checkpoint
  python launch/report.py run_dir=RUN                           its curves and events, one page""",
    "verify": """\
Prove that a layout takes the same steps as one process: losses, gradients and updated weights.

  python launch/verify.py                                       every layout of this machine
  torchrun --nproc_per_node=4 launch/verify.py strategy=hsdp model=vit-tiny
  python launch/verify.py strategy=fsdp launch.ranks=2""",
    "generate": """\
Write text, translate or classify with the newest checkpoint of a run.

  python launch/generate.py run_dir=RUN 'prompt="Enter Macbeth"'
  python launch/generate.py run_dir=RUN 'prompt="Turn on the light"' beams=4""",
    "evaluate": """\
Measure the newest checkpoint of a run.

  python launch/evaluate.py run_dir=RUN
  python launch/evaluate.py run_dir=RUN split=valid launch.ranks=2""",
    "export": """\
Write a trained model as one small file: bits and zeros that it has learned without are left out.

  python launch/export.py run_dir=RUN output_dir=SMALL
  python launch/evaluate.py run_dir=SMALL""",
    "compress_report": """\
Tell what a compression is worth: metric, size, FLOPs, lengths, zeros and speed, in a table and a
picture, beside a run without it.

  python launch/compress_report.py run_dir=SMALL baseline=LARGE""",
    "teach": """\
Keep what a trained run holds likely of all that is learned from: a smaller one then learns from
that, and needs no teacher in memory.

  python launch/teach.py run_dir=RUN output_dir=ANSWERS k=32
  torchrun --nproc_per_node=2 launch/teach.py strategy=fsdp run_dir=RUN output_dir=ANSWERS
  python launch/train.py model.layers=2 compress=distill compress.teacher=ANSWERS""",
    "submit": """\
Submit a training run to a cluster with Slurm. The same command goes on with the run.

  python launch/submit.py cluster.nodes=2 strategy=fsdp model=llama-8b run_dir=runs/big
  python launch/submit.py cluster=slurm-cpu cluster.nodes=4 cluster.ranks_per_node=2
  python launch/submit.py -m strategy=ddp,fsdp optim.lr=1e-3,3e-4   a sweep: an array of jobs
  python launch/submit.py --dry-run cluster.nodes=2 strategy=fsdp   the script, not submitted
  python launch/submit.py status RUN                            its jobs, and how it fares
  python launch/submit.py logs RUN                              the end of its log; --follow
  python launch/submit.py cancel RUN                            it saves, and ends""",
    "plan": """\
Plan a run without a GPU and without its data: which layouts fit, which are fast, and why not.

  python launch/plan.py model=llama-8b cluster=h100 cluster.nodes=8 data.seq_len=8192 batch_size=512
  python launch/plan.py model=llama-70b cluster=h100 data.seq_len=8192 batch_size=512 \\
      tokens=15e12 dollars_per_gpu_hour=2.5                     how many, which layout, the cost
  python launch/plan.py model=llama-8b strategy=fsdp            one layout, term by term
  python launch/plan.py model=llama-8b strategy.tensor=2        the best ones of these
  python launch/plan.py model=llama-8b json=plan.json           and plan.html, a picture""",
    "calibrate": """\
Measure products, attention, copies, collectives and a few small steps on the ranks there are, and
write what launch/plan.py and strategy=auto plan with. Two minutes at most.

  python launch/plan.py calibrate launch.ranks=2                the default model, on two CPU ranks
  torchrun --nproc_per_node=8 launch/plan.py calibrate model=llama-8b data.seq_len=8192
  python launch/plan.py calibrate calibration=rates.json        another file: plan.calibration=""",
    "prepare": """\
Read and tokenise a data set once, ahead of training.

  python launch/prepare.py data=text data.path=TEXTS data.vocab_size=8192""",
}


def help_text(name: str, schema: type, values: DictConfig) -> str:
    """Return the help of command `name`: examples, groups and every key of `schema`."""
    plain = OmegaConf.to_container(values)  # unresolved: run_dir is decided when the run starts
    options = [f"    {group:<12}{' '.join(names)}" for group, names in config_groups(name).items()]
    choices = "\n".join(["Groups, as GROUP=OPTION:\n", *options])
    keys = "Keys, as KEY=VALUE, with their values here:\n\n" + "\n".join(_key_lines(schema, plain))
    more = "Also: -m sweeps over comma-separated values, --cfg job shows the composed values."
    return "\n\n".join([EXAMPLES[name], choices, keys.replace("$", "$$"), more]) + "\n"


def config_groups(name: str) -> dict[str, list[str]]:
    """Return the config groups of command `name`, each with its options."""
    defaults = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    return {
        group: sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        for group in re.findall(r"^  - (\w+):", defaults, flags=re.MULTILINE)
    }


def _key_lines(schema: type, values: Any, prefix: str = "") -> list[str]:
    sections: list[str] = []
    shown: list[str] = []
    for field in fields(schema):
        kind = field.type
        if isinstance(kind, type) and is_dataclass(kind):
            title = (kind.__doc__ or "").split(";")[0].split("\n")[0].rstrip(".")
            sections += ["", f"  {prefix}{field.name}.*  {title}"]
            sections += _key_lines(kind, values[field.name], f"{prefix}{field.name}.")
        else:
            facts = facts_of(field)
            allowed = facts.describe_values()
            text = f"{facts.meaning} [{allowed}]" if allowed else facts.meaning
            shown.append(
                _format_line(f"{prefix}{field.name}={value_text(values[field.name])}", text)
            )
    return shown + sections


def _format_line(key: str, meaning: str) -> str:
    wrapped = textwrap.wrap(meaning, 60, break_on_hyphens=False) or [""]
    head = f"    {key:<34}  {wrapped[0]}".rstrip()
    return "\n".join([head, *(" " * 40 + line for line in wrapped[1:])])
