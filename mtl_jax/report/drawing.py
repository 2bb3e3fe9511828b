"""What the figures of an ablation share: a mark for every arm, one quiet layout, and texts that cannot become markup."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mtl_jax.report.rows import Comparison
from mtl_jax.report.statistics import Difference, Summary

INK, FAINT, GRID = "#222222", "#6B6B6B", "#E6E6E6"
# Of Okabe and Ito, without their yellow, which vanishes on white. The baseline is drawn in ink.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "pentagon")
GAP = 64  # pixels between two panels, where the title of the lower one stands


class Mark(NamedTuple):
    """How an arm looks in every figure; colour alone tells six arms apart, dash and symbol tell 72."""

    colour: str
    dash: str
    symbol: str


def marks(comparisons: Iterable[Comparison]) -> dict[str, Mark]:
    """Arm -> :class:`Mark`, the same for all data sets and figures of a report, in the order in which arms appear."""
    comparisons = tuple(comparisons)
    baselines = {comparison.baseline for comparison in comparisons}
    arms = dict.fromkeys(row.arm for comparison in comparisons for row in comparison.rows)
    others = [arm for arm in arms if arm not in baselines]
    found = {arm: Mark(INK, "solid", "star") for arm in arms if arm in baselines}
    for index, arm in enumerate(others):
        turn, colour = divmod(index, len(COLOURS))
        found[arm] = Mark(COLOURS[colour], DASHES[turn % len(DASHES)], SYMBOLS[turn % len(SYMBOLS)])
    return found


def label(text: str) -> str:
    """Text for plotly, which reads HTML tags, ``%{...}`` and ``$...$`` in all its texts; here they stay what they are."""
    escaped = html.escape(" ".join(str(text).split()))
    return escaped.replace("%", "&#37;").replace("{", "&#123;").replace("$", "&#36;")


def name_rows(figure: go.Figure, arms: Sequence[str], marks: Mapping[str, Mark], *, place: int = 1) -> None:
    """Gives panel ``place`` a y axis with one arm below the other, named above its line and not beside the panel.

    Long names then leave the width to what is drawn, which a phone needs. Plotly's own labels inside an axis would hide
    the numbers of the other axis.
    """
    number = "" if place == 1 else str(place)
    figure.update_layout(
        {
            f"yaxis{number}": {
                "type": "category",
                "categoryorder": "array",
                "categoryarray": arms[::-1],
                "tickvals": arms,
                "range": [-0.5, len(arms) - 0.2],
                "showticklabels": False,
                "ticks": "",
            }
        }
    )
    for index, arm in enumerate(reversed(arms)):
        figure.add_annotation(
            x=0,
            y=index,
            xref=f"x{number} domain",
            yref=f"y{number}",
            xanchor="left",
            yanchor="bottom",
            yshift=2,
            showarrow=False,
            text=f'<span style="color:{marks[arm].colour}">■</span> {label(arm)}',
        )
    figure.update_layout(margin_l=12)


def mean_text(summary: Summary | Difference | None, *, sign: str = "") -> str:
    """``mean ± half width of the interval``, both with two digits of the half width; empty without a value."""
    if summary is None or summary.mean is None:
        return ""
    if summary.interval is None:
        return f"{summary.mean:{sign}.4f}"
    half = half_width(summary.interval)
    digits = min(max(1 - math.floor(math.log10(half)), 0), 6) if half > 0 else 4
    return f"{summary.mean:{sign}.{digits}f} ± {half:.{digits}f}"


def padded(low: float, high: float) -> list[float]:
    """Range of an axis from ``low`` to ``high`` and a little more on either side."""
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return [low - margin, high + margin]


def half_width(interval: Sequence[float] | None) -> float:
    """Half the width of a symmetric interval; NaN, which plotly leaves out, where there is none."""
    return math.nan if interval is None else (interval[1] - interval[0]) / 2


def panels(titles: Sequence[str], heights: Sequence[int], *, legend: Iterable[str] = (), **options) -> go.Figure:
    """Panels below each other, which a phone can show too.

    Args:
      titles: One a panel, escaped.
      heights: Pixels of each panel.
      legend: Names that the legend will hold; room is made for them above the panels.
      options: Of ``plotly.subplots.make_subplots``.
    """
    inner = sum(heights) + GAP * (len(heights) - 1)
    figure = make_subplots(
        rows=len(titles),
        cols=1,
        subplot_titles=titles,
        row_heights=list(heights),
        vertical_spacing=GAP / inner,
        **options,
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    return styled(figure, inner, legend=legend)


def styled(figure: go.Figure, inner: int, *, legend: Iterable[str] = (), menu: bool = False) -> go.Figure:
    """``figure`` in the look of the report: dark on white, legend above, ``inner`` pixels for what is drawn."""
    entries = list(legend)
    columns = max(1, 800 // (60 + 7 * max(map(len, entries), default=1)))
    lines = math.ceil(len(entries) / columns)
    top = 36 + 20 * lines + 44 * menu
    figure.update_layout(
        template="none",
        height=inner + top + 56,
        margin={"l": 64, "r": 40, "t": top, "b": 56},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        hovermode="closest",
        hoverlabel={"bgcolor": "white", "font": {"color": INK}, "align": "left"},
        # Upright at the right, where it covers neither the legend nor a menu.
        modebar={"orientation": "v", "bgcolor": "white"},
        showlegend=bool(entries),
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1 + (32 + 32 * menu) / inner,
            "xanchor": "left",
            "yanchor": "bottom",
            "maxheight": 1,
        },
    )
    axes = {"gridcolor": GRID, "zeroline": False, "linecolor": "#999999", "ticks": "outside", "automargin": True}
    figure.update_xaxes(title_font_size=13, **axes)
    figure.update_yaxes(title_font_size=13, **axes)
    return figure


def menu(figure: go.Figure, choices: Mapping[str, Sequence[int]], changes: Mapping[str, dict] | None = None) -> None:
    """Adds a menu that shows some traces at a time, the first choice at first.

    Args:
      figure: Gets the menu above its upper left corner, and the visibility of its traces.
      choices: Escaped text -> indices of the traces that it shows.
      changes: Text -> changes of the layout that go with it.
    """
    first = next(iter(choices))
    for index, trace in enumerate(figure.data):
        trace.visible = index in choices[first]
    if changes:
        figure.update_layout(changes[first])
    if len(choices) == 1:
        return
    buttons = [
        {
            "label": text,
            "method": "update",
            "args": [{"visible": [index in shown for index in range(len(figure.data))]}, (changes or {}).get(text, {})],
        }
        for text, shown in choices.items()
    ]
    place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 8}}
    figure.update_layout(updatemenus=[{"buttons": buttons, "bgcolor": "white", "bordercolor": "#999999", **place}])
