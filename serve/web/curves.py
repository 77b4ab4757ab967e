"""Curves as SVG with attributes alone: the pages' policy allows no styles inside them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM = 460, 220, 56, 28
TOP, RIGHT = 12, 12
TICKS = 4


def curve(title: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> Markup:
    """Draw named series of (step, value) into one picture; empty where there are no points."""
    points = [point for _, line in series for point in line]
    if not points:
        return Markup("")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    low_y, high_y = min(ys), max(ys)
    if high_y - low_y < 1e-9:
        low_y, high_y = low_y - 0.5, high_y + 0.5

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in range(TICKS + 1):
        value = low_y + (high_y - low_y) * tick / TICKS
        _, height = place(low_x, value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" '
            f'y2="{height:.1f}"/><text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">'
            f"{value:.3g}</text>"
        )
    for number, (name, line) in enumerate(series):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline class="line-{number}" points="{path}"/>')
        if line:
            x, y = place(*line[-1])
            parts.append(f'<circle class="dot-{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        parts.append(
            f'<text class="name-{number}" x="{WIDTH - RIGHT}" y="{TOP + 12 + 15 * number}" '
            f'text-anchor="end">{escape(name)}</text>'
        )
    for value, anchor in ((low_x, "start"), (high_x, "end")):
        x, _ = place(value, low_y)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{value:g}</text>')
    return Markup(
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
