"""The dashboard's panels as a page of SVG, with its titles, grid, units and legends.

No Grafana draws here: how Grafana looks is its own affair.
"""

import time
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

from console_screenshots.dashboard import STEP_SECONDS, Panel, Points
from console_screenshots.scales import in_words, ticks

WIDTH, UNIT, GAP = 1200, 27, 6  # pixels: of the page, of one row of the grid, between panels
COLOURS = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#9d7660")
NAMED = {"green": "#37872d", "orange": "#c4621a", "red": "#c4162a", "blue": "#1f60c4"}
LEFT, TOP, BELOW = 58, 30, 54  # pixels around a plot: the axis, the title, times and legend


def page(panels: Sequence[Panel]) -> str:
    """Return the page of *panels*, the uppermost at its top."""
    first = min(panel.place["y"] for panel in panels)
    height = UNIT * (max(panel.place["y"] + panel.place["h"] for panel in panels) - first) + GAP
    drawn = "".join(_placed(panel, first) for panel in panels)
    style = "body{margin:0;background:#111217} text{font:12px sans-serif;fill:#ccccdc} .dim{fill:#8e8e99}"
    return f"<style>{style}</style><svg width='{WIDTH}' height='{height}' id='dashboard'>{drawn}</svg>"


def _placed(panel: Panel, first: int) -> str:
    column = (WIDTH - GAP) / 24
    x, y = GAP + panel.place["x"] * column, GAP + (panel.place["y"] - first) * UNIT
    width, height = panel.place["w"] * column - GAP, panel.place["h"] * UNIT - GAP
    draw = {"row": _row, "stat": _stat, "timeseries": _lines, "heatmap": _heatmap}[panel.kind]
    return f"<g transform='translate({x:.1f},{y:.1f})'>{''.join(draw(panel, width, height))}</g>"


def _text(x: float, y: float, words: str, *, anchor: str = "start", more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {more}>{escape(words)}</text>"


def _frame(panel: Panel, width: float, height: float) -> str:
    box = f"<rect width='{width:.1f}' height='{height:.1f}' rx='2' fill='#181b1f' stroke='#2c3036'/>"
    return box + _text(10, 20, panel.title, more="font-weight='bold'")


def _row(panel: Panel, _width: float, height: float) -> Iterator[str]:
    yield _text(4, height - 4, panel.title, more="style='font-size:14px'")


def _stat(panel: Panel, width: float, height: float) -> Iterator[str]:
    value = panel.lines[0][1][-1][1] if panel.lines and panel.lines[0][1] else float("nan")
    steps = panel.field["thresholds"]["steps"]
    colour = [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]
    words = in_words(value, panel.unit, panel.field.get("decimals"))
    for mapping in panel.field["mappings"]:
        found = mapping["options"].get(f"{value:g}", {"text": words, "color": colour})
        words, colour = found["text"], found["color"]
    yield f"<rect width='{width:.1f}' height='{height:.1f}' rx='2' fill='{NAMED[colour]}'/>"
    yield _text(10, 20, panel.title, more="font-weight='bold' style='fill:#fff'")
    yield _text(width / 2, height / 2 + 22, words, anchor="middle", more="style='font-size:30px;fill:#fff'")


def _lines(panel: Panel, width: float, height: float) -> Iterator[str]:
    yield _frame(panel, width, height)
    if not any(points for _, points in panel.lines):
        yield _text(width / 2, height / 2, "No data", anchor="middle", more="class='dim'")
        return
    custom = panel.field["custom"]
    stacked = custom["stacking"]["mode"] == "normal"
    shown = _stacked([points for _, points in panel.lines]) if stacked else [points for _, points in panel.lines]
    highest = max(value for points in shown for _, value in points)
    marks = ticks(max(highest, panel.field.get("max", 0)), panel.unit)
    start, end = _span(panel)
    across, down = width - LEFT - 10, height - TOP - BELOW

    def at(when: float, value: float) -> str:
        return f"{LEFT + (when - start) / (end - start) * across:.1f},{TOP + down * (1 - value / marks[-1]):.1f}"

    yield from _axes(panel, marks, across, down)
    opacity = custom["fillOpacity"] / 100
    for number, points in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        floor = dict(shown[number - 1]) if stacked and number else {}
        for part in _unbroken(points):
            path = _steps(part) if custom.get("lineInterpolation") == "stepAfter" else part
            line = " ".join(at(*point) for point in path)
            back = " ".join(at(when, floor.get(when, 0.0)) for when, _ in reversed(path))
            yield f"<polygon points='{line} {back}' fill='{colour}' fill-opacity='{opacity}'/>"
            # A line that lies on the one below it would paint it over.
            if not stacked or any(value > floor.get(when, 0.0) for when, value in part):
                yield f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='1.2'/>"
    yield from _legend([name for name, _ in panel.lines], width, height)


def _axes(panel: Panel, marks: Sequence[float], across: float, down: float) -> Iterator[str]:
    for mark in marks:
        y = TOP + down * (1 - mark / marks[-1])
        yield f"<path d='M{LEFT} {y:.1f}h{across:.1f}' stroke='#2c3036'/>"
        yield _text(LEFT - 6, y + 4, in_words(mark, panel.unit), anchor="end", more="class='dim'")
    start, end = _span(panel)
    first = start + -start % 30
    while first < end:
        x = LEFT + (first - start) / (end - start) * across
        words = time.strftime("%H:%M:%S", time.gmtime(first))
        yield _text(x, TOP + down + 15, words, anchor="middle", more="class='dim' style='font-size:11px'")
        first += 30


def _legend(names: Sequence[str], width: float, height: float) -> Iterator[str]:
    """Name the lines, on two rows at most."""
    x, y = 12.0, height - 22
    for number, name in enumerate(names):
        if x + 6.6 * len(name) + 90 > width and y < height - 10:
            x, y = 12.0, height - 8
        if x + 6.6 * len(name) + 90 > width:
            yield _text(x, y, f"and {len(names) - number} more", more="class='dim' style='font-size:11px'")
            return
        yield f"<path d='M{x:.1f} {y - 4:.1f}h12' stroke='{COLOURS[number % len(COLOURS)]}' stroke-width='3'/>"
        yield _text(x + 17, y, name, more="style='font-size:11px'")
        x += 6.6 * len(name) + 32


def _heatmap(panel: Panel, width: float, height: float) -> Iterator[str]:
    yield _frame(panel, width, height)
    rows = sorted(panel.lines, key=lambda line: float(line[0]))
    # The buckets are cumulative: a cell holds what its own adds to the one below.
    below: dict[float, float] = {}
    cells: list[tuple[int, float, float]] = []
    for number, (_, points) in enumerate(rows):
        cells += [(number, when, value - below.get(when, 0.0)) for when, value in points]
        below = dict(points)
    filled = [cell for cell in cells if cell[2] > 1e-9]
    if not filled:
        yield _text(width / 2, height / 2, "No data", anchor="middle", more="class='dim'")
        return
    low, high = min(cell[0] for cell in filled), max(cell[0] for cell in filled)
    start, end = _span(panel)
    across, down = width - LEFT - 10, height - TOP - 26
    row, most = down / (high - low + 1), max(cell[2] for cell in filled)
    for number, when, value in filled:
        x, y = LEFT + (when - start) / (end - start) * across, TOP + down - (number - low + 1) * row
        wide = across * STEP_SECONDS / (end - start)
        shade = 0.15 + 0.85 * (value / most) ** 0.5
        place = f"x='{x:.1f}' y='{y:.1f}' width='{wide:.1f}' height='{row - 1:.1f}'"
        yield f"<rect {place} fill='#5794f2' opacity='{shade:.2f}'/>"
    for number in range(low, high + 1, max(1, (high - low) // 5)):
        words = "more" if rows[number][0] == "+Inf" else in_words(float(rows[number][0]), panel.unit)
        yield _text(LEFT - 6, TOP + down - (number - low) * row - 2, words, anchor="end", more="class='dim'")


def _span(panel: Panel) -> tuple[float, float]:
    times = [when for _, points in panel.lines for when, _ in points]
    return min(times), max(*times, min(times) + STEP_SECONDS)


def _stacked(lines: Sequence[Points]) -> list[Points]:
    total: dict[float, float] = {}
    found: list[Points] = []
    for points in lines:
        for when, value in points:
            total[when] = total.get(when, 0.0) + value
        found.append([(when, total[when]) for when, _ in points])
    return found


def _unbroken(points: Points) -> Iterator[Points]:
    """Yield the parts of a line between its gaps."""
    part: list[tuple[float, float]] = []
    for point in points:
        if part and point[0] - part[-1][0] > 1.5 * STEP_SECONDS:
            yield part
            part = []
        part.append(point)
    if part:
        yield part


def _steps(points: Points) -> list[tuple[float, float]]:
    found = [points[0]]
    for (_, before), (when, value) in pairwise(points):
        found += [(when, before), (when, value)]
    return found
