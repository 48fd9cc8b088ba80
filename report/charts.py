"""Charts of a report as inline SVG: curves, bars and confusion matrices. Colours come from the page's style sheet."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 340, 190                    # of a curve's chart; the page scales it to its card
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 22, 24   # margins around the curves
MOST_POINTS = 1500                          # a longer curve is drawn by the least and largest of neighbouring values
LEVELS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85)   # shares at which a cell of a matrix becomes darker
LONGEST_NAME = 18                           # letters of a class beside a matrix
SAME = 1e-4                                 # values that differ by a smaller share of themselves are one value
COLOURS = ("#0072b2", "#b85c00", "#a2457f", "#00805f", "#846600", "#4b5fc0")   # of kinds of map, as in style.css
PICTURE = "svg{background:#fff}text{font:11px sans-serif;fill:#5b636d}.grid{stroke:#e2ded5}.line{fill:none}"
NUMBERED = 25                               # matrices up to this size have room for numbers


class Curve(NamedTuple):
    """name; values by iteration, None for a gap; colour: a class of the style sheet.

    smooth: draw the mean of neighbours over it, which does not reach over `boundaries`, ascending iterations.
    """

    name: str
    x: Sequence[int]
    y: Sequence[float | None]
    colour: str
    smooth: bool = False
    boundaries: Sequence[int] = ()


class Stage(NamedTuple):
    """A boundary: after this iteration something changes. mark: the letter beside its line."""

    after: int
    mark: str
    text: str


def element(name: str, *children: object, **attributes: object) -> Markup:
    """An element with everything escaped; `class_` is class, other underscores are hyphens, None is left out."""
    written = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _short(value))
        for key, value in attributes.items() if value is not None
    ]
    return Markup("<{}{}>{}</{}>").format(
        Markup(name), Markup("").join(written), Markup("").join(escape(child) for child in children), Markup(name)
    )


def curve_chart(
    key: str, heading: str, curves: Sequence[Curve], length: int, stages: Sequence[Stage] = (),
    starts: int | None = None, percent: bool = False,
) -> Markup:
    """A chart of the curves over iterations 0..length.

    key: of the chart in `chart_data`. heading: for those who do not see it. starts: where the term's weight leaves 0;
    the time before is shaded. percent: values are shares and the axis is in per cent.
    """
    values = [value for curve in curves for value in curve.y if value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    ticks = nice_ticks(min(low, 0.0) if low < 0.5 * high else low, high)
    to_x, to_y = _scales(length, ticks)
    parts = [_grid(ticks, to_y, percent), _bottom(length, to_x)]
    if starts is not None and starts >= 0:
        end = to_x(min(starts, length))
        parts.append(element("rect", class_="before", x=LEFT, y=TOP, width=end - LEFT, height=HEIGHT - TOP - BOTTOM))
    parts.append(_stage_lines(stages, to_x))
    parts += [_curve(curve, to_x, to_y) for curve in curves]
    described = f"{heading}: " + "; ".join(describe(curve, percent) for curve in curves)
    frame = {"data_left": LEFT, "data_right": WIDTH - RIGHT, "data_length": length}
    return element(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="curves", role="img", aria_label=described,
        data_chart=key, **frame,
    )


def threshold_chart(thresholds: Sequence[float], curves: Mapping[str, Sequence[float]]) -> Markup:
    """An SVG file of mIoUs (shares) over background thresholds in 0..1, by name; a dot is a curve's first maximum."""
    ticks = nice_ticks(0.0, max(map(max, curves.values())))
    to_x, to_y = _scales(1, ticks)
    parts = [element("style", PICTURE), _grid(ticks, to_y, True), _bottom(1, to_x)]
    for index, (name, values) in enumerate(curves.items()):
        colour, best = COLOURS[index % len(COLOURS)], max(range(len(values)), key=values.__getitem__)
        text, y = f"{name} {100 * values[best]:.2f} at {thresholds[best]:g}", HEIGHT + 4 + 14 * index
        parts.append(element("path", class_="line", stroke=colour, d=_path(thresholds, values, to_x, to_y)))
        parts.append(element("circle", cx=to_x(thresholds[best]), cy=to_y(values[best]), r=3, fill=colour))
        parts.append(element("text", text, x=LEFT + 6, y=y, style=f"fill:{colour}"))
    parts.append(element("text", "mIoU, per cent, by background threshold", x=LEFT, y=TOP - 9))
    size = {"width": 2 * WIDTH, "viewBox": f"0 0 {WIDTH} {HEIGHT + 14 * len(curves)}"}
    return element("svg", *parts, xmlns="http://www.w3.org/2000/svg", **size)


def dot_chart(names: Sequence[str], series: Mapping[str, Sequence[Sequence[float]]]) -> Markup:
    """An SVG file of mIoUs (shares) of repeated runs: for every series the values of each name, as dots, and a line at
    their mean."""
    values = [value for runs in series.values() for one in runs for value in one]
    ticks = nice_ticks(min(values, default=0.0), max(values, default=1.0))
    to_x, to_y = _scales(len(names), ticks)
    parts = [element("style", PICTURE), _grid(ticks, to_y, True)]
    parts.append(element("text", "mIoU, per cent: a dot a run, a line their mean", x=LEFT, y=TOP - 9))
    for index, name in enumerate(names):
        turn = f"translate({to_x(index + 0.6):.1f} {HEIGHT - 10}) rotate(-20)"
        parts.append(element("text", name, transform=turn, text_anchor="end"))
    for place, (label, runs) in enumerate(series.items()):
        colour = COLOURS[place % len(COLOURS)]
        parts.append(element("text", label, x=LEFT + 6, y=HEIGHT + 44 + 14 * place, style=f"fill:{colour}"))
        for index, own in enumerate(runs):
            x = to_x(index + (place + 1) / (len(series) + 1))
            parts += [element("circle", cx=x, cy=to_y(value), r=2.5, fill=colour) for value in own]
            if own:
                y = to_y(sum(own) / len(own))
                parts.append(element("line", x1=x - 5, x2=x + 5, y1=y, y2=y, stroke=colour))
    size = {"width": 2 * WIDTH, "viewBox": f"0 0 {WIDTH} {HEIGHT + 40 + 14 * len(series)}"}
    return element("svg", *parts, xmlns="http://www.w3.org/2000/svg", **size)


def chart_data(curves: Sequence[Curve], percent: bool = False) -> dict:
    """The points of a chart, to seven digits, for the page's script."""
    lines = [
        {"name": name, "x": list(x), "y": [None if value is None else float(f"{value:.7g}") for value in y]}
        for name, x, y, *_ in curves
    ]
    return {"percent": percent, "lines": lines}


def describe(curve: Curve, percent: bool = False) -> str:
    """First, last and least value in words."""
    points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y is not None]
    if not points:
        return f"{curve.name} has no finite value"
    (first, start), (last, end), factor = points[0], points[-1], 100 if percent else 1
    lowest = min(y for _, y in points)
    return (
        f"{curve.name} {factor * start:.4g} at iteration {first}, {factor * end:.4g} at {last}, "
        f"least {factor * lowest:.4g}"
    )


def smoothed(curve: Curve, reach: int) -> list[float | None]:
    """`running_mean` of the curve, separately before and after each boundary."""
    part, count = np.searchsorted(curve.boundaries, curve.x, side="left"), len(curve.boundaries) + 1
    pieces = [[y for y, own in zip(curve.y, part, strict=True) if own == index] for index in range(count)]
    return [mean for piece in pieces for mean in running_mean(piece, reach)]


def running_mean(values: Sequence[float | None], reach: int) -> list[float | None]:
    """The mean over `reach` neighbours on each side, at the ends over as many as there are; gaps stay gaps."""
    known = np.array([value is not None for value in values], float)
    sums = np.cumsum(np.r_[0.0, [value or 0.0 for value in values]])
    counts = np.cumsum(np.r_[0.0, known])
    means: list[float | None] = []
    for index, value in enumerate(values):
        side = min(reach, index, len(values) - 1 - index)
        first, end = index - side, index + side + 1
        means.append(None if value is None else float((sums[end] - sums[first]) / (counts[end] - counts[first])))
    return means


def reach_of(count: int) -> int:
    """Over how many neighbours on each side a curve of so many points is smoothed."""
    return count // 40


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values that span low..high, at most about `most` of them; from 0 where low and high hardly differ."""
    if high - low <= SAME * max(abs(low), abs(high)):
        low, high = (min(low, 0.0), max(high, 0.0)) if low else (0.0, 1.0)
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, last + 1)]


def class_bars(shares: Sequence[tuple[str, str, float | None]]) -> Markup:
    """Bars below each other: (caption, colour class, share in 0..1 or None). Widths are relative to the page's."""
    parts, step, room = [], 15, 82
    for index, (_, colour, share) in enumerate(shares):
        top, width = index * step, room * (share or 0.0)
        parts.append(element("rect", class_="track", x=0, y=top + 3, width=f"{room}%", height=8, rx=2))
        if share is not None:
            parts.append(element("rect", class_=f"bar {colour}", x=0, y=top + 3, width=f"{width:.2f}%", height=8, rx=2))
        text = "–" if share is None else f"{100 * share:.1f}"
        parts.append(element("text", text, class_="value", x="100%", y=top + 11, text_anchor="end"))
    described = ", ".join(f"{c} {'not there' if s is None else f'{100 * s:.1f} per cent'}" for c, _, s in shares)
    return element(
        "svg", *parts, class_="bars", width="100%", height=len(shares) * step, role="img", aria_label=described
    )


def shares_of(matrix: np.ndarray) -> np.ndarray:
    """Each row divided by its sum; nan in the rows of ids that the ground truth does not have."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return matrix / matrix.sum(1, keepdims=True)


def confusion_chart(key: str, heading: str, matrix: np.ndarray, names: Sequence[str]) -> Markup:
    """Rows the true ids, columns the predicted ones, each row as shares of its true pixels.

    The names of the rows are a drawing of their own, which stays in view when the other is scrolled.
    """
    shares, count = shares_of(matrix), len(names)
    numbered = count <= NUMBERED
    cell = 27 if numbered else 12
    margin = 12 + 6.3 * min(max(len(name) for name in names), LONGEST_NAME)
    parts = [element("rect", class_="track", x=0, y=margin, width=cell * count, height=cell * count)]
    parts += _cells(shares, cell, margin)
    if numbered:
        parts += _numbers(shares, cell, margin)
    rows = []
    for index, name in enumerate(names):
        middle = (index + 0.5) * cell + 3.5
        shown = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
        absent = "name" if np.isfinite(shares[index, 0]) else "name absent"
        rows.append(element("text", shown, class_=absent, x=margin - 6, y=margin + middle, text_anchor="end"))
        turn = f"translate({middle:g} {margin - 6:g}) rotate(-90)"
        parts.append(element("text", shown, class_="name", transform=turn))
    height, width = _short(float(margin + cell * count)), cell * count + LONGEST_NAME
    label = f"{heading}: confusion matrix, rows the true class, columns the predicted one, in per cent of a row"
    frame = {"data_matrix": key, "data_cell": cell, "data_top": margin}
    left = element("svg", *rows, class_="confusion rows", aria_hidden="true", width=margin, height=height)
    right = element(
        "svg", *parts, class_="confusion", role="img", aria_label=label, width=width, height=height, **frame
    )
    return element("div", left, right, class_="matrix" if numbered else "matrix large")


def confusion_data(matrix: np.ndarray) -> list[list[float] | None]:
    """The shares of every row to four digits, None for a row without pixels, for the page's script."""
    return [[round(float(v), 4) or 0 for v in row] if np.isfinite(row[0]) else None for row in shares_of(matrix)]


def _cells(shares: np.ndarray, cell: int, margin: float) -> list[Markup]:
    """One path a level of darkness, for right pixels and for mistakes: few elements, however many classes."""
    with np.errstate(invalid="ignore"):
        level = np.digitize(np.nan_to_num(shares), LEVELS)
    parts = []
    for depth in range(1, len(LEVELS) + 1):
        for kind, chosen in (("right", True), ("wrong", False)):
            where = [(r, c) for r, c in np.argwhere(level == depth) if (r == c) == chosen]
            drawn = "".join(
                f"M{c * cell} {_short(margin + r * cell)}h{cell - 1}v{cell - 1}h{1 - cell}z"
                for r, c in where
            )
            if drawn:
                parts.append(element("path", class_=f"{kind} level-{depth}", d=drawn))
    return parts


def _numbers(shares: np.ndarray, cell: int, margin: float) -> list[Markup]:
    parts = []
    for row, column in np.argwhere(shares >= LEVELS[0]):
        style = "number on-dark" if shares[row, column] >= 0.5 else "number"
        x, y = (column + 0.5) * cell, margin + (row + 0.5) * cell + 3.5
        text = f"{100 * shares[row, column]:.0f}"
        parts.append(element("text", text, class_=style, text_anchor="middle", x=float(x), y=float(y)))
    return parts


def _scales(length: int, ticks: Sequence[float]):
    low, high = ticks[0], ticks[-1]

    def to_x(iteration: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * iteration / max(length, 1)

    def to_y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    return to_x, to_y


def _grid(ticks: Sequence[float], to_y, percent: bool) -> Markup:
    lines, right = [], {"class_": "tick", "x": LEFT - 5, "text_anchor": "end"}
    factor, power = (100, 0) if percent else (1, math.floor(math.log10(max(map(abs, ticks)))))
    if -2 <= power < 4:
        power = 0
    for tick in ticks:
        y, text = to_y(tick), f"{round(factor * tick / 10.0**power, 6):g}"
        lines.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        lines.append(element("text", text, y=y + 3.5, **right))
    if power:
        lines.append(element("text", f"×1e{power}", y=TOP - 9, **right))
    return Markup("").join(lines)


def _bottom(length: int, to_x) -> Markup:
    texts = []
    for tick in (tick for tick in nice_ticks(0, max(length, 1)) if tick <= length):
        x = to_x(tick)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        text = f"{tick:,.0f}" if float(tick).is_integer() else f"{tick:g}"
        texts.append(element("text", text, class_="tick", x=x, y=HEIGHT - 8, text_anchor=anchor))
    return Markup("").join(texts)


def _stage_lines(stages: Sequence[Stage], to_x) -> Markup:
    """Each with its letter; letters of near lines stand in other columns."""
    parts, taken = [], -math.inf
    for stage in stages:
        x = to_x(stage.after)
        title = element("title", f"{stage.mark}: after iteration {stage.after}: {stage.text}")
        parts.append(element("line", title, class_="stage", x1=x, x2=x, y1=TOP - 6, y2=HEIGHT - BOTTOM))
        taken = max(x, taken + 10)
        parts.append(element("text", stage.mark, class_="mark", x=taken, y=TOP - 9, text_anchor="middle"))
    return Markup("").join(parts)


def _curve(curve: Curve, to_x, to_y) -> Markup:
    reach = reach_of(len(curve.x)) if curve.smooth else 0
    style = f"line {curve.colour}{' raw' if reach else ''}"
    parts = [element("path", class_=style, d=_path(curve.x, curve.y, to_x, to_y))]
    if reach:
        mean = smoothed(curve, reach)
        parts.append(element("path", class_=f"line {curve.colour} mean", d=_path(curve.x, mean, to_x, to_y)))
    if len(curve.x) <= 30:
        parts += [
            element("circle", class_=f"dot {curve.colour}", cx=to_x(x), cy=to_y(y), r=2.6)
            for x, y in zip(curve.x, curve.y, strict=True) if y is not None
        ]
    return Markup("").join(parts)


def _path(x: Sequence[int], y: Sequence[float | None], to_x, to_y) -> str:
    """A polyline with gaps where y is None."""
    commands, pen = [], "M"
    for iteration, value in _thinned(x, y):
        if value is None:
            pen = "M"
        else:
            commands.append(f"{pen}{to_x(iteration):.1f} {to_y(value):.1f}")
            pen = "L"
    return "".join(commands)


def _thinned(x: Sequence[int], y: Sequence[float | None]) -> list[tuple[int, float | None]]:
    """All points of a short curve; of a long one the least and the largest of every group of neighbours."""
    points = list(zip(x, y, strict=True))
    if len(points) <= MOST_POINTS:
        return points
    group = math.ceil(2 * len(points) / MOST_POINTS)
    kept = []
    for first in range(0, len(points), group):
        part = [point for point in points[first : first + group] if point[1] is not None]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])} if part else {(x[first], None)}
        kept += sorted(ends, key=lambda p: p[0])
    return kept


def _short(value: object) -> object:
    """Coordinates without digits that nobody sees."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
