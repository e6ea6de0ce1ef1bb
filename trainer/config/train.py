"""The typed configuration of the trainer; free of torch, so that `--help` answers at once.

Each section is named after the room that reads it: `optim.lr` is read in trainer/optim/.
"""

from dataclasses import dataclass, field
from typing import Any

from parallel.errors import ConfigError, DataError, StorageError, UserError
from parallel.strategy import StrategyConfig

__all__ = ["ConfigError", "DataError", "StorageError", "StrategyConfig", "UserError"]


@dataclass
class ModelConfig:
    """One Transformer in three shapes; read by trainer/model.py and trainer/nn/layers.py."""

    family: str = "decoder"  # decoder | encoder | encoder_decoder
    layers: int = 4  # blocks of the decoder (of the encoder for family=encoder)
    encoder_layers: int = 0  # blocks of the encoder for family=encoder_decoder; 0 = as layers
    width: int = 128  # residual stream
    heads: int = 4  # query heads
    kv_heads: int = 0  # key/value heads (grouped-query attention); 0 = as many as heads
    head_width: int = 0  # width of one head; 0 = width / heads
    ffn_width: int = 512  # hidden width of the feed-forward layer
    vocab_size: int = 0  # token ids; 0 = those of the tokenizer
    max_positions: int = 0  # longest sequence; 0 = as long as the data's
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-5  # added to the variance
    activation: str = "swiglu"  # swiglu | geglu | gelu | gelu_tanh | relu
    positions: str = "rope"  # rope | learned
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: float = 1.0  # Llama 3.1's long-context factor; 1.0 = off
    bias: bool = False  # biases in linear layers and in LayerNorm
    tied: bool = True  # output projection shares the token embedding
    dropout: float = 0.0  # on embeddings and residual branches while training; 0.0 = off
    init: str = "gpt2"  # gpt2 (normal, residual branches scaled by depth) | vit (truncated normal)
    init_std: float = 0.02  # standard deviation of the initial weights
    image_size: int = 0  # pixels a side, family=encoder; 0 = as the data's
    patch_size: int = 4  # pixels a side of one patch
    channels: int = 0  # of an image; 0 = as the data's
    classes: int = 0  # of the classifier; 0 = as the data's
    pool: str = "mean"  # class_token | mean: what the classifier reads


def classes_of(model: ModelConfig) -> int:
    """Return how many classes the logits of a completed model are of."""
    return model.classes if model.family == "encoder" else model.vocab_size


@dataclass
class DataConfig:
    """The data set; read by trainer/data/."""

    kind: str = "text"  # text | images | pairs: the reader
    # A folder with train.*, valid.* and test.* (files or folders), or one file whose end is held
    # out, or `bundled:NAME`, or `hf:NAME` (a Hugging Face data set, when `datasets` is installed).
    path: str = ""
    tokenizer: str = ""  # a tokenizer.json; empty = a byte-level BPE trained on the train split
    # The folder of a run, or of an exported model, whose tokenizer, or class names and mean and
    # deviation of the pixels, are used; empty = those of init_from, if there is one, else those of
    # the train split; new = those of the train split.
    processor: str = ""
    vocab_size: int = 1024  # entries of the BPE trained here; not read with an own tokenizer
    seq_len: int = 256  # tokens per sample (text); longest source and target (pairs)
    document_separator: str = "<|endoftext|>"  # splits documents inside one text file; empty = off
    held_out: float = 0.1  # share of train kept back where valid or test is missing, half for each
    augment: bool = True  # images: random shift and mirror while training
    fields: list[str] = field(default_factory=list)  # hf: columns to read; empty = the usual names
    on_bad_file: str = "stop"  # images that cannot be read: stop | skip = leave them out, say so
    cache: str = ".cache"  # folder of the prepared token files


@dataclass
class OptimConfig:
    """The optimizer and its schedule; read by trainer/optim/."""

    # adamw | adamw8bit: both moments of matrices in 8 bits with a scale per block, a quarter of the
    # memory.
    name: str = "adamw"
    lr: float = 1e-3  # peak learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decay of the two moments
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # on matrices only; norms and biases never decay
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, decay) | constant
    warmup_steps: int = 100  # linear from 0
    decay_share: float = 0.2  # wsd: share of the steps in which lr falls to min_lr_ratio
    min_lr_ratio: float = 0.1  # last learning rate as a share of the peak
    max_grad_norm: float = 1.0  # global norm to clip at; 0.0 = off


@dataclass
class LossConfig:
    """The loss; read by trainer/loss.py."""

    label_smoothing: float = 0.0  # share of the target spread over all classes; 0.0 = off
    # Pieces of a micro-batch whose logits are made, used and forgotten one after another: less
    # memory where the vocabulary is large, for one matrix product more; 1 = off.
    chunks: int = 1


@dataclass
class EvalConfig:
    """Evaluation while training; read by trainer/tasks/evaluate.py."""

    every: int = 250  # steps between evaluations on the valid split; 0 = only at the end
    # Of the valid split, per evaluation: a pseudo-random part, always the same; 0 = all.
    samples: int = 0
    test: bool = True  # evaluate on the whole test split at the end
    beams: int = 1  # translation: beams of the decoder that BLEU is measured with


@dataclass
class CheckpointConfig:
    """Checkpoint files; read by trainer/checkpoint/save.py."""

    every: int = 500  # steps between checkpoints; 0 = only at the end
    keep: int = 2  # newest checkpoints kept; 0 = all
    # Steps between comparisons of weights and moments that several ranks have a copy of: they must
    # be the same to the bit; 0 = off.
    check_replicas_every: int = 0
    keep_best: bool = False  # keep also the one with the least loss on the valid split, at its step
    keep_every: int = 0  # keep also those of every so many steps; 0 = off
    async_save: bool = True  # training goes on while files are written, beside a copy in memory
    on_error: str = "continue"  # a save that failed: continue (the next one tries again) | stop
    grace_seconds: float = 0.0  # warn if a save takes longer: what a scheduler grants; 0 = off


@dataclass
class MetricsConfig:
    """Metrics and where they go; read by trainer/metrics/recorder.py."""

    every: int = 10  # steps between lines on the console and in metrics.jsonl
    sample_tokens: int = 120  # length of the text shown at the end of a language-model run; 0 = off
    # Pipeline: draw when each rank computed what, of the 5th step, in run_dir/timeline.png.
    timeline: bool = False
    profile_steps: int = 0  # steps in a Chrome trace, after 10 steps of warm-up; 0 = off
    wandb: str = "off"  # off | offline | online
    wandb_project: str = "samestep"  # project of the runs on wandb
    wandb_group: str = ""  # of runs that belong together, as those of a sweep; empty = none
    wandb_tags: list[str] = field(default_factory=list)  # to find the run by; empty = none
    tensorboard: bool = False  # curves for TensorBoard, in run_dir/tensorboard
    # What a sweeper that optimises is told of a run: a metric of the last evaluation on the valid
    # split, e.g. eval_loss, bits_per_character or accuracy.
    objective: str = "eval_loss"
    peak_tflops: float = 0.0  # of the device in the chosen precision, for MFU; 0.0 = look it up


@dataclass
class CompressConfig:
    """Compression: shorter sequences, fewer bits, fewer weights; read by trainer/compress/."""

    # Encoders: vectors that join the most alike one, behind each block but the last (at most half
    # of those that are there); 0 = off.
    merge: int = 0
    # Blocks in front of the pooling (of a language model also behind it, where every token has a
    # vector again); 0 = off.
    pool_after: int = 0
    pool_stride: int = 2  # patches a side, or tokens of text, whose mean becomes one vector
    drop: float = 0.0  # image classifiers: share of the patches left out while training; 0.0 = off
    bits: int = 0  # of the weights between embedding and head, trained as they will be; 0 = all
    input_bits: int = 8  # of what those weights are multiplied with, where bits is set; 0 = all
    group: int = 0  # neighbouring weights of an output that share a scale; 0 = all of an output's
    sparse_n: int = 0  # weights that are not zero, of every sparse_m neighbours; 0 = off
    sparse_m: int = 4  # neighbours along the inputs
    sparse_start: float = 0.0  # share of the steps before weights become zero
    # Share of each block's attention heads that are pruned, the least important first, and that an
    # exported model is without; 0.0 = off.
    prune_heads: float = 0.0
    prune_ffn: float = 0.0  # the same of the feed-forward layer's channels
    prune_start: float = 0.1  # share of the steps before the first of them are pruned
    prune_end: float = 0.5  # share of the steps before the last are
    # Folder of a run whose newest checkpoint says what else is likely beside each target, or of
    # what such a run has said (launch/teach.py); the model learns that too; empty = off.
    teacher: str = ""
    temperature: float = (
        2.0  # logits of both are divided by it: above 1.0 unlikely classes say more
    )
    # Share of the loss that is the divergence from the teacher (times temperature²); 0.0 = off.
    distill_weight: float = 0.5
    # Pairs of blocks, counted from 0, e.g. [[1,3],[3,7]]: behind block 1 the vectors of a sample
    # learn to be as alike as those behind block 3 of the teacher; empty = off.
    match: list[list[int]] = field(default_factory=list)
    # Times the mean squared difference of those similarities, added to the loss; 0.0 = off.
    match_weight: float = 1.0


def asked_for(compress: CompressConfig) -> dict[str, Any]:
    """Return the keys with their values that are not as where nothing is compressed."""
    plain = CompressConfig()
    return {k: v for k, v in vars(compress).items() if v != getattr(plain, k)}


@dataclass
class LaunchConfig:
    """How ranks are started; read by launch/cli/entrypoint.py."""

    ranks: int = 0  # processes to start on this host when torchrun did not; 0 = one


@dataclass
class TrainConfig:
    """A whole training job; read by trainer/loop.py, filled from conf/train.yaml and its groups."""

    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    # fp64 | fp32 | bf16 | fp16 | fp8: bf16, but the layers between embedding and head multiply in
    # float8 (GPUs of compute capability 8.9 or more, with torchao); auto = bf16 on CUDA, fp32 on
    # CPU.
    precision: str = "auto"
    device: str = "auto"  # cpu | cuda; auto = cuda where there is one
    steps: int = 1000  # optimizer steps of the whole run
    batch_size: int = 32  # samples per optimizer step, over all ranks and micro-batches
    micro_batch_size: int = 0  # samples per forward on one rank; 0 = all of the rank's at once
    seed: int = 0  # weights, order of the samples and dropout follow from it
    run_dir: str = "runs"  # folder of this run
    # A rank that makes no progress for so long ends the run and is named; ten times as long while
    # the run starts or saves; 0.0 = off.
    timeout_seconds: float = 600.0
    # A step whose loss or gradient is not finite, or whose loss is a spike, is never learned from.
    # stop: end the run; skip: go on without its update; rollback: go back to the last good
    # checkpoint and leave its samples out from then on.
    on_bad_step: str = "stop"  # stop | skip | rollback
    # Bad steps in a row, or returns in a row to one checkpoint, that stop the run.
    max_bad_steps: int = 5
    # A loss so many standard deviations above the median of the last losses is a spike; 0.0 = off.
    spike_sigma: float = 0.0
    spike_window: int = (
        64  # steps whose losses a spike is measured by; none before there are so many
    )
    # A run, or an exported model, whose weights this one begins with, e.g. to train them on under
    # another compression; empty = drawn from the seed.
    init_from: str = ""
    # auto = go on from the newest good checkpoint in run_dir, if there is one | never = refuse to |
    # always = refuse to begin at step 0 | scratch = as auto, but begin again where none is good
    resume: str = "auto"
    retry_failed: bool = False  # in a sweep that is gone on with: start points again that failed
    resume_step: int = 0  # go on from this checkpoint, and set newer ones aside; 0 = newest good
    # Keys, or whole sections, in which the run that is gone on with may be another one, e.g.
    # [seed,data]; empty = it must be the same run: model, compress, data, seed, precision,
    # batch_size and overfit_steps.
    resume_changed: list[str] = field(default_factory=list)
    activation_checkpointing: str = "none"  # none | selective (matmuls kept) | block
    compile: bool = False  # torch.compile of every block
    # Learn from the data of the first so many steps again and again: a model that cannot fit them
    # has a fault; 0 = off.
    overfit_steps: int = 0
    detect_anomaly: bool = False  # torch names the operation whose gradient is NaN; slow
    deterministic: bool = False  # refuse kernels whose result varies from run to run


@dataclass
class VerifyConfig:
    """Proof that a layout equals one process; read by trainer/verify/compare.py."""

    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    # AdamW makes lr / eps of the rounding in a gradient that is zero (a key's bias): no small eps.
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-2, eps=1e-6, warmup_steps=2, max_grad_norm=0.5)
    )
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    steps: int = 3  # optimizer steps compared
    seed: int = 0  # weights and batches follow from it
    tolerance: float = 1e-10  # largest difference that passes, as a share of the largest entry
    activation_checkpointing: str = "none"  # as in training
    device: str = "auto"  # cpu | cuda; auto = cuda where there is one
    # Plants a fault to be caught: skip_gradient_sum | local_target_count | local_gradient_norm;
    # with strategy.tensor above 1 skip_input_gradient_sum | skip_output_sum |
    # skip_sequence_gather | skip_vocabulary_mask; in a pipeline stale_stage_input |
    # skip_tied_gradient_sum | local_loss_scale; with strategy.context_method=ring skip_ring_step;
    # empty = off.
    fault: str = ""


@dataclass
class OtherDataConfig:
    """Data that a trained model has not learned from; read by trainer/tasks/evaluate.py."""

    path: str = ""  # as data.path of training; empty = the data of the run


@dataclass
class EvaluateConfig:
    """Measure the newest checkpoint of a run; read by trainer/tasks/evaluate.py."""

    run_dir: str = ""  # the run; its folder says model, tokenizer and classes
    split: str = "test"  # valid | test
    data: OtherDataConfig = field(default_factory=OtherDataConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    precision: str = "auto"  # as in training
    device: str = "auto"  # cpu | cuda; auto = cuda where there is one
    micro_batch_size: int = 0  # 0 = as in training
    samples: int = 0  # of the split, a pseudo-random part, always the same; 0 = all
    beams: int = 1  # translation: beams of the decoder; 1 = greedy


@dataclass
class GenerateConfig:
    """Use a trained run: write, translate or classify; read by trainer/tasks/generate.py."""

    run_dir: str = ""  # the run; its config.yaml says model and data
    prompt: str = ""  # text to go on from, sentence to translate, .npy or .png to classify
    max_tokens: int = 200  # tokens written at most
    temperature: float = 0.8  # above 1.0 = bolder, below = safer; 0.0 = greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 = off
    top_p: float = 1.0  # keep the likeliest tokens whose probability adds up to p; 1.0 = off
    beams: int = 4  # translation; 1 = greedy
    length_penalty: float = 1.0  # beam scores are divided by length ** this
    seed: int = 0  # the samples drawn follow from it
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    precision: str = "auto"  # as in training
    device: str = "auto"  # cpu | cuda; auto = cuda where there is one


@dataclass
class ExportConfig:
    """Write a trained model as one small file; read by trainer/inference/trained_run.py."""

    run_dir: str = ""  # the run
    to: str = ""  # a new folder, which evaluate and generate take as run_dir
    # What the run was not trained with, done to its weights all at once.
    compress: CompressConfig = field(default_factory=CompressConfig)
    precision: str = "fp32"  # fp32 | bf16 | fp16: of what is written and has no fewer bits
    device: str = "cpu"  # cpu | cuda; auto = cuda where there is one


@dataclass
class TeachConfig:
    """Keep what a trained run holds likely of each target; read by distill/precompute.py."""

    run_dir: str = ""  # the run that teaches; its config.yaml says model and data
    to: str = ""  # a new folder, which compress.teacher takes
    k: int = 32  # likeliest classes kept of each target; the others count as impossible
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    precision: str = "auto"  # as in training
    device: str = "auto"  # cpu | cuda; auto = cuda where there is one
    micro_batch_size: int = 0  # 0 = as in training


@dataclass
class CompressReportConfig:
    """The report on a compression; read by trainer/compress_report/report.py."""

    run_dir: str = ""  # the compressed run
    baseline: str = ""  # the run that it is compared with; empty = none
    rounds: int = 9  # measurements of each rate, of which the median is shown
    device: str = "cpu"  # cpu | cuda; auto = cuda where there is one


@dataclass
class PrepareConfig:
    """Tokenise a data set once, ahead of training; read by trainer/data/."""

    data: DataConfig = field(default_factory=DataConfig)
