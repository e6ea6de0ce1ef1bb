"""A plan as text on the console."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Console

from launch.cli.asked import Asked
from parallel.pipeline.schedules import SCHEDULES
from trainer.plan.constants import Fit
from trainer.plan.layout import Layout, layout_name
from trainer.plan.machine import GIB, Machine
from trainer.plan.planner import FULL, Card
from trainer.plan.result import Plan, Planned, Refused

BAR = 20  # columns of a full card


def layout_words(layout: Layout) -> str:
    """Return the words behind launch/train.py that make a layout on as many ranks as it has."""
    if layout.shard > 1:
        words = ["strategy=fsdp"]
        words += [f"strategy.replicate={layout.replicate}"] * (layout.replicate > 1)
    else:
        words = ["strategy=ddp" if layout.replicate > 1 else "strategy=single"]
    for axis in ("context", "tensor", "pipeline"):
        degree = getattr(layout, axis)
        words += [f"strategy.{axis}={degree}"] * (degree > 1)
    if layout.context > 1:
        words.append(f"strategy.context_method={layout.context_method}")
    if layout.pipeline > 1:
        words.append(f"strategy.schedule={layout.schedule}")
        if layout.stages_per_rank != SCHEDULES[layout.schedule].least_stages:
            words.append(f"strategy.stages_per_rank={layout.stages_per_rank}")
    words.append(f"micro_batch_size={layout.micro_batch}")
    if layout.recomputed != "none":
        words.append(f"activation_checkpointing={layout.recomputed}")
    if layout.chunks > 1:
        words.append(f"loss.chunks={layout.chunks}")
    return " ".join(words)


def memory_bar(card: Card, size: float) -> str:
    """Return the memory of a card as a bar: used, then what its libraries take, then free."""
    used = min(BAR, round(BAR * card.terms.total / size))
    whole = min(BAR, max(used, round(BAR * card.total / size)))
    return "█" * used + "▒" * (whole - used) + "·" * (BAR - whole)


def format_terms(terms: Iterable[tuple[str, float]], scale: float, unit: str) -> str:
    """Return terms that are not negligible, the largest first."""
    shown = sorted(((value / scale, name) for name, value in terms), reverse=True)
    return " · ".join(f"{name} {value:.3g}" for value, name in shown if value > 0.004) + f" {unit}"


def print_layouts(asked: Asked, plan: Plan) -> None:
    """Print the proposed layout, the fastest, and those that do not fit."""
    assert plan.proposed is not None
    rows = [("→", plan.proposed), *((str(n), p) for n, p in enumerate(plan.fastest, 1))]
    lines = [_head(asked, plan.ranks), _counts(asked, plan), "", TITLES]
    lines += [_row(asked, name, planned) for name, planned in rows]
    lines += ["", _reason(asked, plan), ""]
    lines += [f"{name:>2}  {layout_words(planned.layout)}" for name, planned in rows]
    lines += [""] + [f" -  {_refusal(refused)}" for refused in plan.refused]
    lines += ["", *_breakdown(asked, plan.proposed), *_cost(asked, plan.proposed)]
    print_lines(lines)


def print_layout(asked: Asked, named: Planned, near: Layout | None) -> None:
    """Print one layout term by term, and for each pipeline rank."""
    planner, layout = asked.planner, named.layout
    error = error_text(planner.fit, planner.machine)
    lines = [_head(asked, layout.ranks), f"times {error}", "", TITLES, _row(asked, " ", named), ""]
    lines += _breakdown(asked, named)
    if layout.pipeline > 1:
        lines.append("pipeline rank   GiB   seconds of a micro-batch")
        parts = planner.times.pipeline_ranks(layout)
        for rank, (part, memory) in enumerate(zip(parts, named.card.ranks, strict=True)):
            seconds = planner.times.rank_time(layout, part).total
            terms = format_terms(asdict(memory).items(), GIB, "GiB")
            lines.append(f"{rank:>13} {memory.total / GIB:5.1f}   {seconds:.3g}   {terms}")
    if not planner.fits(layout):
        lines.append(f"does not fit: {_refusal(Refused(layout, named.card, near))}")
    print_lines([*lines, *_cost(asked, named)])


def print_sizes(asked: Asked, plans: Sequence[Plan]) -> None:
    """Print what more devices bring."""
    titles = f"{'devices':>8} {'hosts':>6} {'step':>9} {'MFU':>5} {'days':>8} {'device hours':>13}"
    lines = ["", titles + ("  dollars" if asked.config.dollars_per_gpu_hour else "")]
    for plan in plans:
        assert plan.proposed is not None
        seconds = plan.proposed.time.total
        days, hours, dollars = run_cost(asked, plan.proposed)
        cells = f"{plan.ranks:>8,} {plan.ranks // asked.host:>6,} {_duration(seconds):>9}"
        cells += f" {asked.planner.times.mfu(seconds, plan.ranks):>5.0%} {_days(days):>8}"
        cells += f" {hours:>13,.0f}" + (f" {dollars:>10,.0f}" if dollars else "")
        lines.append(f"{cells}  {layout_words(plan.proposed.layout)}")
    print_lines(lines)


TITLES = (
    f"    {'layout':<46} {'micro':>8} {'recomputed':<10} {'GiB':>5} {'':<{BAR}} {'step':>9} "
    f"{'MFU':>4} {'exposed':>7} {'bubble':>6} {'tokens/s':>9}"
)


def _head(asked: Asked, ranks: int) -> str:
    planner, work = asked.planner, asked.planner.work
    weights = sum(block.weights for block in work.blocks) + work.outer_weights
    machine = planner.machine
    hosts = f"{asked.host} a host, {machine.network * 8 / 1e9:.0f} Gbit/s each"
    step = f"{work.samples:,} × {work.tokens:,} tokens a step, {planner.precision}"
    count = f"{weights / 1e9:.2f} B" if weights > 1e9 else f"{weights / 1e6:.1f} M"
    return f"{asked.title}: {count} parameters · {ranks:,} × {machine.title}, {hosts} · {step}"


def error_text(fit: Fit, machine: Machine) -> str:
    """Return how well times are known."""
    found = f"± {fit.median_error:.0%}, nine of ten within {fit.ninetieth_error:.0%}: "
    if fit.calibrated:
        return found + "measured here"
    if machine.generation == "cpu":
        return found + "of another CPU; python launch/plan.py calibrate measures this one"
    found += "not calibrated, the error on unseen stacks"
    if machine.fitted:
        return found
    return (
        f"{found} of A100 and H100; no step of a {machine.title} was fitted to, so it may be more"
    )


def _counts(asked: Asked, plan: Plan) -> str:
    fit, machine = asked.planner.fit, asked.planner.machine
    size, error = machine.memory / GIB, error_text(fit, machine)
    fitting = f"{len(plan.found.candidates):,} fit into {FULL:.0%} of {size:.1f} GiB"
    return f"{plan.found.legal:,} legal layouts, {fitting}; times {error}"


def _row(asked: Asked, name: str, planned: Planned) -> str:
    planner, layout, time = asked.planner, planned.layout, planned.time
    micro = f"{layout.micro_batch} × {planner.micro_batches(layout)}"
    tokens = planner.work.samples * planner.work.tokens / time.total
    bar = memory_bar(planned.card, planner.machine.memory)
    return (
        f"{name:>2}  {layout_name(layout):<46} {micro:>8} {layout.recomputed:<10} "
        f"{planned.card.total / GIB:>5.1f} {bar} {_duration(time.total):>9} "
        f"{planner.times.mfu(time.total, layout.ranks):>4.0%} {time.exposed / time.total:>7.0%} "
        f"{time.bubble / time.total:>6.0%} {tokens:>9,.0f}"
    )


def _days(days: float) -> str:
    return f"{days:,.0f}" if days >= 100 else f"{days:.3g}"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _reason(asked: Asked, plan: Plan) -> str:
    """Return why a layout is proposed."""
    assert plan.proposed is not None
    slack, candidates = asked.config.plan.slack, plan.found.candidates
    near = sum(c.seconds <= candidates[0].seconds * (1 + slack) for c in candidates)
    slower = plan.proposed.time.total / candidates[0].seconds - 1
    if near == 1:
        return "→ is the fastest by far"
    return (
        f"→ is the simplest of {near:,} within {slack:.0%} of the fastest, less than times can be "
        "told apart by: least split, fewest axes, least recomputed, then memory "
        f"({max(0.0, slower):+.1%})"
    )


def _refusal(refused: Refused) -> str:
    near = f"; nearest that fits: {layout_words(refused.nearest)}" if refused.nearest else ""
    terms = format_terms(refused.card.named().items(), GIB, "GiB")
    total = f"{refused.card.total / GIB:,.0f} GiB do not fit"
    return f"{layout_name(refused.layout)}: {total}: {terms}{near}"


def _breakdown(asked: Asked, planned: Planned) -> list[str]:
    """Return the terms of a layout's memory and time."""
    card, time = planned.card, planned.time
    memory = [*card.named().items(), ("reserve", card.reserve)]
    stage = f", pipeline rank {card.stage}" if planned.layout.pipeline > 1 else ""
    names = {"tensor": "tensor shown", "context": "context shown", "data": "weights shown"}
    seconds = [(names.get(name, name), value) for name, value in time.terms().items()]
    scale, unit = (1.0, "s") if time.total >= 1 else (1e-3, "ms")
    return [
        f"memory{stage}: {format_terms(memory, GIB, 'GiB')} = {card.total / GIB:.1f} GiB",
        f"step: {format_terms(seconds, scale, unit)} = {_duration(time.total)}",
    ]


def run_cost(asked: Asked, planned: Planned) -> tuple[float, float, float]:
    """Return the days, the device hours and the dollars of the whole run."""
    config, work = asked.config, asked.planner.work
    steps = config.tokens / (work.samples * work.tokens) if config.tokens else config.steps
    seconds = steps * planned.time.total
    hours = seconds / 3600 * planned.layout.ranks
    return seconds / 86400, hours, hours * config.dollars_per_gpu_hour


def _cost(asked: Asked, planned: Planned) -> list[str]:
    """Return what the whole run takes, if its length is given."""
    if not (asked.config.tokens or asked.config.dollars_per_gpu_hour):
        return []
    days, hours, dollars = run_cost(asked, planned)
    length = f"{asked.config.tokens:.3g} tokens" if asked.config.tokens else "all steps"
    money = f" · $ {dollars:,.0f}" if dollars else ""
    return [f"{length}: {_days(days)} days · {hours:,.0f} device hours{money}"]


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as they are."""
    Console(soft_wrap=True).print("\n".join(lines), markup=False, highlight=False)
