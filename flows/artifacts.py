"""What a flow run leaves to read in Prefect's pages: the before-and-after table, links, and every fault of the data."""

from __future__ import annotations

import json
import os
from pathlib import Path

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from dopsd.config import Settings
from dopsd.data.manifest import DataError
from dopsd.evaluation.table import table_as_text
from dopsd.evaluation.verdict import verdict
from dopsd.project import run_folder
from dopsd.tracking import public_uri, tracking_uri


def result(concept: str, settings: Settings, root: Path) -> None:
    """The before-and-after table of a concept, what became of its version, and where the rest is."""
    run = run_folder(concept, root)
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    columns, rows = table_as_text(metrics)
    headline, sentences = verdict(metrics)
    lines = [f"# {concept}", "", f"**{headline}**", "", *(f"- {sentence}" for sentence in sentences), ""]
    lines += [_row(columns), _row(["---"] * len(columns)), *(_row(row) for row in rows), ""]
    lines += _links(run, settings, root)
    create_markdown_artifact("\n".join(lines), key=_key(concept, "result"), description=f"{concept}: before and after")


def faults(concept: str, error: BaseException) -> None:
    """Every fault of a data set as a table; nothing for other errors."""
    if isinstance(error, DataError):
        table = [
            {"file": f.file, "row": f.row if f.row is not None else "", "column": f.column or "", "problem": f.problem}
            for f in error.faults
        ]
        create_table_artifact(table, key=_key(concept, "faults"), description=f"{concept}: what is wrong with its data")


def one_line(error: BaseException) -> str:
    """An error for a summary."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    more = len(error.faults if isinstance(error, DataError) else lines) - 1
    return lines[0][:200] + (f" (and {more} more)" if more > 0 else "")


def _links(run: Path, settings: Settings, root: Path) -> list[str]:
    registered = run / "registered.json"
    version = json.loads(registered.read_text(encoding="utf-8")) if registered.exists() else {}
    uri = os.environ.get("DOPSD_MLFLOW_UI_URL") or public_uri(tracking_uri(root))  # a browser may call it otherwise
    lines = []
    if version:
        state = "champion" if version["promoted"] else "candidate"
        lines.append(f"- registered as `{version['name']}` version {version['version']} ({state}): {version['reason']}")
    if uri.startswith("http") and version:
        lines.append(f"- [the version in MLflow]({uri}/#/models/{version['name']}/versions/{version['version']})")
        runs, side = f"{uri}/#/experiments/{version['experiment_id']}", "?workflowType=machine_learning"
        lines.append(f"- [its run]({runs}/runs/{version['run_id']}{side}), [all runs]({runs}{side})")
    elif version:
        lines.append(f"- tracker: {uri} (`make ui` opens it), run `{version['run_id']}`")
    return [*lines, f"- the page with pictures: `{(run / 'report.html').relative_to(root)}`"]


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _key(concept: str, what: str) -> str:
    """Prefect's keys are lower-case letters, digits and dashes."""
    return f"{concept}-{what}".lower().replace("_", "-")
