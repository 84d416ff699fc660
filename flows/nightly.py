"""Flow ``dopsd-nightly``: tune again what changed since its champion was made, and say why for every concept.

    prefect deployment run dopsd-nightly/nightly --watch        # by itself every night, after `make up`
    python -m flows.nightly                                     # now, without a server

A concept is due when its data, the settings, the base model or the method differ from those its champion was made from.
The rest is skipped in seconds. One that fails does not stop the others; the run fails in the end if any did.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.states import Failed
from prefect.task_runners import ThreadPoolTaskRunner

from dopsd.champions import reasons_to_train
from dopsd.config import Settings, load_settings
from dopsd.data.concept import pull_missing
from dopsd.project import read_concept

from . import artifacts
from .train import RETRIES, base, is_infrastructure, tune_all


@task(
    name="due", task_run_name="is {concept} due", retries=RETRIES, retry_delay_seconds=30,
    retry_condition_fn=is_infrastructure, persist_result=False,
)  # fmt: skip
def due(concept: str, settings: Settings, root: str) -> list[str]:
    """Why a concept is to be tuned; empty where it is not. Missing data is pulled first."""
    if pull_missing(Path(root), concept):
        get_run_logger().info("%s: its data was pulled from the remote", concept)
    try:
        table, _ = read_concept(concept, settings, Path(root))
    except Exception as error:
        artifacts.faults(concept, error)
        raise
    return reasons_to_train(concept, table, settings, Path(root))


@flow(name="dopsd-nightly", flow_run_name="nightly", task_runner=ThreadPoolTaskRunner(max_workers=16), log_prints=True)
def nightly(concepts: list[str] | None = None, overrides: list[str] | None = None, params: str = "params.yaml") -> Any:
    """Tune every concept that is due.

    Args:
        concepts: Folders in data/concepts; none means those that params.yaml lists.
        overrides: Settings for this run alone, KEY=VALUE.
        params: The settings file.
    """
    logger = get_run_logger()
    settings = load_settings(Path(params), tuple(overrides or ()))
    root = Path().resolve()
    base(settings, str(root))  # a branch on the hub may mean another commit tonight
    decisions: dict[str, str] = {}
    to_tune, broken = [], []
    for concept in concepts or list(settings.concepts):
        answer = due(concept, settings, str(root), return_state=True).result(raise_on_failure=False)
        if isinstance(answer, BaseException):
            broken.append(concept)
            decisions[concept] = f"broken: {artifacts.one_line(answer)}"
        elif answer:
            to_tune.append(concept)
            decisions[concept] = f"tuned: {', '.join(answer)}"
        else:
            decisions[concept] = "skipped: nothing changed since its version was judged"
        logger.info("%s: %s", concept, decisions[concept])
    state = tune_all(to_tune, settings, root) if to_tune else None
    outcome = state.data if state is not None else {}
    create_table_artifact(
        [{"concept": c, "decision": d, "outcome": outcome.get(c, "")} for c, d in decisions.items()],
        key="nightly", description="What was tuned tonight, and why",
    )  # fmt: skip
    if broken or (state is not None and state.is_failed()):
        return Failed(message="; ".join(f"{c}: {outcome.get(c, d)}" for c, d in decisions.items()), data=decisions)
    return decisions


if __name__ == "__main__":
    final = nightly(return_state=True)
    raise typer.Exit(0 if final.is_completed() else 1)
