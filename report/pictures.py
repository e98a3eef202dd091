"""Pictures of runs and results as SVG: training curves, kept units, quality against cost."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from report.experiment import Column
from wav2vec2.files.errors import single_line
from wav2vec2.files.storage import atomic_path

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D", "v", "P")
# Text and axes: the page replaces it by the colour of its own text.
INK = "#1b1f24"
MOST_POINTS = 400  # of a line; longer logs are averaged

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "grid.color": INK,
    "grid.alpha": 0.12,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "figure.figsize": (4.8, 2.6),
    **{f"figure.subplot.{side}": place for side, place in (("left", 0.14), ("right", 0.97), ("bottom", 0.19))},
    "svg.fonttype": "none",
    "svg.hashsalt": "dphubert",
}


class Panel(NamedTuple):
    """A picture of one quantity of a log: its lines by name, each a column that is multiplied by ``factor``."""

    title: str
    lines: Mapping[str, str]
    factor: float = 1


_TERMS = {"": "", ": L1 distance": "_l1", ": squared error": "_mse", ": −cosine": "_cos", " of the task": "_task"}
PANELS = (
    *(
        Panel(f"loss{title}", {"training": f"train_loss{term}", "held-out speech": f"valid_loss{term}"})
        for title, term in _TERMS.items()
    ),
    Panel("score of the task in validation (%)", {"": "valid_score"}),
    Panel("sparsity (%)", {"expected": "sparsity_expected", "target": "sparsity_target"}, factor=100),
    Panel("multiply-adds gone (%)", {"expected": "macs_expected", "target": "macs_target"}, factor=100),
    Panel("time gone (%)", {"expected": "latency_expected", "target": "latency_target"}, factor=100),
)


class Picture(NamedTuple):
    """A caption in words, and the drawing as an ``<svg>`` element."""

    caption: str
    svg: Markup

    def write(self, path: Path) -> None:
        """Write the drawing as an SVG file of its own."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.svg.replace("currentColor", INK), encoding="utf-8")


@contextmanager
def _drawing(style: dict[Any, Any] | None = None) -> Iterator[tuple[Figure, Axes]]:
    """Open an empty figure, to be drawn and turned into SVG inside the block."""
    with matplotlib.rc_context(_STYLE | (style or {})):
        figure = Figure()
        yield figure, figure.subplots()


def curves(log: Mapping[str, Column]) -> list[Picture]:
    """Draw each of :data:`PANELS` that the log has values for; a loss of weight 0 is left out."""
    pictures = []
    for panel in PANELS:
        lines = {name: log[column] for name, column in panel.lines.items() if any(log.get(column, {}).values())}
        if lines:
            pictures.append(_curve(panel.title, lines, panel.factor))
    return pictures


def _curve(title: str, lines: Mapping[str, Column], factor: float) -> Picture:
    with _drawing() as (figure, axes):
        ends = []
        for colour, (name, column) in zip(COLOURS, lines.items(), strict=False):
            updates, values = _thinned(column)
            marker = "o" if len(updates) <= 20 else None
            axes.plot(updates, factor * values, color=colour, marker=marker, markersize=3.5, label=name)
            ends.append(f"{name} {factor * next(reversed(column.values())):.4g}".strip())
        axes.set(title=title, xlabel="update")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50000 as 50k
        if len(lines) > 1:
            axes.legend()
        return Picture(f"{', '.join(ends)} in the end", _svg(figure))


def _thinned(column: Column) -> tuple[np.ndarray, np.ndarray]:
    """Return updates and values of a column, averaged in groups if there are more than a picture can show."""
    table = np.array(list(column.items()))
    groups = np.array_split(table, min(len(table), MOST_POINTS))
    updates, values = np.stack([group.mean(axis=0) for group in groups]).T
    return updates, values


def kept_units(unit: str, before: Sequence[int], after: Sequence[int], first_layer: int) -> Picture:
    """Draw the units of each layer after pruning, outlined by those before; a cross marks a block that is gone."""
    with _drawing() as (figure, axes):
        layers = np.arange(first_layer, first_layer + len(before))
        axes.bar(layers, before, color="none", edgecolor=INK, linewidth=0.8, alpha=0.6)
        axes.bar(layers, after, color=COLOURS[0])
        gone = layers[np.array(after) == 0]
        axes.plot(gone, np.zeros(len(gone)), "x", color=COLOURS[1], clip_on=False)
        axes.set(title=unit, xlabel="layer")
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        return Picture(f"{sum(after):,} of {sum(before):,} {unit} kept", _svg(figure))


def quality(results: Mapping[str, Any]) -> list[Picture]:
    """Draw quality against parameters and real-time factor, a point for each model of ``evaluate.py``'s results."""
    models = [model for model in results["models"] if model["quality"]]
    costs = {"parameters": [model["cost"]["num_params"] for model in models]}
    if all(model["cost"]["speed"] for model in models):
        costs["real-time factor"] = [model["cost"]["speed"][0]["real_time_factor"] for model in models]
    pictures = []
    for title, values in costs.items() if models else ():
        lines = {}
        for model, value in zip(models, values, strict=True):
            mean, (low, high) = model["quality"]["mean"], model["quality"]["interval"]
            lines[model["name"]] = [Point(value, mean, min(low, mean), max(high, mean))]
        pictures.append(methods(lines, title))
    return pictures


class Point(NamedTuple):
    """The quality at a cost: the mean, and the range of the runs or an interval."""

    cost: float
    mean: float
    lowest: float
    highest: float


def methods(lines: Mapping[str, Sequence[Point]], title: str) -> Picture:
    """Draw quality against a cost: a line for each method or model, a point with its range for each size."""
    with _drawing({"figure.figsize": (7.2, 4.8), "figure.subplot.right": 0.75}) as (figure, axes):
        # Colours come again with other markers.
        for (marker, colour), (name, points) in zip(product(MARKERS, COLOURS), lines.items(), strict=False):
            # One line, and neither a formula of matplotlib's nor a label that its legend leaves out.
            label = re.sub("^_", " _", single_line(name, 60)).replace("$", r"\$")
            costs, means, lowest, highest = zip(*sorted(points), strict=True)
            spread = [np.subtract(means, lowest), np.subtract(highest, means)]
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "capsize": 2, "lw": 1}
            axes.errorbar(costs, means, spread, label=label, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(title="quality (log-mel 0, teacher 100)", xlabel=title)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
        return Picture(f"quality against {title}", _svg(figure))


def _svg(figure: Figure) -> Markup:
    """Return the figure as an ``<svg>`` element without a background, its text in the page's colour."""
    out = StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="\w+">', "<g>", svg)  # every figure has the same names; only those of shapes are referred to
    return Markup(svg.replace(INK, "currentColor"))
