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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from dopsd.files import whole_file

from .charts import Point, line_chart, steps_chart
from .draws import Key
from .grids import read_tiles
from .naming import REFERENCES, SCORES, color_of, name_of, prompts_described, teacher_described
from .prompts import KEPT, KNOWN, NEAR
from .summary import METRICS, PROMPTS
from .table import columns_of, headline_columns, headline_rows, rows_of
from .verdict import answers, main_model, verdict

__all__ = ["ReportError", "write_report"]

_TEMPLATE = "report.html.j2"
_CURVES = ("likeness", "style", "cosine", "concept_top1", "sharpness")
_PREVIEW = re.compile(r"(student|teacher)-(\d+)\.(?:webp|png)")  # png: of runs before 30 November 2026
_PREVIEWS_SHOWN = 6
_PAIRS_SHOWN = 8
_COLUMNS = 8
"""Prompts of a grid."""

Grid = tuple[list[str], list[tuple[str, list[Markup | None]]]]


class ReportError(ValueError):
    """Something that the report needs is missing; says which stage makes it."""


def write_report(evaluation: Path, training: Path, data: Mapping[str, Any], out: Path) -> Path:
    """Write the page to ``out`` from ``evaluation/`` and, where it is there, ``train/<method>/``.

    ``data``: what stage validate found (``content_hash``, ``holdout_images``, ...). Raises :class:`ReportError`.
    """
    metrics = _read_json(evaluation / METRICS)
    pictures = _Pictures(evaluation, metrics)
    head, sentences = verdict(metrics)
    page = _environment().get_template(_TEMPLATE).render(
        metrics=metrics,
        prompts_line=prompts_described(metrics),
        teacher_line=teacher_described(metrics),
        data=data,
        main=main_model(metrics),
        headline=head,
        sentences=sentences,
        answers=answers(metrics),
        side=pictures.side(),
        grids=[grid for noise in (0, 1) if (grid := pictures.grid("concept", noise, _COLUMNS))[1]],
        known_grid=pictures.grid(KNOWN, 0, _COLUMNS),
        lost=[pairs for noise in (0, 1) if (pairs := pictures.pairs(KEPT, noise))],
        near=pictures.pairs(NEAR),
        copies=pictures.copies(_PAIRS_SHOWN),
        shown=_PAIRS_SHOWN,
        headline_table=(headline_columns(metrics), headline_rows(metrics)),
        tables={split: (columns_of(metrics, split), rows_of(metrics, split)) for split in metrics["scores"]},
        charts=_charts(evaluation / "few_step.csv", metrics),
        steps_rows=pictures.steps(),
        index=pictures.index,
        targets=pictures.targets(),
        training=_training(training, metrics),
        settings=_flat(pictures.index["settings"]),
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


def _address(path: Path) -> Markup:
    """A picture's file as a ``data:`` address."""
    kind = path.suffix.removeprefix(".")
    return Markup(f"data:image/{kind};base64," + base64.b64encode(path.read_bytes()).decode())


# --- pictures ---------------------------------------------------------------------------------------------------------


class _Pictures:
    """The samples' small copies, and what was found of them prompt by prompt."""

    def __init__(self, evaluation: Path, metrics: Mapping[str, Any]) -> None:
        self.index = _read_json(evaluation / "samples" / "index.json")
        self._by_prompt = _read_json(evaluation / PROMPTS)
        self._tiles = read_tiles(evaluation / "samples", self.index)
        self._few, self._models = metrics["few_steps"], metrics["models"]
        self._main = main_model(metrics)

    def side(self) -> int:
        """How wide a picture of a grid is shown, in pixels: small ones at twice their size."""
        with Image.open(next(iter(next(iter(self._tiles.values())).values()))) as image:
            return 112 if max(image.size) <= 128 else 208

    def one(self, key: Key, row: int) -> Markup | None:
        """A picture's address, where it was kept."""
        path = self._tiles.get(key, {}).get(row)
        return None if path is None else _address(path)

    def grid(self, split: str, noise: int, count: int) -> Grid:
        """Prompts and rows (model, pictures) of one split; what was edited and the truth first."""
        keys = [Key(split, "reference", 0), Key(split, "real", 0),
                *(Key(split, model, self._few, noise) for model in self._models)]  # fmt: skip
        prompts = self.index["prompts"].get(split, [])[:count]
        rows = [(key.model, [self.one(key, row) for row in range(len(prompts))]) for key in keys if key in self._tiles]
        return prompts, rows

    def steps(self) -> tuple[list[int], list[tuple[str, list[Markup | None]]]]:
        """The first prompt at every number of steps, model by model."""
        steps = sorted({key.steps for key in self._tiles if key.split == "concept" and key.steps > 0})
        rows = [(model, [self.one(Key("concept", model, number), 0) for number in steps]) for model in self._models]
        return steps, [(model, pictures) for model, pictures in rows if all(pictures)]

    def pairs(self, split: str, noise: int = 0) -> list[dict[str, Any]]:
        """Base and main model, prompt by prompt, what kept least first."""
        found = self._by_prompt.get(split, {}).get(str(self._main), {}).get(str(noise), {}).get("kept", [])
        order = sorted(range(len(found)), key=lambda row: found[row])
        return [self._pair(split, noise, row, f"{100 * found[row]:.0f} %".replace("-", "−")) for row in order]

    def copies(self, count: int) -> list[dict[str, Any]]:
        """The main model's pictures that are most like a training picture, beside that one."""
        found = self._by_prompt.get("concept", {}).get(str(self._main), {}).get("0", {})
        copy, nearest = found.get("copy", []), found.get("nearest", [])
        order = sorted(range(len(copy)), key=lambda row: -copy[row])[:count]
        prompts = self.index["prompts"]["concept"]
        return [
            {
                "prompt": prompts[row], "value": f"{copy[row]:.2f}",
                "before": self.one(Key("training", "real", 0), int(nearest[row])),
                "after": self.one(Key("concept", str(self._main), self._few), row),
            }
            for row in order
        ]  # fmt: skip

    def targets(self) -> list[Markup]:
        """The training pictures."""
        files = self._tiles.get(Key("training", "real", 0), {})
        return [_address(files[row]) for row in sorted(files)]

    def _pair(self, split: str, noise: int, row: int, value: str) -> dict[str, Any]:
        before, after = (self.one(Key(split, model, self._few, noise), row) for model in ("base", str(self._main)))
        return {"prompt": self.index["prompts"][split][row], "value": value, "before": before, "after": after}


# --- curves -----------------------------------------------------------------------------------------------------------


def _charts(path: Path, metrics: Mapping[str, Any]) -> list[tuple[str, str, Markup]]:
    """(title, explanation, chart) for every score that is worth a curve."""
    curves: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            low, high = (float(row[key]) if row[key] else None for key in ("low", "high"))
            curves[row["metric"]][row["model"]].append(Point(float(row["steps"]), float(row["value"]), low, high))
    keys = [key for key in _CURVES if key in curves]
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
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one table with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
