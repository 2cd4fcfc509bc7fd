"""Charts as inline SVG, in the page's colours. Each has a title and a description for people who do not see it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from ftjax.page.document import COLOURS, key

WIDTH, HEIGHT = 560, 260
RIGHT, TOP, FOOT = 14, 14, 54  # margins; the left one fits the labels
LETTER = 10  # width of a letter in the largest size that the page's style gives it
NOISE = 1e-6  # relative difference below which values are equal up to rounding

Points = Sequence[tuple[float, float]]


def line_chart(title: str, series: Mapping[str, Points], *, across: str = "step") -> str:
    """Draw series over `across`, without points that are not finite; a series has the colour of its place. Empty if no point is
    left.
    """
    kept = {name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()}
    kept = {name: thinned(points) for name, points in kept.items() if points}
    if not kept:
        return ""
    every = [point for points in kept.values() for point in points]
    colours = dict(zip(series, COLOURS, strict=False))
    y_of, y_ticks = _axis([y for _, y in every], HEIGHT - FOOT, TOP)
    left = _margin(_labels(y_ticks))
    x_of, x_ticks = _axis([x for x, _ in every], left, WIDTH - RIGHT - _half(f"{max(x for x, _ in every):,.0f}"), whole=True)
    parts = [*_grid(y_ticks, y_of, left), *_below(x_ticks, x_of), _label(across, left)]
    for (name, points), colour in ((one, colours[one[0]]) for one in kept.items()):
        places = [(x_of(x), y_of(y)) for x, y in points]
        if len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        if len(places) <= 40:
            parts += [
                f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{escape(name)}: {value[1]:.6g} at {across} {value[0]:g}</title></circle>"
                for (x, y), value in zip(places, points, strict=True)
            ]
    told = "; ".join(_described(name, points, across) for name, points in kept.items())
    return figure(title, told, parts, HEIGHT, {name: colours[name] for name in kept} if len(series) > 1 else {})


def interval_chart(title: str, values: Mapping[str, tuple[float, float, float]]) -> str:
    """Draw values with their bounds, one below the other on one axis: `{"tuned": (value, low, high), "base": ...}`."""
    every = [x for one in values.values() for x in one if math.isfinite(x)]
    if not every:
        return ""
    step, left, foot = 28, _margin(values), 32
    height = TOP + len(values) * step + foot
    x_of, ticks = _axis(every, left + 2 * RIGHT, WIDTH - 3 * RIGHT)
    parts = [
        f'<line class="grid" x1="{x_of(t):.1f}" x2="{x_of(t):.1f}" y1="{TOP}" y2="{height - foot}"/>'
        f'<text x="{x_of(t):.1f}" y="{height - foot + 20}" text-anchor="middle">{label}</text>'
        for t, label in zip(ticks, _labels(ticks), strict=True)
    ]
    for number, (name, (value, low, high)) in enumerate(values.items()):
        colour, y = COLOURS[number % len(COLOURS)], TOP + step * (number + 0.5)
        parts.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        if math.isfinite(low) and math.isfinite(high):
            parts.append(
                f'<line class="whisker {colour}" x1="{x_of(low):.1f}" x2="{x_of(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        if math.isfinite(value):
            parts.append(f'<circle class="dot {colour}" cx="{x_of(value):.1f}" cy="{y:.1f}" r="5"/>')
    told = "; ".join(f"{name}: {value:.4g}, from {low:.4g} to {high:.4g}" for name, (value, low, high) in values.items())
    return figure(title, told, parts, height, {})


def histogram_chart(title: str, bins: Sequence[tuple[int, int, int]], across: str, what: str) -> str:
    """Draw bars: `(from, to, count)`, the last one inclusive; `across` names the axis, `what` is counted."""
    if not bins:
        return ""
    y_of, y_ticks = _axis([0, max(count for *_, count in bins) or 1], HEIGHT - FOOT, TOP, whole=True)
    left = _margin(_labels(y_ticks))
    step, every = (WIDTH - left - RIGHT) / len(bins), math.ceil(len(bins) / 6)
    parts = list(_grid(y_ticks, y_of, left))
    for number, (low, high, count) in enumerate(bins):
        x, y = left + number * step, y_of(count)
        parts.append(
            f'<rect class="bar" x="{x + 1:.1f}" y="{y:.1f}" width="{max(step - 2, 1):.1f}" height="{HEIGHT - FOOT - y:.1f}">'
            f"<title>{low:,} to {high:,}: {count:,} {escape(what)}</title></rect>"
        )
        if number % every == 0:
            parts.append(f'<text x="{x + step / 2:.1f}" y="{HEIGHT - FOOT + 22}" text-anchor="middle">{low:,}</text>')
    told = "; ".join(f"{low:,} to {high:,}: {count:,}" for low, high, count in bins)
    return figure(title, f"{what} by {across}: {told}", [*parts, _label(across, left)], HEIGHT, {})


def thinned(points: Points, most: int = 1000) -> Points:
    """Return at most about `most` points, with every peak: the lowest and highest of each part, and both ends."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept = {points[0], points[-1]}
    for at in range(0, len(points), size):
        part = points[at : at + size]
        kept |= {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
    return sorted(kept)


def figure(title: str, told: str, parts: Sequence[str], height: float, shown: Mapping[str, str]) -> str:
    """Return the HTML of a chart. Args: told: what it shows, in words; shown: names of series and their colours."""
    named = "".join(key(name, colour) for name, colour in shown.items())
    return (
        f'<figure><figcaption>{escape(title)}{named}</figcaption><svg viewBox="0 0 {WIDTH} {height:g}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(told)}</desc>{''.join(parts)}</svg></figure>"
    )


def _described(name: str, points: Points, across: str) -> str:
    low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
    return (
        f"{name}: from {points[0][1]:.4g} at {across} {points[0][0]:g} to {points[-1][1]:.4g} at {across} {points[-1][0]:g}, "
        f"lowest {low[1]:.4g} at {low[0]:g}, highest {high[1]:.4g} at {high[0]:g}"
    )


def _axis(values: Sequence[float], start: float, stop: float, *, whole: bool = False):
    """Return `(function from value to position, ticks)`. A constant is shown with zero on the axis; as an integer (a step),
    alone in the middle."""
    low, high = min(values), max(values)
    if whole and low == high:
        return (lambda value: (start + stop) / 2), [low]
    if high - low <= NOISE * max(abs(low), abs(high)):
        low, high = min(low, 0.0), max(high, 0.0)
        high = high if low or high else 1.0
    raw = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * n for n in (1, 2, 2.5, 5, 10) if size * n >= raw * (1 - NOISE))
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + NOISE), math.ceil(high / step - NOISE)
    if whole:  # steps begin and end with the data
        ticks = [n * step for n in range(first, last + 1) if low <= n * step <= high]
    else:
        ticks = [n * step for n in range(first, last + 1)]
        low, high = ticks[0], ticks[-1]
    return (lambda value: start + (stop - start) * (value - low) / (high - low)), ticks


def _grid(ticks: Sequence[float], y_of, left: float):
    """Yield horizontal lines, each with its value at the left."""
    for t, label in zip(ticks, _labels(ticks), strict=True):
        y = y_of(t)
        yield f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'


def _below(ticks: Sequence[float], x_of):
    """Yield values under the axis, leaving out those that would touch."""
    labels = _labels(ticks)
    room = (x_of(ticks[-1]) - x_of(ticks[0])) / max(len(ticks) - 1, 1)
    every = math.ceil((2 * max(map(_half, labels)) + LETTER) / room) if room else 1
    for t, label in list(zip(ticks, labels, strict=True))[::every]:
        yield f'<text x="{x_of(t):.1f}" y="{HEIGHT - FOOT + 22}" text-anchor="middle">{label}</text>'


def _label(across: str, left: float) -> str:
    return f'<text x="{(left + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>'


def _margin(labels: Iterable[str]) -> int:
    """Return the width at the left for labels and the gap after them."""
    return max(62, LETTER * max(map(len, labels)) + 14)


def _half(label: str) -> float:
    return LETTER * len(label) / 2


def _labels(values: Sequence[float]) -> list[str]:
    """Format as `1,500` `0.25` `2e-05`, with as many digits as tell the values apart."""
    for digits in range(4, 17):
        labels = [_short(value, digits) for value in values]
        if len(set(labels)) == len(set(values)):
            break
    return labels


def _short(value: float, digits: int) -> str:
    size = abs(value)
    if value and (size >= 1e6 or size < 1e-3):
        return f"{value:.{digits - 1}g}"
    if size < 1000:
        return f"{value:.{digits}g}"
    return f"{value:,.{digits - 4}f}"
