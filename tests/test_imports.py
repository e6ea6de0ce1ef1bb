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
# Imported where they are used: extras that a machine may not have, matplotlib for one picture, and
# TensorBoard, which loads torch in a process that does without it otherwise.
OPTIONAL = {
    *("wandb", "datasets"),
    *("trainer.metrics.timeline_plot", "trainer.metrics.tensorboard_mirror"),
}
# What knows no ranks.
PLAIN = (
    "trainer.model",
    "trainer.nn.layers",
    "trainer.loss",
    "trainer.optim.registry",
    "trainer.data.tokenizer",
)
# What answers before torch is loaded.
LIGHT = (
    *("parallel.strategy", "parallel.pipeline.schedules", "parallel.pipeline.simulator"),
    *(
        "trainer.config.train",
        "trainer.run.run_dir",
        "trainer.huggingface.registry",
        "trainer.data",
        "trainer.checkpoint.manifest",
        "trainer.checkpoint.inspect",
        "trainer.plan.memory",
        "trainer.plan.planner",
        "trainer.plan.result",
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
    *("launch.plan", "launch.cli.asked"),
    *("launch.submit", "launch.slurm.batch_script", "launch.slurm.commands"),
)

# Rooms, each with the rooms it may import, from the bottom up: a line names none below it.
ROOMS = """
parallel.config_fields:
conf.help: parallel.config_fields
parallel.errors:
parallel.strategy: parallel.config_fields parallel.errors
trainer.config: parallel.config_fields parallel.errors parallel.strategy
conf.submit: parallel.config_fields trainer.config
trainer.atomic_files: parallel.errors
parallel.grad_norm:
parallel.store_tree:
parallel.runtime: parallel.errors parallel.strategy
parallel.health: parallel.grad_norm parallel.runtime
parallel.collectives:
parallel.model_protocol:
parallel.axis: parallel.grad_norm parallel.collectives parallel.model_protocol
parallel.mesh: parallel.strategy
parallel.context: parallel.collectives parallel.model_protocol parallel.axis
parallel.data: parallel.strategy parallel.collectives parallel.model_protocol parallel.axis
    parallel.mesh
parallel.pipeline: parallel.config_fields parallel.errors parallel.strategy parallel.grad_norm
    parallel.collectives parallel.model_protocol parallel.axis parallel.data
parallel.tensor: parallel.errors parallel.strategy parallel.grad_norm parallel.collectives
    parallel.model_protocol parallel.axis
parallel.parallel_model: parallel.grad_norm parallel.runtime parallel.model_protocol parallel.axis
    parallel.mesh parallel.pipeline
parallel.activation_checkpointing:
parallel.parallelize: parallel.strategy parallel.grad_norm parallel.model_protocol parallel.axis
    parallel.context parallel.data parallel.pipeline parallel.tensor parallel.parallel_model
    parallel.activation_checkpointing
trainer.data: trainer.config trainer.atomic_files
trainer.nn: parallel.errors trainer.config parallel.runtime
trainer.metrics: parallel.errors trainer.config trainer.atomic_files parallel.pipeline trainer.nn
trainer.optim: trainer.config
trainer.checkpoint: parallel.errors parallel.strategy trainer.config trainer.atomic_files
    parallel.grad_norm parallel.store_tree parallel.runtime parallel.health parallel.parallel_model
    parallel.parallelize trainer.data trainer.metrics trainer.optim
trainer.loss: trainer.config trainer.nn
trainer.model: trainer.config trainer.nn
trainer.huggingface: trainer.config parallel.grad_norm parallel.parallelize trainer.data trainer.nn
    trainer.checkpoint
    trainer.model
trainer.run: parallel.errors trainer.config trainer.atomic_files trainer.checkpoint
    trainer.huggingface
conf.plan: parallel.config_fields trainer.config conf.submit
conf.schema: parallel.config_fields conf.help parallel.errors trainer.config conf.submit conf.plan
    trainer.run
conf.reference: parallel.config_fields conf.schema
trainer.compress: trainer.config parallel.grad_norm parallel.collectives parallel.parallelize
    trainer.nn trainer.model
trainer.precision:
trainer.lora: trainer.config trainer.nn trainer.model
trainer.build: parallel.strategy trainer.config parallel.runtime parallel.mesh
    parallel.parallel_model parallel.parallelize trainer.nn trainer.loss trainer.model
    trainer.compress trainer.precision trainer.lora
trainer.inference: parallel.errors parallel.strategy trainer.config trainer.atomic_files
    parallel.grad_norm parallel.runtime parallel.parallel_model parallel.parallelize trainer.data
    trainer.checkpoint trainer.huggingface trainer.run trainer.nn trainer.model trainer.compress
    trainer.precision trainer.build
trainer.distill: parallel.strategy trainer.config trainer.atomic_files parallel.runtime
    parallel.parallel_model parallel.parallelize trainer.data trainer.checkpoint trainer.run
    trainer.model trainer.compress trainer.inference
trainer.report: parallel.errors trainer.config trainer.atomic_files trainer.metrics
    trainer.checkpoint trainer.run
parallel.rank_pool: parallel.runtime
trainer.compress_report: parallel.strategy trainer.config parallel.runtime parallel.parallel_model
    trainer.data trainer.nn trainer.metrics trainer.run trainer.compress trainer.inference
    parallel.rank_pool
trainer.tasks: parallel.strategy trainer.config parallel.runtime parallel.parallel_model
    trainer.data trainer.nn trainer.metrics trainer.checkpoint trainer.run trainer.loss
    trainer.inference
trainer.resilience: parallel.errors parallel.strategy trainer.config trainer.atomic_files
    parallel.runtime parallel.health parallel.parallel_model trainer.data trainer.metrics
    trainer.optim trainer.checkpoint trainer.run trainer.precision
trainer.state: trainer.config parallel.grad_norm parallel.runtime parallel.parallel_model
    trainer.optim trainer.checkpoint trainer.compress trainer.precision trainer.lora
    trainer.inference trainer.resilience
trainer.loop: parallel.errors trainer.config parallel.runtime parallel.health
    parallel.parallel_model trainer.data trainer.nn trainer.metrics trainer.optim trainer.checkpoint
    trainer.compress trainer.precision trainer.build trainer.inference trainer.distill trainer.tasks
    trainer.resilience trainer.state
parallel.comm_volume: parallel.strategy parallel.data
trainer.verify: parallel.strategy trainer.config parallel.grad_norm parallel.runtime
    parallel.collectives parallel.axis parallel.mesh parallel.context parallel.data
    parallel.pipeline parallel.tensor parallel.parallel_model parallel.parallelize trainer.nn
    trainer.metrics trainer.optim trainer.loss trainer.model trainer.compress trainer.precision
    trainer.lora trainer.build trainer.inference parallel.rank_pool trainer.tasks
    parallel.comm_volume
trainer.plan: parallel.errors parallel.strategy trainer.config trainer.atomic_files
    parallel.grad_norm parallel.runtime parallel.collectives parallel.comm_volume parallel.data
    parallel.pipeline parallel.activation_checkpointing parallel.parallelize trainer.nn
    trainer.compress trainer.precision trainer.build trainer.inference trainer.tasks trainer.state
    trainer.loop trainer.verify
conf.validation: parallel.config_fields parallel.errors parallel.strategy trainer.config conf.submit
    parallel.pipeline trainer.data trainer.distill trainer.plan
launch.slurm: parallel.errors trainer.config conf.submit trainer.run
launch.cli: parallel.config_fields conf.help parallel.errors parallel.strategy trainer.config
    conf.submit trainer.atomic_files parallel.runtime parallel.health parallel.pipeline trainer.data
    trainer.nn trainer.metrics trainer.checkpoint trainer.huggingface trainer.run conf.schema
    trainer.distill conf.plan conf.validation launch.slurm trainer.report trainer.plan
launch.checkpoint: trainer.checkpoint launch.cli
launch.compress_report: launch.cli trainer.compress_report
launch.evaluate: launch.cli trainer.tasks
launch.export: trainer.inference launch.cli
launch.generate: launch.cli trainer.tasks
launch.plan: launch.cli trainer.plan
launch.prepare: launch.cli
launch.report: parallel.errors trainer.report launch.cli
launch.submit: parallel.errors launch.slurm launch.cli
launch.teach: trainer.distill launch.cli
launch.train: launch.cli trainer.loop
launch.verify: launch.cli trainer.verify
"""


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
            for node in TREES.get(name, ast.Module([], [])).body:
                todo += imports(node) if isinstance(node, ast.Import | ast.ImportFrom) else []
            todo += [parent] if parent in FILES else []
    return seen


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    forbidden = {"parallel": {"trainer", "conf", "launch"}, "trainer": {"conf", "launch"}}
    forbidden |= {"conf": {"launch"}, "launch": set()}
    assert not packages(module) & forbidden[module.split(".")[0]]
    if module in PLAIN or module.startswith("trainer.data"):
        assert "parallel" not in packages(module)


def room_of(module: str) -> str:
    """The folder of a package that a module is in, or the module itself where it is in none."""
    return ".".join(module.split(".")[:2])


def room_table() -> dict[str, list[str]]:
    text = ROOMS.strip().replace("\n    ", " ")
    return {
        room: allowed.split() for room, _, allowed in (s.partition(":") for s in text.splitlines())
    }


def test_rooms_import_what_their_table_says():
    found: dict[str, set[str]] = {}
    for module in FILES:
        room, allowed = room_of(module), found.setdefault(room_of(module), set())
        allowed |= {room_of(name) for name in imports(TREES[module]) & FILES.keys()} - {room}
    table = room_table()
    assert {room: sorted(names) for room, names in found.items() if "." in room} == {
        room: sorted(names) for room, names in table.items()
    }


def test_no_room_imports_one_above_it():
    seen: set[str] = set()
    for room, allowed in room_table().items():
        assert set(allowed) <= seen, f"{room} is above {set(allowed) - seen}"
        seen.add(room)
    assert sum(room.startswith("trainer.") for room in seen) <= 25


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
    if module.startswith("launch"):
        return  # `--help` answers before torch is loaded
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)]
    inside = {name for function in functions for name in imports(function)}
    assert all(name in OPTIONAL or name.split(".")[0] in OPTIONAL for name in inside)


@pytest.mark.parametrize("module", FILES)
def test_no_module_of_ours_is_imported_by_a_string(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            (name,) = node.args
            assert isinstance(name, ast.Constant) and name.value.split(".")[0] not in PACKAGES


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


VAGUE = {"What", "Whether", "Why", "Of", "As", "Where"}


def test_docstrings_open_with_a_verb_or_a_noun():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [
        text.split()[0]
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
    ]
    assert sum(word in VAGUE for word in found) < 0.02 * len(found)
