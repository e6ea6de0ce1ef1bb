"""What stands in a tokenizer.json, changed."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from drafts import Draft, SkipOption


def finish(draft: Draft) -> None:
    if content := draft.traits.get("json"):
        draft.files["tokenizer.json"] = content
        return
    draft.files["tokenizer.json"] = draft.traits["tokenizer"].to_str().encode()


def _json(change: Callable[[dict[str, Any], Random], Any]) -> Callable[[Draft], None]:
    """Change what stands in the file."""

    def apply(draft: Draft) -> None:
        content = json.loads(draft.traits["tokenizer"].to_str())
        changed = change(content, draft.rng)
        content = content if changed is None else changed
        draft.traits["json"] = json.dumps(content).encode()
        draft.readable = False

    return apply


def _put(*path: str, value: Any) -> Callable[[Draft], None]:
    def change(content: dict[str, Any], rng: Random) -> None:
        inner = content
        for key in path[:-1]:
            inner = inner[key] if isinstance(inner.get(key), dict) else {}
        inner[path[-1]] = value

    return _json(change)


def _holes(content: dict[str, Any], rng: Random) -> None:
    """Ids that grow by more than one from some place on; two tokens of one id."""
    vocab = content["model"].get("vocab")
    if not isinstance(vocab, dict) or len(vocab) < 3:
        raise SkipOption
    gap = rng.choice((1, 7, 100, 70_000, -1))
    middle = len(vocab) // 2
    content["model"]["vocab"] = {t: i + (gap if i > middle else 0) for t, i in vocab.items()}


def _fewer(content: dict[str, Any], rng: Random) -> None:
    vocab = content["model"].get("vocab")
    if not isinstance(vocab, dict) or len(vocab) < 9:
        raise SkipOption
    for token in rng.sample(sorted(vocab), 5):
        del vocab[token]


def _bytes(change: Callable[[bytes, Random], bytes]) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        finish(draft)
        draft.traits["json"] = change(draft.files["tokenizer.json"], draft.rng)
        draft.readable = False

    return apply


FILES = {
    "holes in the ids": _json(_holes),
    "fewer tokens": _json(_fewer),
    "no merges": _put("model", "merges", value=[]),
    "no vocabulary": _put("model", "vocab", value={}),
    "another type": _put("model", "type", value="BPE2"),
    "no type": _put("model", "type", value=None),
    "a negative id": _json(lambda c, rng: c["model"].__setitem__("vocab", {"a": -1, "b": 0})),
    "a huge id": _json(
        lambda c, rng: c["model"].__setitem__(
            "vocab",
            {**c["model"]["vocab"], "zzz": rng.choice((2**31, 2**32 - 1, 2**32, 2**40))}
            if isinstance(c["model"].get("vocab"), dict)
            else {},
        )
    ),
    "a merge of nothing": _put("model", "merges", value=[["zz", "yy"]]),
    "a model alone": _json(lambda c, rng: c["model"]),
    "a list": _json(lambda c, rng: [c]),
    "another version": _put("version", value="99.0"),
    "truncation that is odd": _put(
        "truncation",
        value={"max_length": 0, "strategy": "LongestFirst", "stride": 9, "direction": "Right"},
    ),
    "an unknown normaliser": _put("normalizer", value={"type": "Magic"}),
    "more keys": _put("extra", value=[1, 2]),
    "no model": _json(lambda c, rng: c.pop("model") and None),
    "added without an id": _put("added_tokens", value=[{"content": "x"}]),
    "cut": _bytes(lambda content, rng: content[: rng.randrange(len(content))]),
    "flipped": _bytes(lambda content, rng: _flip(content, rng)),
    "no JSON": _bytes(
        lambda content, rng: rng.choice(
            (
                b"",
                b"{}",
                b"[]",
                b"null",
                b"\0",
                b"\x0a\x09\x0a\x05<unk>",
                b"1",
                b"PK\3\4",
                b"[" * 9999,
            )
        )
    ),
    "a mark": _bytes(lambda content, rng: b"\xef\xbb\xbf" + content),
    "in UTF-16": _bytes(lambda content, rng: content.decode().encode("utf-16")),
}


def _flip(content: bytes, rng: Random) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ rng.randint(1, 127)]) + content[place + 1 :]
