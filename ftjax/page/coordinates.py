"""Charts of a search: parallel coordinates, one axis for each setting and one for the result, and bars of shares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ftjax.page.chart import HEIGHT, RIGHT, TOP, WIDTH, figure

FOOT, SIDE = 44, 60
ROW = 28
MOST = 200  # lines that are drawn, the best ones


@dataclass(frozen=True)
class Axis:
    """One axis. Attributes: values: of each line, in the lines' order; None where a line has none."""

    name: str
    values: Sequence[Any]
    logarithmic: bool = False

    def places(self) -> list[float | None]:
        """Return where each value is: 0 at the bottom, 1 at the top; texts and the like are spread evenly."""
        if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in self.values):
            scale = math.log if self.logarithmic else float
            numbers = [None if value is None or not math.isfinite(value) else scale(value) for value in self.values]
            found = [number for number in numbers if number is not None]
            low, high = min(found, default=0.0), max(found, default=0.0)
            return [None if one is None else (one - low) / (high - low) if high > low else 0.5 for one in numbers]
        names = self.names()
        return [names.index(str(value)) / max(len(names) - 1, 1) for value in self.values]

    def names(self) -> list[str]:
        return list(
            dict.fromkeys(str(value) for value in sorted(self.values, key=lambda value: (str(type(value)), str(value))))
        )

    def ticks(self) -> list[tuple[float, str]]:
        """Return places and labels: the ends of a range, or all texts."""
        numbers = [value for value in self.values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) == sum(value is not None for value in self.values):
            finite = [value for value in numbers if math.isfinite(value)]
            if not finite:
                return []
            return [(0.0, f"{min(finite):.4g}"), (1.0, f"{max(finite):.4g}")] if max(finite) > min(finite) else [
                (0.5, f"{finite[0]:.4g}")
            ]  # fmt: skip
        names = self.names()
        return [(number / max(len(names) - 1, 1), name) for number, name in enumerate(names)]


def parallel_chart(title: str, axes: Sequence[Axis], labels: Sequence[str], best: int | None) -> str:
    """Draw one line per trial through its values on all axes.

    Args:
        labels: what a line is, for the text that shows over it.
        best: the line that is drawn in the colour of the best.
    """
    count = len(labels)
    if not count or len(axes) < 2:
        return ""
    bottom, gap = HEIGHT - FOOT, (WIDTH - 2 * SIDE) / (len(axes) - 1)
    xs = [SIDE + gap * number for number in range(len(axes))]
    places = [axis.places() for axis in axes]

    def y_of(place: float) -> float:
        return bottom - (bottom - TOP) * place

    parts = []
    lines = [number for number in range(count) if number != best][:MOST] + ([] if best is None else [best])
    for number in lines:
        points = [(x, column[number]) for x, column in zip(xs, places, strict=True)]
        path = " ".join(f"{x:.1f},{y_of(place):.1f}" for x, place in points if place is not None)
        style = 'class="line k2"' if number == best else 'class="line k1" opacity=".35"'
        parts.append(f'<polyline {style} points="{path}"><title>{escape(labels[number])}</title></polyline>')
    for number, (x, axis) in enumerate(zip(xs, axes, strict=True)):
        side = "start" if number == 0 else "end" if number == len(axes) - 1 else "middle"
        at = {"start": x - SIDE + RIGHT, "end": x + SIDE - RIGHT, "middle": x}[side]
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        lower = 16 if len(axes) > 3 and number % 2 else 0  # names of neighbours would touch
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 24 + lower}" text-anchor="{side}">{escape(axis.name)}</text>')
        for place, label in axis.ticks():
            parts.append(f'<text x="{x + 6:.1f}" y="{y_of(place) + 4:.1f}">{escape(label)}</text>')
    told = f"{count} trials; axes: {', '.join(axis.name for axis in axes)}"
    if best is not None:
        told += f"; the best: {labels[best]}"
    return figure(title, told, parts, HEIGHT, {"the best": "k2"} if best is not None else {})


def bar_chart(title: str, shares: dict[str, float]) -> str:
    """Draw shares of one as bars, one below the other."""
    if not shares:
        return ""
    left = max(62, 8 * max(map(len, shares)) + 14)
    height = TOP + ROW * len(shares) + 10
    parts = []
    for number, (name, share) in enumerate(shares.items()):
        y = TOP + ROW * number
        wide = (WIDTH - left - 70) * max(0.0, min(share, 1.0))
        parts.append(f'<text x="{left - 10}" y="{y + 18}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect class="bar" x="{left}" y="{y + 4}" width="{max(wide, 1):.1f}" height="{ROW - 10}"/>')
        parts.append(f'<text x="{left + wide + 8:.1f}" y="{y + 18}">{share:.0%}</text>')
    return figure(title, "; ".join(f"{name}: {share:.0%}" for name, share in shares.items()), parts, height, {})
