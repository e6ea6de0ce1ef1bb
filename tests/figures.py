"""The figures of the code's shape, one a line: `python tests/figures.py`."""

import ast
from collections.abc import Callable, Iterator

from test_imports import FILES, ROOT, TREES, VAGUE, imports, room_of, room_table

# What may ask which task or family it is: tasks, the model's wiring, and validation; and the two
# tables by which a task is found, each behind one function.
WIRING = ("trainer.model", "trainer.nn", "trainer.config.model")
MAY_ASK = ("trainer.tasks", *WIRING, "conf.validation")
TABLES = ("READERS", "TASKS")
say = print
ASKED = {"family", "kind"}
ANSWERS = {
    *("decoder", "encoder", "encoder_decoder"),
    *("text", "images", "pairs", "speech", "detection", "chat"),
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTION)


def functions() -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Iterate over every function and method of the packages."""
    for tree in TREES.values():
        yield from (node for node in ast.walk(tree) if isinstance(node, FUNCTION))


def vague_docstrings() -> float:
    """Return the fraction of docstrings that open with What, Whether, Why, Of, As or Where."""
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    texts = [ast.get_docstring(node) for node in nodes if isinstance(node, DOCUMENTED)]
    opened = [text.split()[0] in VAGUE for text in texts if text]
    return sum(opened) / len(opened)


def one_word_names() -> float:
    """Return the fraction of function names of one word; dunder methods are not counted."""
    names = [node.name for node in functions() if not node.name.startswith("__")]
    return sum("_" not in name.strip("_") for name in names) / len(names)


def named(node: ast.AST) -> str:
    """Return the last word of a name or attribute; empty for others."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def asks(node: ast.AST) -> bool:
    """Return whether a node compares a family or kind with one of its values, or looks it up."""
    if isinstance(node, ast.Compare):
        values = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
        sides = (node.left, *node.comparators)
        return bool(values & ANSWERS) and any(named(side) in ASKED for side in sides)
    if isinstance(node, ast.Subscript) and named(node.value) not in TABLES:
        key = ast.unparse(node.slice)
        return key.endswith((".family", "data.kind", "config.kind"))
    return False


def asking_files() -> list[str]:
    """Return the modules outside `MAY_ASK` that branch on a family or kind."""
    return [
        module
        for module, tree in TREES.items()
        if not module.startswith(MAY_ASK) and any(map(asks, ast.walk(tree)))
    ]


def takers_of_everything() -> list[str]:
    """Return the public functions with a parameter annotated as the whole TrainConfig."""
    return [
        node.name
        for node in functions()
        if not node.name.startswith("_") or node.name == "__init__"
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.annotation and ast.unparse(argument.annotation) == "TrainConfig"
    ]


def lines_with(text: str) -> int:
    """Return the number of lines of the packages with a comment that starts with `text`."""
    sources = (path.read_text(encoding="utf-8") for path in FILES.values())
    return sum(f"# {text}" in line for source in sources for line in source.splitlines())


def import_arrows() -> set[tuple[str, str]]:
    """Return the pairs (room, room that it imports)."""
    return {
        (room_of(module), room_of(name))
        for module in FILES
        for name in imports(TREES[module]) & FILES.keys()
        if room_of(module) != room_of(name) and "." in room_of(module)
    }


def upward_arrows() -> list[tuple[str, str]]:
    """Return the arrows to a room above; with none of them there is no cycle between rooms."""
    order = {room: number for number, room in enumerate(room_table())}
    return [(a, b) for a, b in import_arrows() if order[a] <= order.get(b, len(order))]


def boxes() -> int:
    """Return the number of rooms in trainer/."""
    return sum(room.startswith("trainer.") for room in room_table())


def inner_arrows() -> int:
    """Return the number of arrows between rooms of trainer/."""
    return sum(a.startswith("trainer.") and b.startswith("trainer.") for a, b in import_arrows())


def readme() -> str:
    """Return the lines and words of README.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return f"{len(text.splitlines())} lines, {len(text.split()):,} words"


def listed(found: list[str]) -> str:
    """Return a count with the names that were counted."""
    return f"{len(found)}" + (f" ({', '.join(found)})" if found else "")


FIGURES: dict[str, tuple[str, Callable[[], object]]] = {
    "boxes in trainer/": ("≤ 24", boxes),
    "arrows between them": ("", inner_arrows),
    "upward arrows": ("0", lambda: len(upward_arrows())),
    "files that ask for family or kind": ("0", lambda: listed(asking_files())),
    "docstrings that open vaguely": ("< 2 %", lambda: f"{100 * vague_docstrings():.1f} %"),
    "function names of one word": ("< 40 %", lambda: f"{100 * one_word_names():.1f} %"),
    "README": ("≤ 150 lines, ≤ 1,300 words", readme),
    "type: ignore": ("< 12", lambda: lines_with("type: ignore")),
    "fmt: skip": ("0", lambda: lines_with("fmt: skip")),
    "public functions of a TrainConfig": ("", lambda: len(takers_of_everything())),
}


if __name__ == "__main__":
    for name, (wanted, figure) in FIGURES.items():
        say(f"{name:34}  {wanted:27}  {figure()}")
