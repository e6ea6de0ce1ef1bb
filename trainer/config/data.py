"""The keys of the data: `data.*`."""

from dataclasses import dataclass, field

from parallel.config_fields import key


@dataclass
class DataConfig:
    """The data set; read by trainer/data/."""

    kind: str = key(
        "text",
        "The reader",
        choices={
            "text": "predict the next token",
            "images": "labelled",
            "pairs": "source<TAB>target a line",
            "chat": "conversations",
            "masked_text": "guess the masked tokens of a text, family=encoder inputs=tokens",
            "labelled_text": "label<TAB>text a line, family=encoder inputs=tokens",
            "speech": "recordings and what is said in them, inputs=audio",
            "detection": "pictures with boxes",
        },
    )
    path: str = key(
        "",
        "A folder with train.*, valid.* and test.* (files or folders), or one file whose end "
        "is held out, or `bundled:NAME`, or `hf:NAME` (a Hugging Face data set, when "
        "`datasets` is installed)",
    )
    tokenizer: str = key(
        "",
        "A tokenizer.json, or a Hugging Face folder with one; used as it is",
        off="",
        off_means="a byte-level BPE trained on the train split",
    )
    chat_template: str = key(
        "",
        "Chat: a jinja file, or `plain` (role, line end, content, end token)",
        off="",
        off_means="the template of the tokenizer",
    )
    pack: bool = key(
        True, "Chat: put several whole conversations, which do not see each other, into a sample"
    )
    processor: str = key(
        "",
        "The folder of a run, or of an exported model, whose tokenizer, or class names and "
        "mean and deviation of the pixels, are used; new = those of the train split",
        off="",
        off_means="those of init_from, if there is one, else those of the train split",
    )
    vocab_size: int = key(
        1024, "Entries of the BPE trained on the data; ignored with data.tokenizer"
    )
    seq_len: int = key(
        256,
        "Length of a sample (text, chat); of the longest source and target (pairs)",
        unit="tokens",
        at_least=1,
    )
    mask_share: float = key(
        0.15, "Fraction of the tokens that are guessed, masked_text", above=0, below=1
    )
    source_prefix: str = key(
        "", "A token (such as eng_Latn) or words in front of each source, pairs", off=""
    )
    source_end: bool = key(False, "The end token behind each source, pairs")
    target_prefix: str = key(
        "",
        "A token (such as deu_Latn) in front of each target, which a translation begins with",
        off="",
    )
    document_separator: str = key("<|endoftext|>", "Splits documents inside one text file", off="")
    characters: bool = key(
        False, "Tokens are the characters of the train split, instead of a BPE of vocab_size"
    )
    held_out: float = key(
        0.1, "Fraction of train held out if valid or test is missing, half for each"
    )
    augment: bool = key(
        True,
        "Random changes while training: images are shifted and mirrored; speech has another "
        "tempo and masks; detection: data.flips, shift and zoom, or new scenes on a canvas",
    )
    sample_rate: int = key(
        16_000, "Speech: recordings are resampled to it", unit="Hz", at_least=1000, at_most=192_000
    )
    mels: int = key(80, "Speech: mel bands of a frame of 10 ms", at_least=1)
    audio_stride: int = key(2, "Speech: frames of a vector, that of model.audio_stride", at_least=1)
    pooled_vectors: int = key(
        1,
        "Speech by CTC: vectors that compress.pool_after makes one of, so that enough are left for "
        "the characters",
        off=1,
        at_least=1,
    )
    merged_vectors: int = key(
        0, "Speech by CTC: vectors of an utterance that compress.merge merges", off=0, at_least=0
    )
    standardize: bool = key(
        True, "Speech: each mel has mean 0 and deviation 1 in the train split; not for Whisper"
    )
    targets: str = key(
        "ctc",
        "Speech: what is learned of a transcript; set from the model",
        choices={
            "ctc": "its characters, in order",
            "tokens": "the next token, and the end",
            "both": "",
        },
    )
    max_seconds: float = key(
        30.0,
        "Speech: longer utterances are not trained on; generate reads windows of this length",
        unit="seconds",
        at_least=1,
    )
    tempo: float = key(
        0.1, "Speech: largest change of tempo by augment, a fraction", off=0.0, at_least=0, below=1
    )
    time_masks: int = key(2, "Speech: ranges of frames masked by augment", off=0, at_least=0)
    time_mask: int = key(20, "Speech: widest of them", unit="frames", at_least=0)
    mel_masks: int = key(1, "Speech: ranges of mels masked by augment", off=0, at_least=0)
    mel_mask: int = key(8, "Speech: widest of them", unit="mels", at_least=0)
    image_size: int = key(
        256, "Detection: square that a picture is fitted into", unit="pixels a side", at_least=8
    )
    flips: str = key(
        "horizontal",
        "Detection: how a training sample is flipped at random",
        choices={
            "none": "",
            "horizontal": "mirrored",
            "both": "upside down too",
            "turns": "quarter turns too, for pictures without an up",
        },
    )
    zoom: float = key(
        0.25,
        "Detection: a training sample is scaled by up to 1 + this, or 1 / (1 + this)",
        off=0.0,
        at_least=0,
    )
    shift: float = key(
        0.1,
        "Detection: a training sample is shifted by up to this share of its side",
        off=0.0,
        at_least=0,
        below=1,
    )
    fields: list[str] = key([], "hf: columns to read", off=[], off_means="the usual names")
    on_bad_file: str = key(
        "stop",
        "Action for an image or a recording that cannot be read or, detection, is missing",
        choices={"stop": "", "skip": "leave it out and log it"},
    )
    cache: str = key(".cache", "Folder of the prepared token files")


@dataclass
class PrepareConfig:
    """Tokenise a data set once, ahead of training; read by trainer/data/."""

    data: DataConfig = field(default_factory=DataConfig)
