"""Curves as inline SVG that takes its text colour and its font from the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from .naming import color_of

_INK = "#123456"
"""Stands for the page's text colour until the SVG is written."""
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


@dataclass(frozen=True)
class Point:
    """One value of a curve with its 95 % interval, where it has one."""

    x: float
    value: float
    low: float | None = None
    high: float | None = None


def steps_chart(curves: Mapping[str, Sequence[Point]], few: int, label: str, reference: float | None = None) -> Markup:
    """A score over the number of steps, one line per model; ``few`` is marked, ``reference`` is a dashed line."""
    figure, axes = _axes()
    steps = sorted({point.x for points in curves.values() for point in points})
    axes.axvline(few, color=_INK, alpha=0.10, linewidth=14, zorder=0)
    if reference is not None:
        axes.axhline(reference, color=_INK, alpha=0.5, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for number, (model, points) in enumerate(curves.items()):
        color, marker = color_of(model), _MARKERS[number % len(_MARKERS)]
        xs = [point.x for point in points]
        strong = model == "d-opsd"
        axes.plot(
            xs, [point.value for point in points], color=color, marker=marker, markersize=6 if strong else 5,
            linewidth=2.6 if strong else 1.6, label=model, zorder=4 if strong else 3,
        )  # fmt: skip
        bounds = [(p.x, p.low, p.high) for p in points if p.low is not None and p.high is not None]
        if bounds:
            x, low, high = zip(*bounds, strict=True)
            axes.fill_between(x, low, high, color=color, alpha=0.10, linewidth=0, zorder=2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(steps))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{step:g}" for step in steps])
    axes.set_xlabel("steps")
    return _svg(figure, label)


def line_chart(curves: Mapping[str, Sequence[Point]], label: str, xlabel: str) -> Markup:
    """Plain lines, one per model."""
    figure, axes = _axes()
    for model, points in curves.items():
        axes.plot([p.x for p in points], [p.value for p in points], color=color_of(model), linewidth=1.8)
    axes.set_xlabel(xlabel)
    return _svg(figure, label)


def _axes() -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=_INK, labelsize=10, length=0, pad=5)
    axes.xaxis.label.set_color(_INK)
    axes.xaxis.label.set_size(10)
    axes.grid(axis="y", color=_INK, alpha=0.13, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_INK)
        spine.set_alpha(0.4)
    return figure, axes


def _svg(figure: Figure, label: str) -> Markup:
    buffer = io.StringIO()
    # the salt keeps the ids of several charts on one page apart, and the file the same from run to run
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-label="@">', text, count=1)
    text = text.replace('"@"', f'"{Markup.escape(label)}"').replace("xlink:href", "href")
    used = set(
        re.findall(r"#([\w.-]+)", text)
    )  # matplotlib numbers every group alike in every chart: keep what is used
    text = re.sub(r'\bid="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r"font: [^;\"]*?([\d.]+)px[^;\"]*", r"font-size: \1px", text)
    return Markup(text.replace(_INK, "currentColor"))
