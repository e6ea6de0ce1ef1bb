"""Imports run one way and in no circle, and files stay short: read from the source, run nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("trainer", "parallel", "conf", "launch")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
# Imported where they are used: extras that a machine may not have, and matplotlib for one picture.
OPTIONAL = {"wandb", "datasets", "trainer.metrics.timeline_plot"}
# What knows no ranks.
PLAIN = (
    "trainer.model",
    "trainer.nn.layers",
    "trainer.loss",
    "trainer.optim.optimizer",
    "trainer.data.tokenizer",
)
# What answers before torch is loaded.
LIGHT = (
    *("parallel.strategy", "parallel.pipeline.schedules", "parallel.pipeline.simulator"),
    *(
        "trainer.config.train",
        "trainer.run.run_dir",
        "trainer.data",
        "trainer.checkpoint.manifest",
        "trainer.checkpoint.inspect",
    ),
    *(
        "conf.schema",
        "conf.validation.validate",
        "conf.help",
        "launch.cli.entrypoint",
        "launch.cli.errors",
        "launch.cli.preflight",
    ),
    *("launch.checkpoint", "launch.report", "trainer.metrics.trackers"),
    *("launch.submit", "launch.slurm.batch_script", "launch.slurm.commands"),
)


def imports(tree: ast.AST) -> set[str]:
    """The modules that a tree imports, ours by their full name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in names}
    return found


def packages(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(TREES[module])}


def reached(module: str) -> set[str]:
    """All that is loaded with a module."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            parent = name.rpartition(".")[0]
            todo += imports(TREES.get(name, ast.Module([], [])))
            todo += [parent] if parent in FILES else []
    return seen


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    forbidden = {"parallel": {"trainer", "conf", "launch"}, "trainer": {"conf", "launch"}}
    forbidden |= {"conf": {"launch"}, "launch": set()}
    assert not packages(module) & forbidden[module.split(".")[0]]
    if module in PLAIN or module.startswith("trainer.data"):
        assert "parallel" not in packages(module)


def test_imports_make_no_circle():
    open_path: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> None:
        assert module not in open_path, " → ".join([*open_path, module])
        if module in done:
            return
        open_path.append(module)
        for name in sorted(imports(TREES[module]) & FILES.keys()):
            visit(name)
        done.add(open_path.pop())

    for module in FILES:
        visit(module)


@pytest.mark.parametrize("module", LIGHT)
def test_what_answers_at_once_loads_no_torch(module):
    assert "torch" not in {name.split(".")[0] for name in reached(module)}


@pytest.mark.parametrize("module", FILES)
def test_imports_stand_on_top(module):
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)]
    inside = {name for function in functions for name in imports(function)}
    assert all(name in OPTIONAL or name.split(".")[0] in OPTIONAL for name in inside)


@pytest.mark.parametrize("module", FILES)
def test_nothing_loads_matplotlib_but_a_picture(module):
    on_top = [node for node in TREES[module].body if isinstance(node, ast.Import | ast.ImportFrom)]
    loaded = {name for node in on_top for name in imports(node)}
    assert "trainer.metrics.timeline_plot" not in loaded
    assert module == "trainer.metrics.timeline_plot" or "matplotlib" not in packages(module)


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_are_short(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name
