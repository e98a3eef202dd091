"""The results file and the table that ``evaluate.py`` makes of what it measured.

The file is JSON:

    made_by    command, versions, device, threads, seeds
    teacher    its name, or null
    models     one entry each: name, path, is_teacher, config, cost, fidelity (null without teacher or manifest), probes
    controls   the probes of what is no trained model: "log-mel", and "random weights" of the first model's shape
    probes     of each its num_classes, num_train, num_test and chance (per cent)
    macs_counted_on    utterance_seconds and superb_seconds, see evaluation.cost

``cost`` has num_params, num_bytes, macs_per_second and superb_macs (conv, transformer, total) and speed, see
:mod:`evaluation.cost`; ``fidelity`` is that of :func:`evaluation.fidelity.measure_fidelity`; an entry of ``probes``
that of :func:`evaluation.probes.summarize`, by the probe's name.
"""

import json
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from benchmarks.results import cpu_name
from wav2vec2.files import atomic_path


def made_by(device: torch.device, seeds: Sequence[int]) -> dict[str, Any]:
    """What is needed to get the results again."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "soundfile": soundfile.__version__,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "seeds": list(seeds),
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results as JSON, whole or not at all.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def print_results(results: dict[str, Any]) -> None:
    """Print one table for cost, fidelity and probes each, as far as they were measured."""
    print("\n" + table(_cost_rows(results["models"])))
    counted_on = results["macs_counted_on"]
    print(
        f"\nMACs per second of utterances of {counted_on['utterance_seconds']:g} s; SUPERB-style: for "
        f"{counted_on['superb_seconds']:.0f} s of them, for which HuBERT Base needs the published number (SUPERB's "
        "own set is not public)"
    )
    if any(model["fidelity"] for model in results["models"]):
        print("\n" + table(_fidelity_rows(results["models"])))
        print("\nL1 and cosine through the learnt projections, CKA of the hidden states as they are")
        for model in results["models"]:
            if model["fidelity"] and model["fidelity"]["note"]:
                print(f"{model['name']}: {model['fidelity']['note']}")
    if results["probes"]:
        print("\n" + table(_probe_rows(results)))
        print("\nprobes: test accuracy in per cent, mean and standard deviation over the seeds")


def table(rows: Iterable[Sequence[str]]) -> str:
    """Text columns, the first to the left and the others to the right."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _cost_rows(models: list[dict[str, Any]]) -> list[list[str]]:
    speeds = [(entry["seconds"], entry["batch"]) for entry in models[0]["cost"]["speed"]]
    header = ["", "parameters", "MB", "GMACs/s", "(conv)", "SUPERB-style MACs"]
    rows = [header + [f"RTF {seconds:g} s x {batch}" for seconds, batch in speeds]]
    for model in models:
        cost = model["cost"]
        macs = cost["macs_per_second"]
        rows.append(
            [
                model["name"],
                f"{cost['num_params']:,}",
                f"{cost['num_bytes'] / 1e6:.1f}",
                f"{macs['total'] / 1e9:.3f}",
                f"{macs['conv'] / 1e9:.3f}",
                f"{cost['superb_macs']['total']:.4g}",
                *(f"{entry['real_time_factor']:.4f}" for entry in cost["speed"]),
            ]
        )
    return rows


def _fidelity_rows(models: list[dict[str, Any]]) -> list[list[str]]:
    compared = [(model["name"], model["fidelity"]["layers"]) for model in models if model["fidelity"]]
    layers = [entry["layer"] for entry in compared[0][1]]
    measures = {"L1": "l1", "cosine": "cosine", "CKA": "cka"}
    rows = [["", *(f"{title} {layer}" for title in measures for layer in layers)]]
    for name, entries in compared:
        values = [entry[measure] for measure in measures.values() for entry in entries]
        rows.append([name, *("-" if value is None else f"{value:.3f}" for value in values)])
    return rows


def _probe_rows(results: dict[str, Any]) -> list[list[str]]:
    rows = [["", *results["probes"]]]
    by_name = {model["name"]: model["probes"] for model in results["models"]} | results["controls"]
    for name, found in by_name.items():
        scores = [found[probe] for probe in results["probes"]]
        rows.append([name, *(f"{score['mean']:.1f} ± {score['std']:.1f}" for score in scores)])
    return [*rows, ["chance", *(f"{probe['chance']:.1f}" for probe in results["probes"].values())]]
