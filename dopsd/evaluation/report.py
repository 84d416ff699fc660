"""Stage report: one self-contained HTML page, made from the folders of evaluation and training alone.

Pictures are inlined, curves are inline SVG; the page asks the network for nothing and runs no script.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from dopsd.files import whole_file

from .charts import Point, line_chart, steps_chart
from .grids import read_strip
from .naming import REFERENCES, SCORES, color_of, name_of, prompts_described, teacher_described
from .table import columns_of, rows_of
from .verdict import findings, main_model, verdict

__all__ = ["ReportError", "write_report"]

_TEMPLATE = "report.html.j2"
_CURVES = ("style", "train_similarity", "cosine", "concept_top1", "sharpness")
_PREVIEW = re.compile(r"(student|teacher)-(\d+)\.(?:webp|png)")  # png: of runs before 30 November 2026
_PREVIEWS_SHOWN = 6
_PAIRS_SHOWN = 8

Tiles = dict[tuple[str, str, int], list[Image.Image]]


class ReportError(ValueError):
    """Something that the report needs is missing; says which stage makes it."""


def write_report(evaluation: Path, training: Path, data: Mapping[str, Any], out: Path) -> Path:
    """Write the page to ``out`` from ``evaluation/`` and, where it is there, ``train/<method>/``.

    ``data``: what stage validate found (``content_hash``, ``holdout_images``, ...). Raises :class:`ReportError`.
    """
    metrics = _read_json(evaluation / "metrics.json")
    index = _read_json(evaluation / "samples" / "index.json")
    tiles = {
        (entry["split"], entry["model"], int(entry["steps"])): read_strip(evaluation / "samples", entry)
        for entry in index["strips"]
    }
    head, sentences = verdict(metrics)
    page = _environment().get_template(_TEMPLATE).render(
        metrics=metrics,
        prompts_line=prompts_described(metrics),
        teacher_line=teacher_described(metrics),
        data=data,
        main=main_model(metrics),
        headline=head,
        sentences=sentences,
        findings=findings(metrics),
        pairs=_pairs(metrics, index, tiles),
        grid=_grid(metrics, index, tiles, "concept"),
        kept_grid=_grid(metrics, index, tiles, "kept"),
        tables={split: (columns_of(metrics, split), rows_of(metrics, split)) for split in metrics["scores"]},
        charts=_charts(evaluation / "few_step.csv", metrics),
        steps_rows=_steps_rows(metrics, tiles),
        index=index,
        targets=[_tile(image) for image in tiles.get(("training", "real", 0), [])],
        training=_training(training, metrics),
        settings=_flat(index["settings"]),
        scores=SCORES,
    )  # fmt: skip
    with whole_file(out) as partial:
        partial.write_text(page, encoding="utf-8")
    return out


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"name": name_of, "color": color_of}
    environment.tests["reference"] = lambda model: model in REFERENCES
    return environment


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{path}: missing; run stage evaluate first") from None
    except ValueError as error:
        raise ReportError(f"{path}: not valid JSON ({error}); run stage evaluate again") from None
    if not isinstance(value, dict):
        raise ReportError(f"{path}: expected an object, found {type(value).__name__}; run stage evaluate again")
    return value


def _tile(image: Image.Image) -> Markup:
    """The picture as a ``data:`` address."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pairs(metrics: Mapping[str, Any], index: Mapping[str, Any], tiles: Tiles) -> list[dict[str, Any]]:
    """Before and after, prompt by prompt: base, main model and the truth where it is known."""
    few, model = metrics["few_steps"], main_model(metrics)
    before, after = tiles.get(("concept", "base", few), []), tiles.get(("concept", str(model), few), [])
    truths: Sequence[Image.Image | None] = tiles.get(("concept", "real", 0)) or [None] * len(before)
    return [
        {"prompt": text, "before": _tile(a), "after": _tile(b), "truth": _tile(truth) if truth else None}
        for text, a, b, truth in zip(index["prompts"]["concept"], before, after, truths, strict=False)
    ][:_PAIRS_SHOWN]


def _grid(
    metrics: Mapping[str, Any], index: Mapping[str, Any], tiles: Tiles, split: str
) -> tuple[list[str], list[tuple[str, list[Markup]]]]:
    """Prompts and rows (model, pictures) of one split, what was edited and the truth first."""
    few = metrics["few_steps"]
    keys = [(split, "reference", 0), (split, "real", 0), *((split, model, few) for model in metrics["models"])]
    rows = [(key[1], [_tile(image) for image in tiles[key]]) for key in keys if key in tiles]
    return index["prompts"].get(split, []), rows


def _steps_rows(metrics: Mapping[str, Any], tiles: Tiles) -> tuple[list[int], list[tuple[str, list[Markup]]]]:
    """The first prompt at every number of steps, model by model."""
    steps = sorted({steps for split, _, steps in tiles if split == "concept" and steps > 0})
    rows = []
    for model in metrics["models"]:
        drawn = [tiles.get(("concept", model, number)) for number in steps]
        if all(drawn):
            rows.append((model, [_tile(pictures[0]) for pictures in drawn if pictures]))
    return steps, rows


# --- curves -----------------------------------------------------------------------------------------------------------


def _charts(path: Path, metrics: Mapping[str, Any]) -> list[tuple[str, str, Markup]]:
    """(title, explanation, chart) for every score that is worth a curve."""
    curves: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            low, high = (float(row[key]) if row[key] else None for key in ("low", "high"))
            curves[row["metric"]][row["model"]].append(Point(float(row["steps"]), float(row["value"]), low, high))
    keys = [key for key in _CURVES if key in curves and not (key == "train_similarity" and "style" in curves)]
    charts = []
    for key in keys:
        ordered = {m: sorted(curves[key][m], key=lambda p: p.x) for m in metrics["models"] if m in curves[key]}
        if max(map(len, ordered.values())) > 1:
            reference = 1.0 if SCORES[key].better == "one" else None
            label = f"{SCORES[key].label} over the number of steps"
            chart = steps_chart(ordered, metrics["few_steps"], label, reference)
            charts.append((SCORES[key].label, SCORES[key].meaning, chart))
    return charts


# --- training ---------------------------------------------------------------------------------------------------------


def _training(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Loss curves and previews, of whatever methods left some."""
    losses, previews = {}, []
    for run in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not run.is_dir() or "." in run.name:  # runs that were set aside
            continue
        loss = _losses(run / "log.jsonl")
        if len(loss) > 1:
            losses[run.name] = loss
        previews += [(run.name, who, strips) for who, strips in _previews(run / "previews")]
    order = [*metrics["models"], *sorted(losses)]
    losses = dict(sorted(losses.items(), key=lambda item: order.index(item[0])))
    previews.sort(key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    charts = [(m, line_chart({m: points}, f"training loss of {name_of(m)}", "step")) for m, points in losses.items()]
    return {"losses": charts, "previews": previews}


def _losses(path: Path, points: int = 200) -> list[Point]:
    """The training loss in at most ``points`` averages: single steps are noisy."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # a run that was killed may leave half a line; the trainer cuts it off on resume
            continue
        if "train/loss" in row:
            rows.append((float(row["step"]), float(row["train/loss"])))
    size = max(1, len(rows) // min(points, 40))
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [Point(sum(s for s, _ in c) / len(c), sum(v for _, v in c) / len(c)) for c in chunks if len(c) == size]


def _previews(folder: Path) -> list[tuple[str, list[tuple[int, Markup]]]]:
    """(student or teacher, [(step, strip)]), evenly spread over the run, first and last among them."""
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.glob("*")):
        match = _PREVIEW.fullmatch(path.name)
        if match:
            found[match[1]][int(match[2])] = path
    out = []
    for who, by_step in sorted(found.items()):
        strips = sorted(by_step.items())
        last = len(strips) - 1
        chosen = sorted({round(i * last / max(1, _PREVIEWS_SHOWN - 1)) for i in range(_PREVIEWS_SHOWN)})
        out.append((who, [(strips[i][0], _strip(strips[i][1])) for i in chosen]))
    return out


def _strip(path: Path) -> Markup:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    if picture.height > 128:
        picture.thumbnail((picture.width, 128), Image.Resampling.LANCZOS)
    return _tile(picture)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one table with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
