"""The results file of ``evaluate.py`` and its tables, which evaluate.py prints and the report of a run shows.

The file is JSON:

    made_by    command, versions, device, threads, seeds
    teacher    its name, or null
    models     one entry each: name, path, backend, is_teacher, config, cost (:mod:`evaluation.cost`, with "speed", and
               "streaming" with delay_ms and real_time_factor by steps; null unless it streams),
               fidelity (:class:`evaluation.fidelity.Student`; null without teacher or manifest), probes by name
               (:class:`evaluation.probes.Probed`), head (:func:`evaluation.measure.head_summary`; null without one),
               quality (:func:`evaluation.measure.figure_of_merit`; null without teacher or probes)
    controls   the probes of "log-mel" features and of "random weights" in the first model's shape
    probes     for each its kind, metric, num_classes, num_train, num_test and chance (per cent)
    left_out   the probes that do not count for quality, with the reason
    macs_counted_on    utterance_seconds and superb_seconds, see evaluation.cost
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from labels.lists import TEXT
from wav2vec2.config import unit_counts
from wav2vec2.files.errors import UserError, visible
from wav2vec2.files.storage import read_json

# The hub's names for metrics; others are written with underscores.
_METRIC_TYPES = {"frame accuracy": "accuracy", "word error rate": "wer", "character error rate": "cer"}


class Table(NamedTuple):
    """Cells as text; the first column names the rows, the notes explain the numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        """Align the first column to the left and the others to the right, above the notes."""
        lines = [[visible(cell) for cell in line] for line in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join([line[0].ljust(widths[0]), *(map(str.rjust, line[1:], widths[1:]))]).rstrip() for line in lines
        ]
        return "\n".join([f"{self.title}:", *text, *map(visible, self.notes)])


@contextmanager
def results_of(path: Path) -> Iterator[dict[str, Any]]:
    """Read the results of evaluate.py for a block that uses them; errors in the block name the file.

    Raises:
        UserError: the file does not exist, is no JSON object, or does not hold what the block looks for.
    """
    results = read_json(path, "the JSON that evaluate.py writes", "run evaluate.py again")
    try:
        yield results
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        problem = f"not the results of evaluate.py that are expected here ({type(error).__name__}: {error})"
        raise UserError(f"{path}: {problem}") from error


def evaluation_tables(results: dict[str, Any]) -> list[Table]:
    """Make the tables of a results file: cost, and fidelity and probes as far as they were measured."""
    models = results["models"]
    if not all(isinstance(model["name"], str) for model in models):
        raise TypeError("a model without a name")
    tables = [cost_table(models, results["macs_counted_on"]), part_table(models)]
    if any(model["fidelity"] for model in models):
        tables.append(fidelity_table(models))
    if results["probes"]:
        tables.append(probe_table(results))
    if any(model.get("head") for model in models) and results["probes"]:  # older results have no heads
        tables.append(head_table(models))
    if any(model["quality"] for model in models):
        tables.append(quality_table(results))
    return tables


def cost_table(
    models: Sequence[dict[str, Any]], counted_on: dict[str, Any], original_num_params: int | None = None
) -> Table:
    """Tabulate parameters, bytes, multiplications and speed.

    Sparsity is relative to ``original_num_params``, by default the teacher's, if there is one.
    """
    teachers = [model["cost"]["num_params"] for model in models if model.get("is_teacher")]
    before = original_num_params or next(iter(teachers), None)
    speeds = [f"RTF {entry['seconds']:g} s x {entry['batch']}" for entry in models[0]["cost"].get("speed", [])]
    streams = any(model["cost"].get("streaming") for model in models)
    rows = []
    for model in models:
        cost = model["cost"]
        streaming = cost.get("streaming") or {}
        macs = cost["macs_per_second"]
        rows.append(
            [
                model["name"],
                f"{cost['num_params']:,}",
                f"{1 - cost['num_params'] / before:.2%}" if before else "-",
                "-" if cost["num_bytes"] is None else f"{cost['num_bytes'] / 1e6:.1f}",
                f"{macs['total'] / 1e9:.3f}",
                f"{macs['conv'] / 1e9:.3f}",
                f"{cost['superb_macs']['total']:.4g}",
                *(f"{entry['real_time_factor']:.4f}" for entry in cost.get("speed", [])),
                *([f"{streaming['delay_ms']:.0f}", f"{streaming['real_time_factor']:.4f}"] if streaming else "--")[
                    : 2 * streams
                ],
            ]
        )
    notes = [
        f"MACs per second of utterances of {counted_on['utterance_seconds']:g} s; SUPERB-style: for "
        f"{counted_on['superb_seconds']:.0f} s of them, for which HuBERT Base needs the published number (SUPERB's "
        "own set is not public)"
    ]
    if speeds:
        notes.append("RTF (real-time factor): seconds of work per second of audio, by length and batch")
    header = ["", "parameters", "sparsity", "MB", "GMACs/s", "(conv)", "SUPERB-style MACs", *speeds]
    if streams:
        header += ["delay ms", "RTF by steps"]
        notes.append("delay of a stream: the sound that a chunk's frames need; by steps: one stream, chunk by chunk")
    return Table("Cost", header, rows, notes)


def fidelity_table(models: Sequence[dict[str, Any]]) -> Table:
    """Tabulate L1, cosine and CKA of each distilled layer with the teacher's, and the distillation loss."""
    compared = {model["name"]: model["fidelity"] for model in models if model["fidelity"]}
    layers = [entry["layer"] for entry in next(iter(compared.values()))["layers"]]
    measures = {"L1": "l1", "cosine": "cosine", "CKA": "cka"}
    rows, notes = [], ["L1 and cosine through the learnt projections, CKA of the hidden states as they are"]
    for name, found in compared.items():
        values = [entry[measure] for measure in measures.values() for entry in found["layers"]]
        pairs = [(entry["l1"], entry["cosine"]) for entry in found["layers"]]
        loss = "-" if (None, None) in pairs else f"{fmean(l1 - cosine for l1, cosine in pairs):.4f}"
        rows.append([name, *("-" if value is None else f"{value:.3f}" for value in values), loss])
        if found["note"]:
            notes.append(f"{name}: {found['note']}")
    notes.append("loss: equation 1 with the published weights, the mean of L1 - cosine over the layers")
    header = ["", *(f"{title} {layer}" for title in measures for layer in layers), "loss"]
    return Table("Fidelity to the teacher", header, rows, notes)


def part_table(models: Sequence[dict[str, Any]]) -> Table:
    """Tabulate the share of each part in a model's parameters and multiplications."""
    titles = {"conv": "extractor", "projection": "projection", "attention": "attention", "feed_forward": "FFN"}
    rows = []
    for model in models:
        params, macs = model["cost"]["params"], model["cost"]["macs_per_second"]
        shares = [100 * params[part] / sum(params.values()) for part in titles]
        shares += [100 * macs[part] / macs["total"] for part in titles]
        rows.append([model["name"], *(f"{share:.1f}" for share in shares)])
    header = ["", *(f"{what}: {title}" for what in ("parameters", "MACs") for title in titles.values())]
    about = "per cent; the projection includes the positional convolution and the norms outside of blocks"
    return Table("Parts", header, rows, [about])


def _cell(found: dict[str, Any], spread: str = "") -> str:
    low, high = found["interval"]
    return f"{found['mean']:.1f}{spread} [{low:.1f}, {high:.1f}]"


def probe_table(results: dict[str, Any]) -> Table:
    """Tabulate the score of each model and control in each probe."""
    scored = {model["name"]: model["probes"] for model in results["models"] if model["probes"]} | results["controls"]
    tasks = results["probes"]
    rows = [
        [name, *(_cell(found[task], f" ± {found[task]['std']:.1f}") for task in tasks)]
        for name, found in scored.items()
    ]
    rows.append(["chance", *(f"{task['chance']:.1f}" for task in tasks.values())])
    about = (
        "test score in per cent, mean and standard deviation over the seeds, and in brackets where 95% of bootstrap "
        "samples of the test clips lie; a lower error rate is better"
    )
    return Table("Probes", ["", *(f"{name}: {task['metric']}" for name, task in tasks.items())], rows, [about])


def head_table(models: Sequence[dict[str, Any]]) -> Table:
    """Tabulate the scores of fine-tuned models' own heads."""
    heads = {model["name"]: model["head"] for model in models if model.get("head")}
    metrics = {probe: score["metric"] for head in heads.values() for probe, score in head["scores"].items()}
    rows, notes = [], ["test score in per cent, and in brackets where 95% of bootstrap samples of the test clips lie"]
    for name, head in heads.items():
        cells = [head["scores"].get(probe) for probe in metrics]
        rows.append([name, *("-" if cell is None else _cell(cell) for cell in cells)])
        notes += [f"{name} is not scored on {probe}: {reason}" for probe, reason in head["left_out"].items()]
    return Table("Own heads", ["", *(f"{probe}: {metric}" for probe, metric in metrics.items())], rows, notes)


def quality_table(results: dict[str, Any]) -> Table:
    """Tabulate the quality of each model."""
    rows = [[model["name"], _cell(model["quality"])] for model in results["models"] if model["quality"]]
    about = "mean over the probes of where the score lies between log-mel (0) and the teacher (100), and 95% interval"
    notes = [f"{probe} is left out: {reason}" for probe, reason in results["left_out"].items()]
    return Table("Quality", ["", "quality"], rows, [about, *notes])


# --- architecture ----------------------------------------------------------------------------------


def architecture_tables(before: dict[str, Any], after: dict[str, Any]) -> list[Table]:
    """Tabulate kept units as ``after/before``: by layer of the transformer and of the extractor, and of all layers.

    The last table is left out if nothing of it is pruned.
    """
    old, new = unit_counts(before), unit_counts(after)
    channels, heads, dims = (
        [f"{kept}/{count}" for kept, count in zip(new[name], old[name], strict=True)] for name in new
    )
    layers = [[str(layer), *cells] for layer, cells in enumerate(zip(heads, dims, strict=True), start=1)]
    conv_layers = [[str(layer), cell] for layer, cell in enumerate(channels)]
    keys = {
        "dimensions of a frame": "encoder_embed_dim",
        "taps of the positional convolution": "encoder_pos_conv_kernel",
    }
    shared = [[name, f"{after[key]}/{before[key]}"] for name, key in keys.items() if after[key] != before[key]]
    tables = [
        Table("Kept units of the transformer", ["layer", "heads", "FFN dimensions"], layers),
        Table("Kept channels of the extractor", ["conv layer", "channels"], conv_layers),
        Table("Kept units of all layers", ["unit", "kept"], shared),
    ]
    return [table for table in tables if table.rows]


def model_of_shape(results: dict[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Find the entry of ``models`` that PyTorch ran with this config, whatever its head; of several, by its file name.

    Raises:
        UserError: there is none, or more than one.
    """

    def shape(config: Mapping[str, Any]) -> dict[str, Any]:
        return {**json.loads(json.dumps(config)), "aux_num_out": None}

    models = [model for model in results["models"] if model.get("backend", "torch") == "torch"]
    found = [model for model in models if shape(model["config"]) == shape(config)]
    found = [model for model in found if Path(model["path"]).name == path.name] or found
    if len(found) != 1:
        names = ", ".join(str(model["name"]) for model in results["models"])
        raise UserError(
            f"{len(found)} of its models ({names}) have the shape of {path}, expected 1; measure it with "
            f"evaluate.py --models {path}"
        )
    return found[0]


def card_metrics(results: dict[str, Any], model: dict[str, Any]) -> list[dict[str, Any]]:
    """List the scores of an entry of ``models`` in per cent, as keywords of huggingface_hub's EvalResult."""

    def entry(task: str, name: str, metric: str, how: str, value: float) -> dict[str, Any]:
        return {
            "task_type": task,
            "dataset_type": name,
            "dataset_name": name,
            "metric_type": _METRIC_TYPES.get(metric, metric.replace(" ", "_")),
            "metric_name": f"{metric}, {how}",
            "metric_value": round(float(value), 4),
        }

    probes, head = results["probes"], model.get("head") or {"scores": {}}
    scores = [(name, probes[name]["metric"], "linear probe (%)", found) for name, found in model["probes"].items()]
    scores += [(name, found["metric"], "own head (%)", found) for name, found in head["scores"].items()]
    tasks = {TEXT: "automatic-speech-recognition"}
    found = [
        entry(tasks.get(probes[name]["kind"], "audio-classification"), name, metric, how, score["mean"])
        for name, metric, how, score in scores
    ]
    if quality := model["quality"]:
        name, how = ", ".join(quality["probes"]), "log-mel is 0, the teacher 100"
        found.append(entry("feature-extraction", name, "quality", how, quality["mean"]))
    cosines = [layer["cosine"] for layer in (model["fidelity"] or {"layers": []})["layers"]]
    if cosines and None not in cosines:
        name, how = Path(model["fidelity"]["tsv"]).stem, "mean of the distilled layers"
        found.append(entry("feature-extraction", name, "cosine with the teacher", how, fmean(cosines)))
    return found
