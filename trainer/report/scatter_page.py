"""A page with one picture: points in two dimensions, some of them named; one file, no script."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from trainer.report.svg_chart import Axis, format_tick

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 16, 48
STYLE = Markup(
    ":root{color-scheme:light dark}body{font:15px/1.45 system-ui,sans-serif;margin:1.6rem auto;"
    "max-width:1000px;padding:0 1rem}svg{width:100%;height:auto}text{font-size:12px;fill:#68707c}"
    ".grid{stroke:#8884;fill:none}.point{fill:#2367b5;opacity:.28}.mark{fill:#d1620c}"
    ".name{font-weight:600;fill:#d1620c}.limit{stroke:#c62f3b;stroke-dasharray:5 3;fill:none}"
)
PAGE = Markup(
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'\"><title>{title}</title><style>{style}</style></head><body>"
    '<h1>{title}</h1><p>{text}</p><svg viewBox="0 0 {width} {height}" role="img" '
    'aria-label="{title}">{parts}</svg><ul>{items}</ul></body></html>\n'
)


@dataclass(frozen=True)
class Point:
    """One point, with what is shown under the pointer; marked ones have a short name."""

    x: float
    y: float
    text: str
    name: str = ""


def scatter_page(
    title: str,
    text: str,
    titles: tuple[str, str],
    points: Sequence[Point],
    marks: Sequence[Point],
    limit: float,
) -> str:
    """Return a page that draws points, and marks with their names; `limit` is a line across x.

    The second axis is logarithmic where values span orders of magnitude.
    """
    every = [*points, *marks]
    across = Axis([*(p.x for p in every), limit], LEFT, WIDTH - RIGHT)
    up = Axis([p.y for p in every], HEIGHT - BOTTOM, TOP + 6, log=True)
    parts = [_grid(across, up, titles)]
    parts.append(_path("limit", f"M{across(limit):.1f},{TOP}V{HEIGHT - BOTTOM}"))
    parts += [_circle("point", 2.5, across(p.x), up(p.y), p.text) for p in points]
    for mark in marks:
        x, y = across(mark.x), up(mark.y)
        parts.append(_circle("mark", 5.0, x, y, mark.text))
        parts.append(_text(x + 8, y - 6, "start", mark.name, "name"))
    items = (
        Markup("<li>{}: {:.4g} {}, {:.4g} {}</li>").format(p.text, p.x, titles[0], p.y, titles[1])
        for p in marks
    )
    return str(
        PAGE.format(
            title=title,
            text=text,
            style=STYLE,
            width=WIDTH,
            height=HEIGHT,
            parts=Markup().join(parts),
            items=Markup().join(items),
        )
    )


def _grid(across: Axis, up: Axis, titles: tuple[str, str]) -> Markup:
    parts = []
    for value in up.axis_ticks():
        parts.append(_path("grid", f"M{LEFT},{up(value):.1f}H{WIDTH - RIGHT}"))
        parts.append(_text(LEFT - 8, up(value) + 4, "end", format_tick(value)))
    for value in across.axis_ticks():
        parts.append(_path("grid", f"M{across(value):.1f},{TOP}V{HEIGHT - BOTTOM}"))
        parts.append(_text(across(value), HEIGHT - BOTTOM + 17, "middle", format_tick(value)))
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 10, "middle", titles[0]))
    return Markup().join([*parts, _text(LEFT, TOP - 2, "start", titles[1])])


def _path(look: str, path: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(look, path)


def _circle(look: str, radius: float, x: float, y: float, text: str) -> Markup:
    shape = Markup('<circle class="{}" r="{}" cx="{:.1f}" cy="{:.1f}"><title>{}</title></circle>')
    return shape.format(look, radius, x, y, text)


def _text(x: float, y: float, anchor: str, text: str, look: str = "") -> Markup:
    shown = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>')
    return shown.format(x, y, anchor, look, text)
