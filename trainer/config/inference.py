"""The keys of the commands that use a trained run."""

from dataclasses import dataclass, field

from parallel.config_fields import key
from parallel.strategy import StrategyConfig
from trainer.config.choices import DEVICES, PRECISIONS
from trainer.config.compress import CompressConfig
from trainer.config.launch import LaunchConfig


@dataclass
class OtherDataConfig:
    """Data to evaluate a trained model on; read by trainer/tasks/evaluate.py."""

    path: str = key("", "As data.path of training", off="", off_means="the data of the run")


@dataclass
class EvaluateConfig:
    """Measure the newest checkpoint of a run; read by trainer/tasks/evaluate.py."""

    run_dir: str = key("", "The run folder, from which model, tokenizer and classes are read")
    split: str = key("test", "Split to measure", choices=("valid", "test"))
    data: OtherDataConfig = field(default_factory=OtherDataConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    precision: str = key("auto", "Precision to compute in, as in training", choices=PRECISIONS)
    device: str = key("auto", "Device to compute on", choices=DEVICES)
    micro_batch_size: int = key(
        0, "Samples per forward on one rank", off=0, off_means="as in training", at_least=0
    )
    samples: int = key(
        0,
        "Samples of the split: a fixed pseudo-random subset",
        off=0,
        off_means="all",
        at_least=0,
    )
    beams: int = key(1, "Translation, speech: beam width", off=1, off_means="greedy", at_least=1)


@dataclass
class GenerateConfig:
    """Use a trained run: write, answer, translate, hear; read by trainer/tasks/generate.py."""

    run_dir: str = key("", "The run folder, whose config.yaml describes model and data")
    prompt: str = key(
        "",
        "Text to continue, question, sentence to translate, .npy or .png to classify, recording to "
        "transcribe, or a picture to find objects in",
    )
    chat: bool = key(
        False, "Chat: a conversation, with a line of standard input for each of your turns"
    )
    max_tokens: int = key(200, "Maximum number of generated tokens", at_least=1)
    temperature: float = key(
        0.8,
        "Sampling temperature: the logits are divided by it",
        off=0.0,
        off_means="greedy",
        at_least=0,
    )
    top_k: int = key(0, "Sample from the k most probable tokens", off=0, at_least=0)
    top_p: float = key(
        1.0,
        "Sample from the most probable tokens whose probabilities add up to p",
        off=1.0,
        above=0,
        at_most=1,
    )
    beams: int = key(4, "Translation, speech: beam width", off=1, off_means="greedy", at_least=1)
    length_penalty: float = key(1.0, "Beam scores are divided by length ** this", at_least=0)
    min_score: float = key(
        0.3, "Detection: boxes of a lower score are not shown", at_least=0, at_most=1
    )
    seed: int = key(0, "Seed of the sampling", at_least=0)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    precision: str = key("auto", "Precision to compute in, as in training", choices=PRECISIONS)
    device: str = key("auto", "Device to compute on", choices=DEVICES)


@dataclass
class ExportConfig:
    """Write a trained model for use elsewhere; read by trainer/inference/."""

    run_dir: str = key("", "The run, an export, or a Hugging Face folder")
    output_dir: str = key("", "A new folder, which evaluate and generate take as run_dir")
    format: str = key(
        "native",
        "Format of the folder",
        choices={
            "native": "one small file, with weights as compressed as the run trained them",
            "huggingface": "what from_pretrained of transformers reads, with adapters merged",
            "peft": "the adapters of lora.* alone, as peft reads them",
        },
    )
    step: int = key(
        0,
        "Step of the checkpoint, format=huggingface or peft",
        off=0,
        off_means="newest",
        at_least=0,
    )
    # Compression that the run was not trained with, applied to its weights in one shot.
    compress: CompressConfig = field(default_factory=CompressConfig)
    dtype: str = key(
        "fp32",
        "Data type of the weights that are not quantized",
        choices=("fp32", "bf16", "fp16"),
    )
    device: str = key("cpu", "Device to compute on", choices=DEVICES)


@dataclass
class TeachConfig:
    """Precompute a teacher's top-k logits for every target; read by distill/precompute.py."""

    run_dir: str = key("", "The teacher's run folder, whose config.yaml describes model and data")
    output_dir: str = key("", "A new folder, which compress.teacher takes")
    k: int = key(
        32, "Most probable classes stored per target; the others get probability 0", at_least=1
    )
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    precision: str = key("auto", "Precision to compute in, as in training", choices=PRECISIONS)
    device: str = key("auto", "Device to compute on", choices=DEVICES)
    micro_batch_size: int = key(
        0, "Samples per forward on one rank", off=0, off_means="as in training", at_least=0
    )


@dataclass
class CompressReportConfig:
    """The report on a compression; read by trainer/compress_report/report.py."""

    run_dir: str = key("", "The compressed run")
    baseline: str = key("", "The run to compare it with", off="", off_means="none")
    rounds: int = key(9, "Measurements of each rate; the median is reported", at_least=1)
    device: str = key("cpu", "Device to compute on", choices=DEVICES)
