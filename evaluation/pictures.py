"""Draws experiments: kept units, training, fidelity, probes.

Each function returns figures of one width, with the colours of a model the same in all of them. Drawing has no
global state: figures are made without pyplot, and settings of the user's matplotlib are left out and left alone.
"""

import itertools
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from evaluation.architecture import conv_channels, ffn_size, num_heads
from evaluation.experiment import Column, Stage, as_number
from wav2vec2.errors import single_line
from wav2vec2.files import atomic_path

# Okabe and Ito's colours, which colour-blind people can tell apart; black and yellow are left out for the sake of dark
# pages, and the teacher, targets and text have the ink's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
# A grey-black that nothing else has: pages replace it by the colour of their text.
INK = "#1b1f24"
FAINT = 0.1  # opacity of what stands behind
WIDTH = 4.8  # inches: a phone shows it with 10 pt text as it is
DPI = 180
MOST_POINTS = 400  # of a line; longer logs are averaged
_MOST_TICKS = 12
_LEGEND_CHARACTERS = 52  # in a row
_LEGEND_LINE = 0.19  # inches
_LONGEST_NAME = 34

_STYLE = {
    "font.size": 10,
    "font.family": ["DejaVu Sans"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": FAINT,
    "text.parse_math": False,  # a dollar in a model's name is a dollar
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "svg.fonttype": "none",
    "svg.hashsalt": "dphubert",
}


class Picture(NamedTuple):
    """A figure.

    Attributes:
        name: of its file, without ending.
        caption: one line that says what one sees.
        figure: the drawing.
    """

    name: str
    caption: str
    figure: Figure


class Style(NamedTuple):
    """How a model looks in all pictures."""

    colour: str
    marker: str
    line: str


def styles(names: Sequence[str], teachers: Sequence[str] = ()) -> dict[str, Style]:
    """A look for each model; teachers have the colour of the text."""
    students = [name for name in names if name not in teachers]
    looks = {
        name: Style(
            COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], LINES[place // len(COLOURS) % len(LINES)]
        )
        for place, name in enumerate(students)
    }
    return looks | {name: Style(INK, MARKERS[-1 - place % len(MARKERS)], "--") for place, name in enumerate(teachers)}


# ---------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------


@contextmanager
def _own_style() -> Iterator[None]:
    # Names may have characters that the font has not.
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _in_own_style(draw: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(draw)
    def styled(*args: Any, **options: Any) -> Any:
        with _own_style():
            return draw(*args, **options)

    return styled


@_in_own_style
def settle(figure: Figure) -> None:
    """Lay a figure out once, not for every file that is made of it."""
    if not isinstance(figure.get_layout_engine(), PlaceHolderLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


@_in_own_style
def save_png(picture: Picture, folder: Path) -> Path:
    """Write ``FOLDER/NAME.png``, on white; the same figure makes the same bytes."""
    path = folder / f"{picture.name}.png"
    settle(picture.figure)
    with atomic_path(path) as temporary:
        picture.figure.savefig(temporary, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return path


@_in_own_style
def as_svg(picture: Picture) -> str:
    """The figure as an ``<svg>`` element for a page: no background, text in the page's colour, names of its own.

    Stands by itself: no references to anything outside it, and the same figure makes the same text.
    """
    out = StringIO()
    settle(picture.figure)
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    picture.figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # A page knows what SVG is, and its style sheet decides on the size.
    start, _, rest = svg.partition(">")
    start = re.sub(r' (?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", start)
    svg = f"{start}>{rest}"
    # Several figures on one page must not share names.
    svg = re.sub(r' id="([^"]*)"', rf' id="{picture.name}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{picture.name}-", svg)
    return svg.replace("xlink:href", "href").replace(INK, "currentColor").strip()


def _rows(num_rows: int, inches: float, share_x: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of panels above each other, ``inches`` each."""
    figure = Figure(figsize=(WIDTH, num_rows * inches + 0.9))
    panels = figure.subplots(num_rows, 1, sharex=share_x, squeeze=False)[:, 0]
    for axes in panels:
        axes.grid(axis="y")
    return figure, list(panels)


def short_name(name: str) -> str:
    """A name of a length that fits a legend; the end, which usually tells names apart, stays."""
    name = single_line(name, 200)
    half = _LONGEST_NAME // 2
    name = name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"
    return f"\u200b{name}" if name.startswith("_") else name  # matplotlib leaves out labels with an underscore


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend above the panels, where no data is; none if there is nothing to explain."""
    if not labels:
        return
    shown = [short_name(label) for label in labels]
    num_columns = next(n for n in range(len(shown), 0, -1) if n == 1 or _legend_width(shown, n) <= _LEGEND_CHARACTERS)
    figure.legend(handles, shown, loc="upper left", ncols=num_columns)
    inches = math.ceil(len(shown) / num_columns) * _LEGEND_LINE + 0.14
    figure.set_figheight(figure.get_figheight() + inches)
    # The layout engine's own room for legends is not always enough.
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - inches / figure.get_figheight()))


def _legend_width(labels: Sequence[str], num_columns: int) -> int:
    """Characters that a row of a legend takes, its symbols included; columns are filled one after the other."""
    num_lines = math.ceil(len(labels) / num_columns)
    columns = (labels[start : start + num_lines] for start in range(0, len(labels), num_lines))
    return sum(max(map(len, column)) + 5 for column in columns)


def _limit_ticks(axes: Axes, places: Sequence[int]) -> None:
    """Ticks at whole places only, at most :data:`_MOST_TICKS` of them."""
    step = math.ceil(len(places) / _MOST_TICKS)
    chosen = places if step == 1 else [place for place in places if place % step == 0]
    axes.xaxis.set_major_locator(FixedLocator(list(chosen)))


def _count(value: float, _: Any = None) -> str:
    """50000 as 50k: short enough for a tick."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _percent_axis(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))


# ---------------------------------------------------------------------------------------------------
# Architecture
# ---------------------------------------------------------------------------------------------------


def _units(config: Mapping[str, Any], kind: str) -> list[int]:
    if kind == "conv":
        return conv_channels(dict(config))
    count = {"heads": num_heads, "ffn": ffn_size}[kind]
    return [count(dict(config), layer) for layer in range(config["encoder_num_layers"])]


# kind: (axis, what is kept, number of the first layer)
_KINDS = {
    "conv": ("channels", "Channels of each layer of the convolutional extractor", "conv layer", 0),
    "heads": ("heads", "Attention heads of each layer", "layer", 1),
    "ffn": ("dimensions", "Feed-forward dimensions of each layer", "layer", 1),
}


@_in_own_style
def architecture(
    configs: Mapping[str, dict[str, Any]], original: dict[str, Any] | None, looks: Mapping[str, Style]
) -> list[Picture]:
    """Units that each layer keeps, one picture per kind of unit, one row per model.

    Args:
        configs: of the models by name.
        original: the config before pruning, drawn as an outline; None if it is not known.
        looks: from :func:`styles`.
    """
    return [_kept_units(kind, configs, original, looks) for kind in _KINDS]


def _kept_units(
    kind: str, configs: Mapping[str, dict[str, Any]], original: dict[str, Any] | None, looks: Mapping[str, Style]
) -> Picture:
    unit, what, where, first = _KINDS[kind]
    before = _units(original, kind) if original is not None else []
    kept = {name: _units(config, kind) for name, config in configs.items()}
    num_layers = max(map(len, [before, *kept.values()]))
    figure, panels = _rows(len(kept), 1.6 if len(kept) == 1 else 1.3)
    edge = min(0.8, 40 / num_layers)
    has_gone = False
    for axes, (name, counts) in zip(panels, kept.items(), strict=True):
        places = np.arange(first, first + len(before))
        axes.bar(places, before, width=0.8, color="none", edgecolor=INK, linewidth=edge, alpha=0.6)
        axes.bar(range(first, first + len(counts)), counts, width=0.8, color=looks[name].colour)
        gone = [first + layer for layer, count in enumerate(counts) if count == 0]
        if gone:
            axes.plot(gone, [0] * len(gone), "x", color=looks[name].colour, markersize=5, clip_on=False, zorder=5)
            has_gone = True
        if len(kept) > 1:
            axes.set_title(short_name(name), pad=3)
        axes.set_ylabel(unit)
        axes.set_ylim(0, 1.05 * max(1, *before, *counts))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    panels[-1].set_xlabel(where)
    panels[-1].set_xlim(first - 0.7, first + num_layers - 0.3)
    _limit_ticks(panels[-1], range(first, first + num_layers))
    handles: list[Any] = []
    labels: list[str] = []
    if len(kept) == 1:  # titles name them otherwise
        labels, handles = list(kept), [Patch(color=looks[name].colour) for name in kept]
    if before:
        handles.append(Patch(facecolor="none", edgecolor=INK, alpha=0.6))
        labels.append("original")
    if has_gone:
        handles.append(Line2D([], [], marker="x", linestyle="none", color=INK))
        labels.append("none left")
    _legend(figure, handles, labels)
    totals = ", ".join(
        (f"{name}: " if len(kept) > 1 else "")
        + (f"{sum(counts):,} of {sum(before):,} kept" if before else f"{sum(counts):,}")
        for name, counts in kept.items()
    )
    return Picture(f"architecture_{kind}", f"{what}: {totals}.", figure)


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------


def _thinned(column: Column) -> tuple[list[float], list[float]]:
    """Updates and values of a column, averaged in groups where there are more than a picture can show."""
    updates, values = np.array(list(column)), np.array(list(column.values()))
    if len(updates) <= MOST_POINTS:
        return updates.tolist(), values.tolist()
    groups = [np.array_split(x, MOST_POINTS) for x in (updates, values)]
    return tuple([float(part.mean()) for part in group] for group in groups)


def _line(axes: Axes, column: Column, **look: Any) -> Line2D:
    updates, values = _thinned(column)
    if len(updates) == 1:
        look["marker"] = "o"
    return axes.plot(updates, values, **look)[0]


def _few_ticks(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def _last(column: Column) -> float:
    return next(reversed(column.values()))


def _finish_updates(panels: Sequence[Axes]) -> None:
    panels[-1].set_xlabel("update")
    panels[-1].set_xlim(left=0)
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(_count))


@_in_own_style
def training(stage: Stage, sparsity_reached: float | None = None) -> list[Picture]:
    """What a log tells of a training, as far as it has the columns.

    Args:
        stage: with the log.
        sparsity_reached: by pruning after it, if that is done.
    """
    drawn = (
        _sparsity(stage, sparsity_reached),
        _multipliers(stage),
        _loss(stage),
        _loss_terms(stage),
        _learning_rates(stage),
        _gradient_norm(stage),
        _speed(stage),
    )
    return [picture for picture in drawn if picture is not None]


def _sparsity(stage: Stage, reached: float | None) -> Picture | None:
    expected, target = stage.log.get("sparsity_expected"), stage.log.get("sparsity_target")
    if not expected or not target:
        return None
    figure, (axes,) = _rows(1, 2.3)
    handles = [
        _line(axes, expected, color=COLOURS[0]),
        _line(axes, target, color=INK, linestyle="--", linewidth=1.2),
    ]
    labels = ["expected", "target"]
    caption = f"Expected sparsity against its target: {_last(expected):.1%} and {_last(target):.1%} in the end"
    if reached is not None:
        handles += axes.plot([max(expected)], [reached], "*", color=COLOURS[1], markersize=11, linestyle="none")
        labels.append("after pruning")
        caption += f", {reached:.1%} after pruning"
    _percent_axis(axes, "sparsity (%)")
    _finish_updates([axes])
    _legend(figure, handles, labels)
    return Picture(f"{stage.key}_sparsity", f"{caption}.", figure)


def _multipliers(stage: Stage) -> Picture | None:
    columns = {f"λ{digit}": stage.log.get(f"lambda{n}") for n, digit in ((1, "₁"), (2, "₂"))}
    columns = {name: column for name, column in columns.items() if column}
    if not columns:
        return None
    figure, panels = _rows(len(columns), 1.3)
    for axes, (name, column), colour in zip(panels, columns.items(), COLOURS, strict=False):
        axes.axhline(0, color=INK, linewidth=0.8)
        _line(axes, column, color=colour)
        axes.set_ylabel(name)
        _few_ticks(axes)
    _finish_updates(panels)
    ends = ", ".join(f"{name} {_last(column):.3g}" for name, column in columns.items())
    return Picture(
        f"{stage.key}_multipliers", f"Multipliers of the Lagrangian, the price of missing the target: {ends}.", figure
    )


_MODES = (("train", "training", COLOURS[0]), ("valid", "held-out speech", COLOURS[1]))


def _loss_panel(axes: Axes, log: Mapping[str, Column], term: str) -> dict[str, Line2D]:
    handles = {}
    for mode, title, colour in _MODES:
        if column := log.get(f"{mode}_{term}"):
            marker = MARKERS[0] if mode == "valid" and len(column) <= 40 else None
            handles[title] = _line(axes, column, color=colour, marker=marker, markersize=3.5)
    return handles


def _loss(stage: Stage) -> Picture | None:
    figure, (axes,) = _rows(1, 2.3)
    handles = _loss_panel(axes, stage.log, "loss")
    if not handles:
        return None
    axes.set_ylabel("loss")
    _finish_updates([axes])
    _legend(figure, list(handles.values()), list(handles))
    ends = ", ".join(
        f"{_last(column):.4f} on {title}" for mode, title, _ in _MODES if (column := stage.log.get(f"{mode}_loss"))
    )
    return Picture(f"{stage.key}_loss", f"Loss, lower is better: {ends} in the end.", figure)


_TERMS = {
    "loss_distill": "distillation",
    "loss_mse": "squared error",
    "loss_l1": "L1 distance",
    "loss_cos": "−cosine",
    "loss_reg": "size penalty",
}


def _loss_terms(stage: Stage) -> Picture | None:
    def is_used(term: str) -> bool:  # a term of weight 0 is logged as 0
        return any(any(stage.log.get(f"{mode}_{term}", {}).values()) for mode, *_ in _MODES)

    terms = {term: title for term, title in _TERMS.items() if is_used(term)}
    if "loss_reg" not in terms:  # then it is the whole loss
        terms.pop("loss_distill", None)
    if not terms:
        return None
    figure, panels = _rows(len(terms), 1.15)
    handles: dict[str, Line2D] = {}
    for axes, (term, title) in zip(panels, terms.items(), strict=True):
        handles |= _loss_panel(axes, stage.log, term)
        axes.set_title(title, pad=3)
        _few_ticks(axes)
    _finish_updates(panels)
    _legend(figure, list(handles.values()), list(handles))
    return Picture(f"{stage.key}_loss_terms", f"The terms of the loss: {', '.join(terms.values())}.", figure)


_RATES = {"main": "weights", "log_alpha": "masks", "lambda": "multipliers"}


def _learning_rates(stage: Stage) -> Picture | None:
    schedules: dict[str, Column] = {}
    groups = {name.rpartition("/")[2]: column for name, column in stage.log.items() if name.startswith("lr-")}
    for group in sorted(groups, key=lambda group: list(_RATES).index(group) if group in _RATES else len(_RATES)):
        title, column = _RATES.get(group, single_line(group, 20)), groups[group]
        same = next((known for known, other in schedules.items() if other == column), None)
        if same is None:
            schedules[title] = column
        else:
            schedules = {f"{t}, {title}" if t == same else t: column for t, column in schedules.items()}
    if not schedules:
        return None
    figure, panels = _rows(len(schedules), 1.3)
    for axes, (title, column), colour in zip(panels, schedules.items(), itertools.cycle(COLOURS), strict=False):
        _line(axes, column, color=colour)
        axes.set_title(title, pad=3)
        axes.set_ylim(bottom=0)
        _few_ticks(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    _finish_updates(panels)
    figure.supylabel("learning rate", fontsize=10)
    highest = ", ".join(f"{max(column.values()):.3g} for {title}" for title, column in schedules.items())
    return Picture(f"{stage.key}_learning_rates", f"Learning rates, at most {highest}.", figure)


def _gradient_norm(stage: Stage) -> Picture | None:
    column = stage.log.get("grad_norm")
    if not column:
        return None
    figure, (axes,) = _rows(1, 1.9)
    _line(axes, column, color=COLOURS[0])
    values = list(column.values())
    if min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    clip = as_number(stage.settings.get("clip_norm"))
    caption = f"Norm of the gradient before clipping: median {np.median(values):.3g}, at most {max(values):.3g}"
    if clip and max(values) > clip / 2:  # 0 switches clipping off
        handle = axes.axhline(clip, color=INK, linestyle="--", linewidth=1.2)
        _legend(figure, [handle], [f"clipped to {clip:g}"])
    axes.set_ylabel("gradient norm")
    _finish_updates([axes])
    return Picture(f"{stage.key}_gradient_norm", f"{caption}.", figure)


_SPEED = {"audio_seconds_per_second": "audio (s per s)", "data_wait": "wait for data (%)"}


def _speed(stage: Stage) -> Picture | None:
    columns = {title: column for name, title in _SPEED.items() if (column := stage.log.get(name))}
    if not columns:
        return None
    figure, panels = _rows(len(columns), 1.3)
    for axes, (title, column) in zip(panels, columns.items(), strict=True):
        _line(axes, column, color=COLOURS[0])
        axes.set_ylim(bottom=0)
        _few_ticks(axes)
        axes.set_title(title, pad=3)
        if "%" in title:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}"))
    _finish_updates(panels)
    medians = {title: float(np.median(list(column.values()))) for title, column in columns.items()}
    said = [
        f"{median:.1%} of the time waiting for data" if "%" in title else f"{median:,.1f} s of audio a second"
        for title, median in medians.items()
    ]
    return Picture(f"{stage.key}_speed", f"Speed of each process, medians: {', '.join(said)}.", figure)


# ---------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """Accuracy of a probe in per cent; ``std`` over repetitions, 0 where there is one."""

    mean: float
    std: float


_MEASURES = {"l1": "L1 distance", "cosine": "cosine", "cka": "CKA"}


@_in_own_style
def fidelity(layers: Mapping[str, Sequence[Mapping[str, float]]], looks: Mapping[str, Style]) -> list[Picture]:
    """Likeness of each distilled layer to the teacher's.

    Args:
        layers: by model; each with "layer" and as many of "l1", "cosine" and "cka" as were measured.
        looks: from :func:`styles`.
    """
    measures = {
        key: title
        for key, title in _MEASURES.items()
        if any(key in layer for entries in layers.values() for layer in entries)
    }
    if not measures:
        return []
    figure, panels = _rows(len(measures), 1.35)
    for axes, (key, title) in zip(panels, measures.items(), strict=True):
        for name, entries in layers.items():
            points = sorted((layer["layer"], layer[key]) for layer in entries if key in layer)
            if points:
                look = looks[name]
                axes.plot(*zip(*points, strict=True), color=look.colour, marker=look.marker, linestyle=look.line)
        axes.set_title(title, pad=3)
        _few_ticks(axes)
    numbers = sorted({int(layer["layer"]) for entries in layers.values() for layer in entries})
    panels[-1].set_xlabel("layer (0: projected extractor output)")
    panels[-1].xaxis.set_major_locator(
        FixedLocator(numbers) if len(numbers) <= _MOST_TICKS else MaxNLocator(_MOST_TICKS, integer=True)
    )
    _legend(figure, [_symbol(looks[name]) for name in layers], list(layers))
    better = {"l1": "L1 distance (lower is closer)", "cosine": "cosine", "cka": "CKA (both: higher is closer)"}
    if set(measures) != set(_MEASURES):
        better = dict(measures)
    said = ", ".join(better[key] for key in measures)
    return [Picture("fidelity", f"Each distilled layer beside the teacher's, on held-out speech: {said}.", figure)]


def _symbol(look: Style) -> Line2D:
    return Line2D([], [], color=look.colour, marker=look.marker, linestyle=look.line)


@_in_own_style
def probe_accuracies(
    scores: Mapping[str, Mapping[str, Score]], chances: Mapping[str, float], looks: Mapping[str, Style]
) -> list[Picture]:
    """Accuracy of each model and control in each task, with standard deviations.

    Args:
        scores: by task, then by model or control.
        chances: accuracy of guessing in per cent, by task.
        looks: from :func:`styles`; controls have none.
    """
    scores = {task: entries for task, entries in scores.items() if entries}
    if not scores:
        return []
    heights = [0.27 * len(entries) + 0.35 for entries in scores.values()]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.8))
    panels = figure.subplots(len(scores), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (task, entries) in zip(panels, scores.items(), strict=True):
        for place, (name, score) in enumerate(entries.items()):
            colour = looks[name].colour if name in looks else INK
            axes.barh(
                place,
                score.mean,
                height=0.72,
                color=(colour, 0.55 if colour == INK else 1.0) if name in looks else "none",
                edgecolor=colour,
                linewidth=1,
                xerr=score.std or None,
                error_kw={"ecolor": INK, "elinewidth": 1.4, "capsize": 3},
            )
        axes.set_yticks(range(len(entries)), [short_name(name) for name in entries])
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_title(short_name(task), pad=3)
        if task in chances:
            axes.axvline(chances[task], color=INK, linestyle=":", linewidth=1.4)
    panels[-1].set_xlim(0, 100)
    panels[-1].set_xlabel("accuracy (%)")
    details = [
        text
        for text, is_there in (
            ("whiskers: standard deviation", any(s.std for entries in scores.values() for s in entries.values())),
            ("hollow: controls", any(name not in looks for entries in scores.values() for name in entries)),
            ("dotted: guessing", any(task in chances for task in scores)),
        )
        if is_there
    ]
    extra = f" ({'; '.join(details)})" if details else ""
    return [Picture("probe_accuracy", f"Accuracy of linear probes on frozen features{extra}.", figure)]


@_in_own_style
def layer_weights(weights: Mapping[str, Mapping[str, Sequence[float]]], looks: Mapping[str, Style]) -> list[Picture]:
    """How much each probe drew from each layer.

    Args:
        weights: by task, then by model: one weight per layer, the projected extractor output first.
        looks: from :func:`styles`.
    """
    weights = {task: entries for task, entries in weights.items() if entries}
    if not weights:
        return []
    figure, panels = _rows(len(weights), 1.6)
    for axes, (task, entries) in zip(panels, weights.items(), strict=True):
        for name, values in entries.items():
            look = looks[name]
            marker = look.marker if len(values) <= 26 else None
            axes.plot(range(len(values)), values, color=look.colour, marker=marker, linestyle=look.line)
        axes.set_ylim(bottom=0)
        _percent_axis(axes, "weight (%)")
        axes.set_title(short_name(task), pad=3)
        _few_ticks(axes)
    panels[-1].set_xlabel("layer (0: projected extractor output)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(_MOST_TICKS, integer=True))
    names = list(dict.fromkeys(name for entries in weights.values() for name in entries))
    _legend(figure, [_symbol(looks[name]) for name in names], names)
    return [Picture("layer_weights", "What each probe drew from each layer: its learnt weights.", figure)]


@_in_own_style
def accuracy_over_size(
    scores: Mapping[str, Mapping[str, Score]], num_params: Mapping[str, int], looks: Mapping[str, Style]
) -> list[Picture]:
    """Accuracy of each probe over the model's parameters; nothing for fewer than two models.

    Args:
        scores: by task, then by model; those that are not in ``num_params`` are left out.
        num_params: by model.
        looks: from :func:`styles`.
    """
    scores = {task: {name: s for name, s in entries.items() if name in num_params} for task, entries in scores.items()}
    scores = {task: entries for task, entries in scores.items() if len(entries) > 1}
    if not scores:
        return []
    figure, panels = _rows(len(scores), 1.6)
    for axes, (task, entries) in zip(panels, scores.items(), strict=True):
        for name, score in entries.items():
            axes.errorbar(
                num_params[name] / 1e6,
                score.mean,
                yerr=score.std or None,
                color=looks[name].colour,
                marker=looks[name].marker,
                markersize=7,
                capsize=3,
                linestyle="none",
            )
        axes.set_ylabel("accuracy (%)")
        axes.margins(x=0.08, y=0.2)
        axes.set_ylim(top=min(axes.get_ylim()[1], 101.5))  # a little room for a marker at 100
        axes.set_title(short_name(task), pad=3)
        _few_ticks(axes)
    _size_axis(panels[-1], [num_params[name] / 1e6 for entries in scores.values() for name in entries])
    names = list(dict.fromkeys(name for entries in scores.values() for name in entries))
    symbols = [
        Line2D([], [], color=looks[n].colour, marker=looks[n].marker, markersize=7, linestyle="none") for n in names
    ]
    _legend(figure, symbols, names)
    return [Picture("accuracy_over_size", "What size buys: accuracy of the probes over parameters.", figure)]


def _size_axis(axes: Axes, millions: Sequence[float]) -> None:
    axes.set_xlabel("parameters (millions)")
    if min(millions) > 0 and max(millions) > 8 * min(millions):
        axes.set_xscale("log")
        decades = range(-6, 7)
        chosen = [m * 10.0**decade for decade in decades for m in (1, 2, 5)]
        if max(millions) > 100 * min(millions):
            chosen = [10.0**decade for decade in decades]
        axes.xaxis.set_major_locator(FixedLocator(chosen))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_xlim(left=0)
