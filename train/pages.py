"""Self-contained HTML pages: tables and drawings in one file, no network, no script.

Whatever is shown is text, never markup.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}
table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ccc;padding:.3rem .5rem;
text-align:left;vertical-align:top}pre{white-space:pre-wrap;margin:0;font:13px/1.4 monospace}
figure{display:inline-block;width:48%;margin:0}figure svg{width:100%;height:auto}
.warn{background:#fff3cd;padding:.3rem .6rem;margin:.2rem 0}
@media(max-width:40rem){figure{width:100%}}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Return a whole page of parts that are markup already."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f'</title><meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>" + "\n".join(parts) + "</body></html>\n"
    )


def draw(
    series: Sequence[tuple[Sequence[tuple[float, float]], str, str]], x_label: str, y_label: str
) -> str:
    """Return a figure of (points, label, style of matplotlib) as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3), layout="constrained")
    drawn = [(points, label, style) for points, label, style in series if points]
    for points, label, style in drawn:
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    if len(drawn) > 1:
        axes.legend()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    drawing = text.getvalue()
    return f"<figure>{drawing[drawing.index('<svg') :]}</figure>"


def table(title: str, rows: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    body = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return (f"<h2>{html.escape(title)}</h2>" if title else "") + f"<table>{body}</table>"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
