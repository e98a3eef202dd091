"""One page per experiment: settings, sizes, kept units, training, evaluation, with pictures.

Writes OUT/report.html, which needs no other file, and its pictures as OUT/pictures/*.png. The stages of run.sh do
this at their ends; call it for an experiment that is still running, or after evaluate.py has measured it.

  python evaluation/report.py --exp_dir exp/hubert-base
"""

import argparse
import html
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from the checkout, not installed

import cli
from evaluation.architecture import conv_channels, ffn_size, num_heads
from evaluation.experiment import FINAL, Experiment, as_number, read_experiment, shape_of
from training.checkpoints import CHECKPOINTS, print_line
from wav2vec2.errors import UserError, short_repr, single_line
from wav2vec2.files import atomic_path

if TYPE_CHECKING:
    from evaluation.pictures import Picture, Score

PAGE = "report.html"
PICTURES = "pictures"
# In the environment: "0" keeps the stages from writing a report.
SWITCH = "DPHUBERT_REPORT"


# ---------------------------------------------------------------------------------------------------
# What is reported
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measured:
    """A model that evaluate.py has measured; what it has not measured is empty.

    Attributes:
        name: of the model, no two alike.
        path: of its file.
        is_teacher: whether the others are compared with it.
        config: complete; None if the results do not hold one.
        cost: parameters, bytes, MACs and speed.
        fidelity: how the layers were compared, and "layers".
        probes: results by task.
    """

    name: str
    path: str
    is_teacher: bool
    config: dict[str, Any] | None
    cost: dict[str, Any]
    fidelity: dict[str, Any]
    probes: dict[str, dict[str, Any]]


def read_evaluation(evaluation: Mapping[str, Any]) -> tuple[list[Measured], list[str]]:
    """The models of evaluate.py's results, and why one of their configs could not be read.

    Raises:
        UserError: not the results of evaluate.py.
    """
    entries = evaluation.get("models")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(
            f"evaluation: expected a list of models under 'models', found {short_repr(entries)}; "
            "give the JSON that evaluate.py writes"
        )
    models: list[Measured] = []
    notes = []
    for entry in entries:
        name = _unused(single_line(str(entry.get("name"))), [model.name for model in models])
        config = None
        if isinstance(entry.get("config"), dict):
            try:
                config, _ = shape_of(entry["config"], f"evaluation: model {name}")
            except UserError as error:
                notes.append(str(error))
        models.append(
            Measured(
                name,
                str(entry.get("path") or ""),
                entry.get("is_teacher") is True,
                config,
                *(_dict(entry.get(key)) for key in ("cost", "fidelity")),
                _dicts(entry.get("probes")),
            )
        )
    return models, notes


def _unused(name: str, names: Sequence[str]) -> str:
    number, candidate = 1, name
    while candidate in names:
        number += 1
        candidate = f"{name} ({number})"
    return candidate


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> dict[str, dict[str, Any]]:
    """The entries of ``value`` that are dicts."""
    return {str(name): entry for name, entry in _dict(value).items() if isinstance(entry, dict)}


def _fidelity_layers(model: Measured) -> list[dict[str, float]]:
    """The measures of each layer that are numbers."""
    layers = model.fidelity.get("layers")
    found = [
        {key: number for key in ("layer", "l1", "cosine", "cka") if (number := as_number(layer.get(key))) is not None}
        for layer in (layers if isinstance(layers, list) else ())
        if isinstance(layer, dict)
    ]
    return [layer for layer in found if "layer" in layer]


def _scores(results: Mapping[str, Mapping[str, Any]], task: str) -> "dict[str, Score]":
    """Accuracies in a task by model or control, from results by model and task."""
    from evaluation.pictures import Score

    found = {}
    for name, probes in results.items():
        mean = as_number(_dict(probes.get(task)).get("mean"))
        if mean is not None:
            found[name] = Score(mean, as_number(probes[task].get("std")) or 0.0)
    return found


# ---------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------


class Html(str):
    """Text that is HTML already; all other text is escaped."""


def _escaped(value: Any) -> Html:
    """A value as HTML; text keeps what it says, made printable, and large numbers get separators."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("–")
    if type(value) is int:
        return Html(f"{value:,}")
    return Html(html.escape(single_line(str(value), 2000)))


class Number(str):
    """A formatted number, for the right side of its column."""


def _filled(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> tuple[list[Any], list[list[Any]]]:
    """Header and rows without the columns that are empty; the first stays."""
    used = [place for place in range(len(header)) if place == 0 or any(row[place] is not None for row in rows)]
    return [header[place] for place in used], [[row[place] for place in used] for row in rows]


def _table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Html:
    """A table whose first column names the rows; columns of numbers stand on the right."""

    rows = list(rows)
    kinds = [
        " class=n" if any(isinstance(row[place], (int, Number)) for row in rows) else "" for place in range(len(header))
    ]

    def cells(row: Sequence[Any]) -> str:
        rest = zip(kinds[1:], row[1:], strict=True)
        return f"<th scope=row>{_escaped(row[0])}</th>" + "".join(
            f"<td{kind}>{_escaped(cell)}</td>" for kind, cell in rest
        )

    body = "".join(f"<tr>{cells(row)}</tr>\n" for row in rows)
    head = "".join(
        f"<th scope=col{kind if place else ''}>{_escaped(name)}</th>"
        for place, (kind, name) in enumerate(zip(kinds, header, strict=True))
    )
    return Html(f"<div class=scroll><table>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n")


def _number(value: Any, form: str, factor: float = 1.0) -> Number | None:
    number = as_number(value)
    return None if number is None else Number(format(number * factor, form))


def _count(value: Any) -> Number | None:
    return _number(value, ",.0f")


def _section(title: str, *parts: str) -> Html:
    content = "".join(parts)
    return Html(f"<section>\n<h2>{_escaped(title)}</h2>\n{content}</section>\n" if content else "")


def _paragraph(text: Any, kind: str = "") -> Html:
    return Html(f"<p{f' class={kind}' if kind else ''}>{_escaped(text)}</p>\n")


def _gallery(pictures: "Sequence[Picture]") -> Html:
    from evaluation.pictures import as_svg

    def figure(picture: "Picture") -> str:
        caption = _escaped(picture.caption)
        drawing = as_svg(picture).replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
        return f"<figure>\n{drawing}\n<figcaption>{caption}</figcaption>\n</figure>\n"

    return Html(f"<div class=gallery>\n{''.join(map(figure, pictures))}</div>\n" if pictures else "")


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --page: #ffffff; --card: #f6f8fa; --line: #d0d7de;
  --light: 1 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --page: #14171b; --card: #1d2127; --line: #3a414a; --light: 1.3 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0 }
h2 { font-size: 1.2rem; margin: 2rem 0 0.6rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.2rem 0 0.4rem }
p { margin: 0.4rem 0 }
.soft, figcaption { color: var(--soft) }
.note { border-left: 4px solid #D55E00; padding-left: 0.7rem }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.6rem; margin: 1rem 0 }
.facts div { background: var(--card); border-radius: 6px; padding: 0.6rem 0.8rem }
.facts dt { color: var(--soft); font-size: 0.85rem }
.facts dd { margin: 0; font-size: 1.2rem; font-weight: 600 }
.scroll { overflow-x: auto; margin: 0.4rem 0 }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line) }
tbody th { font-weight: 400; white-space: nowrap }
td { overflow-wrap: anywhere; min-width: 4rem }
th.n, td.n { text-align: right }
td.n { white-space: nowrap }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem }
.tables .scroll { max-width: 100% }
.gallery { columns: 21rem; column-gap: 1rem }
figure { margin: 0 0 1rem; padding: 0.5rem; background: var(--card); border-radius: 6px; break-inside: avoid }
figure svg { display: block; width: 100%; height: auto; filter: brightness(var(--light)) }
figure svg text { font-family: inherit !important }
figcaption { font-size: 0.9rem; padding: 0.3rem 0.3rem 0 }
@media (max-width: 40rem) { tbody th { white-space: normal } }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --page: #fff; --card: #fff; --line: #bbb; --light: 1 }
  body { font-size: 10pt; max-width: none; padding: 0 }
  .gallery { columns: 2 }
  tr, .facts div { break-inside: avoid }
  h2, h3 { break-after: avoid }
  .scroll { overflow: visible }
}
"""


def _page(title: str, body: str) -> str:
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is loaded and nothing runs, whatever a file's text should bring in.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


# ---------------------------------------------------------------------------------------------------
# Sections of an experiment
# ---------------------------------------------------------------------------------------------------


def _facts(experiment: Experiment) -> Html:
    """The few numbers that one looks for first."""
    last = experiment.models[-1] if experiment.models else None
    before, after = experiment.original_num_params, last.num_params if last else None
    facts = {
        "parameters": None if after is None else f"{before:,} → {after:,}" if before else f"{after:,}",
        "sparsity reached": None if experiment.sparsity is None else f"{experiment.sparsity:.2%}",
        "sparsity wanted": None if experiment.target_sparsity is None else f"{experiment.target_sparsity:.2%}",
        "size of the file": f"{last.num_bytes / 1e6:,.1f} MB" if last else None,
    }
    cards = "".join(
        f"<div><dt>{_escaped(name)}</dt><dd>{_escaped(fact)}</dd></div>" for name, fact in facts.items() if fact
    )
    return Html(f"<dl class=facts>{cards}</dl>\n" if cards else "")


def _sizes(experiment: Experiment, measured: Sequence[Measured]) -> Html:
    macs = {Path(model.path).resolve(): _dict(model.cost.get("macs_per_second")).get("total") for model in measured}
    teacher = next((model for model in measured if model.is_teacher), None)
    before = experiment.original_num_params

    def row(title: str, num_params: int, num_bytes: Any, macs: Any) -> list[Any]:
        sparsity = Number(f"{1 - num_params / before:.2%}") if before else None
        return [title, num_params, sparsity, _number(num_bytes, ",.1f", 1e-6), _number(macs, ".3f", 1e-9)]

    rows = []
    if before:
        is_same = teacher is not None and teacher.cost.get("num_params") == before
        known = (teacher.cost.get("num_bytes"), macs[Path(teacher.path).resolve()]) if is_same else (None, None)
        rows.append(row("teacher", before, *known))
    rows += [row(m.title, m.num_params, m.num_bytes, macs.get(m.path.resolve())) for m in experiment.models]
    header = ["", "parameters", "sparsity", "file (MB)", "GMACs/s"]
    target = experiment.target_sparsity
    goal = "" if target is None else _paragraph(f"Wanted: a sparsity of {target:.2%}.", "soft")
    return _section("Size", _table(*_filled(header, rows)), goal) if rows else Html("")


def _training_facts(experiment: Experiment) -> Html:
    """How far each training is, and where its losses ended."""
    rows = []
    for stage in experiment.stages:
        valid = stage.log.get("valid_loss", {})
        final = Number(f"{next(reversed(valid.values())):.4f}") if valid else None
        num_logged = max((update for column in stage.log.values() for update in column), default=None)
        of = stage.settings.get("max_updates")
        done = stage.num_updates if stage.num_updates is not None else num_logged
        updates = "–" if done is None else f"{done:,} of {of:,}" if type(of) is int else f"{done:,}"
        rows.append([stage.title, updates, final])
    return _table(["", "updates", "held-out loss in the end"], rows) if rows else Html("")


def _setting(value: Any) -> str | None:
    if isinstance(value, dict):
        return f"fingerprint {value.get('fingerprint')}"
    return None if value is None else str(value)


def _settings(experiment: Experiment) -> Html:
    stages = [stage for stage in experiment.stages if stage.settings]
    names = sorted({name for stage in stages for name in stage.settings} - {"stage"}, key=str)
    rows = [[name, *(_setting(stage.settings.get(name)) for stage in stages)] for name in names]
    return _section("Settings", _table(["", *(stage.title for stage in stages)], rows)) if rows else Html("")


def _provenance(experiment: Experiment | None, evaluation: Mapping[str, Any]) -> Html:
    import matplotlib

    rows: list[list[Any]] = []
    if experiment is not None:
        for stage in experiment.stages:
            rows += [[stage.title, f"{name} {version}"] for name, version in stage.versions.items()]
        for model in experiment.models:
            rows += [[f"{model.title}: {key}", _setting(value)] for key, value in sorted(model.made_by.items())]
    measured_by = _dict(evaluation.get("made_by"))
    for key in ("command", "device", "threads"):
        if measured_by.get(key) is not None:
            value = measured_by[key]
            words = isinstance(value, list) and all(isinstance(word, str) for word in value)
            rows.append([f"evaluation: {key}", shlex.join(value) if words else str(value)])
    rows += [[f"evaluation: {name}", str(version)] for name, version in _dict(measured_by.get("versions")).items()]
    versions = f"python {platform.python_version()}, torch {torch.__version__}, matplotlib {matplotlib.__version__}"
    rows.append(["page written with", versions])
    rows.append(["page written by", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])])
    return _section("Provenance", _table(["", ""], rows))


# ---------------------------------------------------------------------------------------------------
# Sections that both have
# ---------------------------------------------------------------------------------------------------


def _architecture_table(configs: Mapping[str, dict[str, Any]], original: dict[str, Any] | None) -> Html:
    """Kept units per layer, as ``kept/before``."""
    deepest = max([*configs.values(), *([original] if original else [])], key=lambda c: c["encoder_num_layers"])

    def cells(layer: int, count: Any) -> list[Any]:
        found = []
        for config in configs.values():
            if layer >= config["encoder_num_layers"]:
                found.append(None)
            elif original is None or layer >= original["encoder_num_layers"]:
                found.append(Number(count(config, layer)))
            else:
                found.append(Number(f"{count(config, layer)}/{count(original, layer)}"))
        return found

    header = [f"{name}: {unit}" if len(configs) > 1 else unit for unit in ("heads", "FFN") for name in configs]
    rows = [
        [layer + 1, *cells(layer, num_heads), *cells(layer, ffn_size)] for layer in range(deepest["encoder_num_layers"])
    ]
    encoder = _table(["layer", *header], rows)

    channels = {name: conv_channels(config) for name, config in configs.items()}
    before = conv_channels(original) if original is not None else []
    rows = []
    for layer in range(max(map(len, channels.values()))):
        old = f"/{before[layer]}" if layer < len(before) else ""
        kept = [Number(f"{counts[layer]}{old}") if layer < len(counts) else None for counts in channels.values()]
        rows.append([layer, *kept])
    header = [f"{name}: channels" if len(configs) > 1 else "channels" for name in configs]
    return Html(f"<div class=tables>{encoder}{_table(['conv layer', *header], rows)}</div>\n")


def _cost_table(measured: Sequence[Measured], counted_on: Any) -> Html:
    if not measured:
        return Html("")
    rows = []
    for model in measured:
        macs, superb = (_dict(model.cost.get(key)) for key in ("macs_per_second", "superb_macs"))
        rows.append(
            [
                f"{model.name} (teacher)" if model.is_teacher else model.name,
                _count(model.cost.get("num_params")),
                _number(model.cost.get("num_bytes"), ",.1f", 1e-6),
                *(_number(macs.get(part), ".3f", 1e-9) for part in ("conv", "transformer", "total")),
                _number(superb.get("total"), ",.1f", 1e-9),
            ]
        )
    header = ["model", "parameters", "file (MB)"]
    header += [f"GMACs/s: {part}" for part in ("extractor", "transformer", "total")]
    header.append("GMACs on SUPERB's scale")
    length = as_number(_dict(counted_on).get("utterance_seconds"))
    counted = "" if length is None else f", counted on utterances of {length:g} s"
    about = f"GMACs/s: billions of multiply-accumulates per second of audio{counted}."
    return Html(_table(*_filled(header, rows)) + _paragraph(about, "soft"))


def _speed_table(measured: Sequence[Measured]) -> Html:
    settings: dict[tuple, None] = {}
    found: dict[tuple[str, tuple], Any] = {}
    for model in measured:
        for entry in model.cost.get("speed") or ():
            if isinstance(entry, dict):
                setting = tuple(as_number(entry.get(key)) for key in ("batch", "seconds", "threads"))
                settings[setting] = None
                found[model.name, setting] = entry.get("real_time_factor")
    if not settings:
        return Html("")

    def title(setting: tuple) -> str:
        batch, seconds, threads = ("?" if value is None else f"{value:g}" for value in setting)
        return f"{batch} × {seconds} s, {threads} thread{'' if threads == '1' else 's'}"

    rows = [
        [model.name, *(_number(found.get((model.name, setting)), ".4f") for setting in settings)] for model in measured
    ]
    about = _paragraph("Real-time factor: seconds of work per second of audio; lower is faster.", "soft")
    return Html(f"<h3>Speed</h3>\n{about}{_table(['model', *map(title, settings)], rows)}")


def _fidelity_table(measured: Sequence[Measured]) -> Html:
    found = {model: layers for model in measured if (layers := _fidelity_layers(model))}
    if not found:
        return Html("")
    rows = []
    for model, layers in found.items():
        for place, layer in enumerate(layers):
            values = [_number(layer.get(key), ".4f") for key in ("l1", "cosine", "cka")]
            rows.append([model.name if place == 0 else "", Number(format(layer["layer"], "g")), *values])
    about = dict.fromkeys(
        f"{model.fidelity.get('mode')}, {model.fidelity.get('num_utterances')} utterances, "
        f"{_number(model.fidelity.get('hours'), '.2f') or '?'} h of {model.fidelity.get('tsv')}"
        + (f"; {model.name}: {model.fidelity['note']}" if model.fidelity.get("note") else "")
        for model in found
    )
    table = _table(["model", "layer", "L1 distance", "cosine", "CKA"], rows)
    return Html(f"<h3>Likeness to the teacher</h3>\n{table}{''.join(_paragraph(line, 'soft') for line in about)}")


def _probe_table(scores: "Mapping[str, Mapping[str, Score]]", tasks: Mapping[str, Mapping[str, Any]]) -> Html:
    names = list(dict.fromkeys(name for entries in scores.values() for name in entries))
    if not names:
        return Html("")

    def cell(score: "Score | None") -> Number | None:
        return None if score is None else Number(f"{score.mean:.2f} ± {score.std:.2f}")

    rows = [[name, *(cell(entries.get(name)) for entries in scores.values())] for name in names]
    chances = [as_number(_dict(tasks.get(task)).get("chance")) for task in scores]
    if any(chance is not None for chance in chances):
        rows.append(["guessing", *(_number(chance, ".2f") for chance in chances)])
    sizes = [
        f"{task}: {about.get('num_classes')} classes, {about.get('num_train')} clips to train, "
        f"{about.get('num_test')} to test"
        for task, about in tasks.items()
    ]
    table = _table(["", *(f"{task}: accuracy (%)" for task in scores)], rows)
    return Html(f"<h3>Probes</h3>\n{table}{''.join(_paragraph(size, 'soft') for size in sizes)}")


# ---------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------


def _drawn_architecture(
    experiment: Experiment | None, measured: Sequence[Measured]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """Configs of the models to show by name, and the original that they are compared with."""
    configs = {model.name: model.config for model in measured if model.config is not None and not model.is_teacher}
    teachers = [model.config for model in measured if model.config is not None and model.is_teacher]
    original = teachers[0] if teachers else None
    if experiment is not None:
        original = experiment.original or original
        known = {Path(model.path).resolve() for model in measured}
        if experiment.models and not {model.path.resolve() for model in experiment.models} & known:
            # Final distillation leaves the units alone.
            configs = {_unused(single_line(experiment.name), [m.name for m in measured]): experiment.models[-1].config}
            configs |= {model.name: model.config for model in measured if model.config and not model.is_teacher}
    return configs, original


def _evaluation_part(
    evaluation: Mapping[str, Any], measured: Sequence[Measured], looks: Mapping[str, Any]
) -> "tuple[Html, list[Picture]]":
    from evaluation import pictures as draw

    students = [model for model in measured if not model.is_teacher]
    tasks = _dicts(evaluation.get("probes"))
    by_model = {model.name: model.probes for model in measured}
    controls = {
        _unused(single_line(name), list(by_model)): _dicts(found)
        for name, found in _dicts(evaluation.get("controls")).items()
    }
    names = dict.fromkeys([*tasks, *(task for found in [*by_model.values(), *controls.values()] for task in found)])
    scores = {task: _scores({**by_model, **controls}, task) for task in names}
    weights = {
        task: {
            name: numbers
            for name, found in by_model.items()
            if (numbers := _weights(_dict(found.get(task)).get("layer_weights")))
        }
        for task in names
    }
    chances = {task: chance for task, about in tasks.items() if (chance := as_number(about.get("chance"))) is not None}
    num_params = {
        model.name: int(number) for model in measured if (number := as_number(model.cost.get("num_params"))) is not None
    }
    layers = {model.name: found for model in students if (found := _fidelity_layers(model))}
    pictures = [
        *draw.fidelity(layers, looks),
        *draw.probe_accuracies(scores, chances, looks),
        *draw.accuracy_over_size(scores, num_params, looks),
        *draw.layer_weights(weights, looks),
    ]
    return (
        _section(
            "Evaluation",
            _cost_table(measured, evaluation.get("macs_counted_on")),
            _speed_table(measured),
            _fidelity_table(students),
            _probe_table(scores, tasks),
            _gallery(pictures),
        ),
        pictures,
    )


def _weights(value: Any) -> list[float]:
    """One number per layer, or nothing if that is not what ``value`` is."""
    numbers = [as_number(entry) for entry in value] if isinstance(value, list) else []
    return [] if None in numbers else numbers


def write_report(
    exp_dir: Path | None,
    evaluation: dict[str, Any] | None,
    out_dir: Path,
    in_memory: Mapping[Path, dict[str, Any]] | None = None,
) -> Path:
    """Write ``OUT_DIR/report.html`` and ``OUT_DIR/pictures/*.png``; the same input makes the same bytes.

    Args:
        exp_dir: of distill.py; None for a page about the evaluation alone.
        evaluation: the results of evaluate.py; None for a page about the experiment alone.
        out_dir: where the page goes.
        in_memory: training checkpoints by path that need not be read again, see :func:`read_experiment`.

    Returns:
        The page.

    Raises:
        UserError: there is no experiment in ``exp_dir``, the evaluation is none, or matplotlib is not installed.
        OSError: a file cannot be read or written.
    """
    try:
        from evaluation import pictures as draw
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise UserError("pictures need matplotlib, which is not installed; pip install matplotlib") from error
    if exp_dir is None and evaluation is None:
        raise UserError("nothing to report: neither an experiment nor an evaluation is given")
    experiment = read_experiment(exp_dir, in_memory) if exp_dir is not None else None
    measured, notes = read_evaluation(evaluation) if evaluation is not None else ([], [])
    configs, original = _drawn_architecture(experiment, measured)
    names = dict.fromkeys([*configs, *(model.name for model in measured)])
    looks = draw.styles(list(names), [model.name for model in measured if model.is_teacher])

    body = ""
    pictures: list[Picture] = []
    if experiment is not None:
        notes = experiment.notes + notes
        body += _facts(experiment)
    body += "".join(_paragraph(f"Not in this report: {note}", "note") for note in notes)
    if experiment is not None:
        body += _sizes(experiment, measured)
    if configs:
        kept = draw.architecture(configs, original, looks)
        pictures += kept
        how = "Kept units, as kept/original." if original is not None else "Units of each layer."
        table = _architecture_table(configs, original)
        body += _section("Architecture", _gallery(kept), _paragraph(how, "soft"), table)
    if experiment is not None:
        parts: list[str] = [_training_facts(experiment)]
        for stage in experiment.stages:
            drawn = draw.training(stage, experiment.sparsity)
            pictures += drawn
            if drawn:
                parts.append(f"<h3>{_escaped(stage.title.capitalize())}</h3>\n{_gallery(drawn)}")
        body += _section("Training", *parts)
    if evaluation is not None:
        section, drawn = _evaluation_part(evaluation, measured, looks)
        pictures += drawn
        body += section
    if experiment is not None:
        body += _settings(experiment)
    body += _provenance(experiment, evaluation or {})

    models = f"{len(measured)} model{'' if len(measured) == 1 else 's'}"
    title = f"DPHuBERT: {single_line(experiment.name, 80) if experiment is not None else f'evaluation of {models}'}"
    page = _page(title, f"<h1>{_escaped(title)}</h1>\n{body}")
    for picture in pictures:
        draw.save_png(picture, out_dir / PICTURES)
    out = out_dir / PAGE
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def report_stage(checkpoint: Path, contents: dict[str, Any] | None = None) -> None:
    """What a stage does at its end: the report of its experiment so far, in the experiment's folder.

    A stage must not fail for want of pictures: whatever goes wrong is a warning. ``DPHUBERT_REPORT=0`` in the
    environment leaves the report out.

    Args:
        checkpoint: the ``EXP/ckpts/*.ckpt`` or ``EXP/final/ckpts/*.ckpt`` that the stage wrote or read; one in another
            place belongs to no experiment, and gets no report.
        contents: what it holds, if that is in memory.
    """
    if os.environ.get(SWITCH) == "0" or checkpoint.parent.name != CHECKPOINTS:
        return
    exp_dir = checkpoint.parent.parent
    if exp_dir.name == FINAL and (exp_dir.parent / CHECKPOINTS).is_dir():
        exp_dir = exp_dir.parent
    try:
        page = write_report(exp_dir, None, exp_dir, {} if contents is None else {checkpoint: contents})
    except Exception as error:
        reason = str(error) if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: {error}"
        print_line(f"warning: no report of {exp_dir}: {' '.join(reason.split())}")
    else:
        print_line(f"report: {page}")


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--exp_dir", type=Path, help="of distill.py")
    parser.add_argument("--evaluation", type=Path, metavar="JSON", help="results of evaluate.py")
    parser.add_argument("--out_dir", type=Path, help="where the page goes (default: --exp_dir)")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    out_dir = args.out_dir or args.exp_dir
    if out_dir is None:
        raise UserError("--out_dir or --exp_dir: give one of them, to say where the page goes")
    evaluation = None
    if args.evaluation is not None:
        try:
            evaluation = json.loads(args.evaluation.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{args.evaluation}: not the JSON that evaluate.py writes ({error})") from error
        if not isinstance(evaluation, dict):
            raise UserError(f"{args.evaluation}: not the JSON that evaluate.py writes, found {short_repr(evaluation)}")
    print(write_report(args.exp_dir, evaluation, out_dir))


if __name__ == "__main__":
    cli.run(main, parse_args())
