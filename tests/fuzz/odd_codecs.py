"""Texts in other encodings, and with other ends of lines."""

from collections.abc import Callable
from dataclasses import replace

from drafts import Draft
from judge import Texts


def _encoded(*codecs: str, refused: bool = True) -> Callable[[Draft], None]:
    """Written in another encoding: refused, or (where it is the same bytes) read as it is."""

    def apply(draft: Draft) -> None:
        codec = draft.rng.choice(codecs)
        accented = draft.rng.choice(("é", "ü", "ø"))
        if codec in ASIAN:
            accented = draft.rng.choice(("日本", "中文", "한국"))
        items, some = draft.traits["items"], draft.rng.random() < 0.5
        encoded = []
        for number, item in enumerate(items):
            text = item.content.decode().replace("question", f"question{accented}")
            content = text.encode()
            if number == 0 or not some:
                content = text.encode(codec, "ignore")
                text = content.decode(codec)
            encoded.append((replace(item, content=content), text))
        draft.traits["items"] = [item for item, _ in encoded]
        wanted: dict[str, list[str]] = {}
        for item, text in encoded:
            separator = str(draft.settings.get("document_separator") or "\0")
            wanted.setdefault(item.split, []).extend(t for t in text.split(separator) if t)
        draft.clean = Texts(wanted)
        if refused:
            draft.odd()

    return apply


ASIAN = ("shift_jis", "euc_jp", "gb18030", "gbk", "big5", "euc_kr", "iso2022_jp", "johab", "cp949")


def _marked(draft: Draft) -> None:
    """With a byte order mark, which is no character."""
    items = draft.traits["items"]
    draft.traits["items"] = [replace(i, content=b"\xef\xbb\xbf" + i.content) for i in items]


def _ends(end: str) -> Callable[[Draft], None]:
    """Other ends of lines are read as they are, and that is said."""

    def apply(draft: Draft) -> None:
        items = draft.traits["items"]
        draft.traits["items"] = [
            replace(i, content=i.content.replace(b"\n", end.encode())) for i in items
        ]
        draft.may_differ = True

    return apply


def _mixed_ends(draft: Draft) -> None:
    items = draft.traits["items"]
    draft.traits["items"] = [
        replace(i, content=i.content.replace(b"\n", b"\r\n", 9)) for i in items
    ]
    draft.may_differ = True


def _joined(draft: Draft) -> None:
    """Files in two encodings, one behind the other."""
    items = draft.traits["items"]
    wrong = "ünïcode\n".encode("latin1")
    items[0] = replace(items[0], content=items[0].content + wrong)
    draft.odd()


ENCODINGS = {
    "UTF-8 with a mark": _marked,
    "UTF-16": _encoded("utf-16", "utf-16-le", "utf-16-be"),
    "UTF-32": _encoded("utf-32", "utf-32-le", "utf-32-be"),
    "Western": _encoded("latin1", "cp1252", "mac_roman", "cp850", "cp437", "iso8859_15"),
    "Eastern": _encoded("cp1250", "iso8859_2"),
    "Asian": _encoded(*ASIAN),
    "EBCDIC": _encoded("cp037", "cp500"),
    "ASCII": _encoded("ascii", refused=False),
    "CRLF": _ends("\r\n"),
    "CR": _ends("\r"),
    "mixed ends": _mixed_ends,
    "two encodings": _joined,
    "LF CR": _ends("\n\r"),
}
