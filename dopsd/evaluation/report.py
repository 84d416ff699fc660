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
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from dopsd.files import whole_file

from .charts import Point, line_chart, steps_chart
from .draws import Key
from .grids import read_tiles, reduced
from .naming import REFERENCES, SCORES, color_of, main_model, name_of, prompts_described, teacher_described
from .prompts import KEPT, KNOWN, NEAR
from .summary import METRICS, PROMPTS
from .table import (
    LEARNT_COLUMNS,
    LOST_COLUMNS,
    MARKS,
    columns_of,
    headline_columns,
    headline_rows,
    labels_of,
    published_table,
    rows_of,
    titled,
)
from .verdict import answers, left_of, verdict

__all__ = ["ReportError", "write_report"]

_TEMPLATE = "report.html.j2"
_CURVES = ("likeness", "style", "cosine", "concept_top1", "sharpness")
_PREVIEW = re.compile(r"(student|teacher)-(\d+)\.(?:webp|png)")  # png: of runs before 30 November 2026
_PREVIEWS_SHOWN = 6
_MORE_SHOWN = 24
"""Of the pairs that are not the worst, and of the training pictures: a page has a size."""
_COPIES_SHOWN = 4
_SMALL = 128
"""Up to this side pictures are shown at twice their size, many of them in a row."""
_STRIP = 160
"""The height of a large preview."""
_THUMBNAIL = 256
"""The side of what is there for completeness."""


@dataclass(frozen=True)
class _Shown:
    """A picture on the page. ``shape``: width over height."""

    id: str
    address: Markup
    shape: float

    @property
    def wide(self) -> float:
        """Its width as a multiple of a square's of the same area; very long ones are shown smaller."""
        return float(min(max(self.shape**0.5, 0.5), 1.5))


@dataclass(frozen=True)
class _Grid:
    """``rows``: (model, pictures), one for each of ``prompts``. ``wide``: of each column, as of a picture."""

    prompts: list[str]
    rows: list[tuple[str, list[_Shown | None]]]

    @property
    def wide(self) -> list[float]:
        columns = zip(*(pictures for _, pictures in self.rows), strict=True)
        return [max((picture.wide for picture in column if picture), default=1.0) for column in columns]


class ReportError(ValueError):
    """Something that the report needs is missing; says which stage makes it."""


def write_report(evaluation: Path, training: Path, data: Mapping[str, Any], out: Path) -> Path:
    """Write the page to ``out`` from ``evaluation/`` and, where it is there, ``train/<method>/``.

    ``data``: what stage validate found (``content_hash``, ``holdout_images``, ...). Raises :class:`ReportError`.
    """
    metrics = _read_json(evaluation / METRICS)
    pictures = _Pictures(evaluation, metrics)
    head, sentences = verdict(metrics)
    shown = 8 if pictures.small else 6
    page = _environment().get_template(_TEMPLATE).render(
        metrics=metrics,
        prompts_line=prompts_described(metrics),
        teacher_line=teacher_described(metrics),
        data=data,
        main=main_model(metrics),
        headline=head,
        sentences=sentences,
        answers=answers(metrics),
        small=pictures.small,
        grids=[grid for noise in (0, 1) if (grid := pictures.grid("concept", noise, shown)).rows],
        known_grid=pictures.grid(KNOWN, 0, shown),
        lost=[pairs for noise in (0, 1) if (pairs := pictures.pairs(KEPT, noise, shown))],
        more_lost=pictures.pairs(KEPT, 0, _MORE_SHOWN, first=shown, side=_THUMBNAIL),
        near=pictures.pairs(NEAR, 0, shown),
        copies=pictures.copies(_COPIES_SHOWN),
        more_copies=pictures.copies(_MORE_SHOWN, first=_COPIES_SHOWN, side=_THUMBNAIL),
        headlines={
            name: (headline_columns(metrics, keys), headline_rows(metrics, keys))
            for name, keys in (("learnt", LEARNT_COLUMNS), ("lost", LOST_COLUMNS))
        },
        tables={split: (columns_of(metrics, split), rows_of(metrics, split)) for split in metrics["scores"]},
        charts=_charts(evaluation / "few_step.csv", metrics),
        steps_grid=pictures.steps(),
        index=pictures.index,
        targets=pictures.targets(_MORE_SHOWN),
        training=_training(training, metrics),
        settings=_flat(pictures.index["settings"]),
        published=published_table(metrics),
        scores=SCORES,
        shown_scores={key for models in metrics["scores"].values() for found in models.values() for key in found},
        labels=labels_of(metrics),
        marks=MARKS,
    )  # fmt: skip
    with whole_file(out) as partial:
        partial.write_text(page, encoding="utf-8")
    return out


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "name": name_of,
        "color": color_of,
        "unbroken": lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%"),
    }
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


# --- pictures ---------------------------------------------------------------------------------------------------------


class _Pictures:
    """The samples' small copies, and what was found of them prompt by prompt."""

    def __init__(self, evaluation: Path, metrics: Mapping[str, Any]) -> None:
        self.index = _read_json(evaluation / "samples" / "index.json")
        self._by_prompt = _read_json(evaluation / PROMPTS)
        try:
            self._tiles = read_tiles(evaluation / "samples", self.index)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            where = evaluation / "samples" / "index.json"
            raise ReportError(f"{where}: no index of samples ({error}); run stage evaluate again") from None
        self._few, self._models = metrics["few_steps"], metrics["models"]
        self._main = main_model(metrics) or ""
        self._ids = count()

    @property
    def small(self) -> bool:
        """Whether the base draws pictures of few pixels."""
        first = min(self._tiles[Key("concept", "base", self._few)].values())
        with Image.open(first) as image:
            return max(image.size) <= _SMALL

    def one(self, key: Key, row: int, side: int | None = None) -> _Shown | None:
        """A picture where it was kept, as it was or with no side above ``side``."""
        path = self._tiles.get(key, {}).get(row)
        if path is None:
            return None
        with Image.open(path) as image:
            shape, large = image.width / image.height, side is not None and max(image.size) > side
            address = _smaller(image, side) if large and side else _inlined(path.suffix[1:], path.read_bytes())
        return _Shown(f"picture-{next(self._ids)}", address, shape)

    def grid(self, split: str, noise: int, most: int) -> _Grid:
        """At most so many prompts of one split that were drawn from this seed; what was edited and the truth first."""
        keys = [Key(split, "reference", 0), Key(split, "real", 0),
                *(Key(split, model, self._few, noise) for model in self._models)]  # fmt: skip
        drawn = min(most, len(self._tiles.get(Key(split, "base", self._few, noise), {})))
        rows = [
            (key.model, [self.one(key, row) for row in range(drawn)]) for key in keys if drawn and key in self._tiles
        ]
        return _Grid(self.index["prompts"].get(split, [])[:drawn], rows)

    def steps(self) -> _Grid:
        """The first prompt at every number of steps, model by model."""
        steps = sorted({key.steps for key in self._tiles if key.split == "concept" and key.steps > 0})
        rows = [(m, [self.one(Key("concept", m, k), 0, _THUMBNAIL) for k in steps]) for m in self._models]
        labels = [f"{number} step{'s' if number > 1 else ''}" for number in steps]
        return _Grid(labels, [(model, pictures) for model, pictures in rows if all(pictures)])

    def pairs(self, split: str, noise: int, most: int, first: int = 0, side: int | None = None) -> list[dict[str, Any]]:
        """Base and main model, prompt by prompt, what kept least first: ``most`` of them from place ``first`` on."""
        found = self._by_prompt.get(split, {}).get(self._main, {}).get(str(noise), {}).get("kept", [])
        order = sorted(range(len(found)), key=lambda row: found[row])[first : first + most]
        return [
            {
                "prompt": self.index["prompts"][split][row], "value": left_of(found[row]),
                "pictures": [self.one(Key(split, m, self._few, noise), row, side) for m in ("base", self._main)],
            }
            for row in order
        ]  # fmt: skip

    def copies(self, most: int, first: int = 0, side: int | None = None) -> list[dict[str, Any]]:
        """The main model's pictures beside the training picture nearest to each, the most alike first: ``most`` of them
        from place ``first`` on."""
        found = self._by_prompt.get("concept", {}).get(self._main, {}).get("0", {})
        copy, nearest = found.get("copy", []), found.get("nearest", [])
        return [
            {
                "prompt": self.index["prompts"]["concept"][row], "value": f"{copy[row]:.2f}",
                "pictures": [self.one(Key("training", "real", 0), int(nearest[row]), side),
                             self.one(Key("concept", self._main, self._few), row, side)],
            }
            for row in sorted(range(len(copy)), key=lambda row: -copy[row])[first : first + most]
        ]  # fmt: skip

    def targets(self, most: int) -> list[_Shown | None]:
        """The first training pictures."""
        key = Key("training", "real", 0)
        return [self.one(key, row, _THUMBNAIL) for row in sorted(self._tiles.get(key, {}))[:most]]


def _inlined(kind: str, content: bytes) -> Markup:
    """A picture's file as a ``data:`` address."""
    return Markup(f"data:image/{kind};base64," + base64.b64encode(content).decode())


def _smaller(image: Image.Image, side: int) -> Markup:
    """A copy of a large picture, as a ``data:`` address."""
    buffer = io.BytesIO()
    reduced(image.convert("RGB"), side).save(buffer, "WEBP", quality=85)
    return _inlined("webp", buffer.getvalue())


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
            charts.append((titled(metrics, key, SCORES[key].label), SCORES[key].meaning, chart))
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
        if image.height > _SMALL:
            return _smaller(image, round(image.width / image.height * _STRIP) if image.width > image.height else _STRIP)
    return _inlined(path.suffix[1:], path.read_bytes())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one table with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
