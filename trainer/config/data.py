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
    held_out: float = key(
        0.1, "Fraction of train held out if valid or test is missing, half for each"
    )
    augment: bool = key(True, "Images: random shift and mirror while training")
    fields: list[str] = key([], "hf: columns to read", off=[], off_means="the usual names")
    on_bad_file: str = key(
        "stop",
        "Action for an image that cannot be read",
        choices={"stop": "", "skip": "leave it out and log it"},
    )
    cache: str = key(".cache", "Folder of the prepared token files")


@dataclass
class PrepareConfig:
    """Tokenise a data set once, ahead of training; read by trainer/data/."""

    data: DataConfig = field(default_factory=DataConfig)
