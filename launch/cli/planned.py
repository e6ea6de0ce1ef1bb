"""A plan from the command line: searched, shown, and written if asked to."""

from dataclasses import replace
from pathlib import Path

from launch.cli.asked import Asked
from launch.cli.layouts import legal_space, list_schedule, why_none_is_legal
from launch.cli.plan_page import write_plan
from launch.cli.plan_text import print_layout, print_layouts, print_lines, print_sizes
from launch.cli.plan_trace import trace_lines, why_not_traced
from parallel.errors import ConfigError
from trainer.plan.layout import Layout
from trainer.plan.result import Plan, plan_layouts, planned_layout
from trainer.plan.search import Space, nearest

COUNTS = 4  # numbers of devices that are shown where the command line names none


def print_plan(asked: Asked) -> None:
    """Search, print what was found, and write it if asked to."""
    plans = _plan_named(asked) if asked.layout else _plan_all(asked)
    if asked.config.json:
        write_plan(asked, plans, Path(asked.config.json))
    layout = asked.layout or (plans[0].proposed.layout if plans[0].proposed else None)
    if asked.config.plan.trace and layout:
        _print_trace(asked, layout)


def _plan_named(asked: Asked) -> list[Plan]:
    """Print a strategy that was named; search only where it does not fit, or for a picture."""
    planner, layout = asked.planner, asked.layout
    assert layout is not None
    named, plans = planned_layout(planner, layout, list_schedule), []
    fits, near = named.card.total <= planner.limit, None
    if not fits or asked.config.json:
        plans.append(_plan(asked, _space(asked), asked.nodes))
        found = plans[0].found.candidates
        near = nearest(found, layout).layout if found and not fits else None
    print_layout(asked, named, near)
    return [replace(plan, named=named) for plan in plans]


def _plan_all(asked: Asked) -> list[Plan]:
    """Search and print the layouts of the cluster, or of the smallest ones that take the job."""
    planner, space, nodes = asked.planner, _space(asked), asked.nodes
    if not nodes:
        nodes = planner.smallest(space, asked.host) // asked.host
        if not nodes:
            raise ConfigError(_fits_nowhere(asked))
    plans = [_plan(asked, space, nodes)]
    if not plans[0].found.legal:
        raise ConfigError(*why_none_is_legal(asked.training, space))
    if plans[0].proposed is None:
        raise ConfigError(_fits_not_here(asked, planner.smallest(space, asked.host)))
    print_layouts(asked, plans[0])
    if not asked.nodes:
        plans += [_plan(asked, space, nodes * 2**power) for power in range(1, COUNTS)]
        plans = [plan for plan in plans if plan.proposed]
        print_sizes(asked, plans)
    return plans


def _print_trace(asked: Asked, layout: Layout) -> None:
    """Trace a layout behind its plan, which stands whatever comes of that."""
    if why := why_not_traced(asked):
        print_lines([f"not traced: {why}"])
        return
    print_lines(["tracing the step on fake tensors … (plan.trace=false leaves it out)"])
    try:
        print_lines(trace_lines(asked, layout))
    except KeyboardInterrupt:
        print_lines(["not traced: interrupted; the plan stands"])


def _plan(asked: Asked, space: Space, nodes: int) -> Plan:
    options = asked.config.plan
    there = replace(space, ranks=nodes * asked.host)
    return plan_layouts(asked.planner, there, options.slack, options.top, list_schedule)


def _space(asked: Asked) -> Space:
    """Return the layouts that are searched."""
    ranks = max(1, asked.nodes) * asked.host
    return legal_space(asked.planner, asked.training, ranks, asked.fixed)


def _fits_nowhere(asked: Asked) -> str:
    planner = asked.planner
    return (
        f"{asked.title} fits on no number of {planner.machine.title} that batch_size="
        f"{asked.training.batch_size} can be spread over; raise batch_size, or choose a cluster= "
        "with more memory"
    )


def _fits_not_here(asked: Asked, smallest: int) -> str:
    """Return the message that nothing fits on the devices there are."""
    there = asked.nodes * asked.host
    if not smallest:
        return _fits_nowhere(asked)
    return (
        f"{asked.title} with batch_size={asked.training.batch_size} fits on no layout of {there} × "
        f"{asked.planner.machine.title}; the least that takes it are {smallest}: set "
        f"cluster.nodes={smallest // asked.host}"
    )
