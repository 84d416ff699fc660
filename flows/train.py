"""Flow ``dopsd``: tune concepts, one task per stage of ``dopsd/stages.py``.

    python -m flows.train --concept style-ink                                             # no server needed
    prefect deployment run dopsd/train --param concepts='["style-ink"]' --watch           # after `make up`

A stage that is up to date by ``dvc.lock`` is not run again, whichever door it was made through. Faults of the machines
are tried again; a bad data set, a bad setting or diverged training fails at once, with its reason.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import flow, get_run_logger, runtime, task
from prefect.futures import wait
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff

from dopsd.config import Settings, load_settings
from dopsd.data.concept import RemoteAway
from dopsd.lock import concept_lock
from dopsd.memory import no_reader, reasons_to_run, remember, remember_data
from dopsd.project import PLAN, run_folder
from dopsd.registry import RegistryAway
from dopsd.stages import STAGES, identify_base, plan
from dopsd.train.errors import LaunchError

from . import artifacts

RETRIES = 3
LOCK_SECONDS = 600.0
"""How long a flow waits for whoever works on the concept: a run that hangs must not keep every night's waiting."""
_HERE = threading.Lock()
"""Held by a stage that works in this process: two bases in memory, or two of them on the same cores, help nobody."""
_ON_RAY = {"train"}
"""Stages whose work Ray does where it is the launcher; it lines jobs up by the resources they ask for."""


_NETWORKED = {"botocore", "httpx", "mlflow", "prefect", "ray", "requests", "sqlalchemy", "urllib3"}
"""Libraries whose errors come from something that is not in this process."""


def is_infrastructure(_task: Any, _run: Any, state: State) -> bool:
    """Whether trying again can help: not where a person's data, settings or training are at fault, or the code is."""
    error = state.result(raise_on_failure=False)
    cause = getattr(error, "cause", None)  # of an error in a task of Ray's, which may be a mistake like any other
    error = cause if isinstance(cause, Exception) else error
    ours = isinstance(error, LaunchError | RegistryAway | RemoteAway) or getattr(error, "away", False)
    theirs = type(error).__module__.partition(".")[0] in _NETWORKED
    return ours or theirs or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError))


def _perform(stage: str, concept: str, settings: Settings, root: str) -> State[Any]:
    """Run one stage where something that it depends on, or its result, is not what ``dvc.lock`` says."""
    reasons = reasons_to_run(stage, concept, Path(root))
    if not reasons and stage == "register" and not _registered(concept, settings, root):
        reasons = ["the registry has no version that was made from this and judged"]
    if not reasons:
        return Completed(name="Reused", message="nothing that it depends on changed")
    get_run_logger().info("%s %s: %s", stage, concept, "; ".join(reasons))
    if stage in _ON_RAY and settings.compute.launcher == "ray":
        STAGES[stage](concept, settings, Path(root))
    else:
        with _HERE:
            STAGES[stage](concept, settings, Path(root))
    remember(stage, Path(root), concept)
    return Completed(message="; ".join(reasons))


STAGE_TASKS = {
    name: task(
        _perform, name=name, task_run_name=f"{name} {{concept}}", description=(stage.__doc__ or "").splitlines()[0],
        retries=RETRIES, retry_delay_seconds=exponential_backoff(backoff_factor=10), retry_jitter_factor=0.3,
        retry_condition_fn=is_infrastructure, persist_result=False, log_prints=True,
    )
    for name, stage in STAGES.items()
}  # fmt: skip


@task(
    name="base", retries=RETRIES, retry_delay_seconds=exponential_backoff(backoff_factor=10),
    retry_condition_fn=is_infrastructure, persist_result=False, log_prints=True,
)  # fmt: skip
def base(settings: Settings, root: str) -> None:
    """Find the base's files, or fetch them, and settle which commit of the hub this run is about."""
    identify_base(settings, Path(root))
    remember("base", Path(root))


@task(name="tune", task_run_name="tune {concept}", persist_result=False)
def tune(concept: str, settings: Settings, root: str) -> str:
    """All stages of one concept, in order; returns which of them were reused."""
    logger = get_run_logger()
    with concept_lock(concept, Path(root), f"flow run {runtime.flow_run.name}", LOCK_SECONDS, logger.info):
        try:
            reused = _run_stages(concept, settings, root)
        except BaseException as error:
            artifacts.faults(concept, error)
            raise
    artifacts.result(concept, settings, Path(root))
    logger.info("%s: reused %s", concept, ", ".join(reused) or "nothing")
    return f"reused: {', '.join(reused) or 'nothing'}"


def _run_stages(concept: str, settings: Settings, root: str) -> list[str]:
    """Run what is not up to date; the names of what is."""
    with no_reader(run_folder(concept, Path(root)) / PLAN, Path(root)):
        plan(concept, settings, Path(root))
    remember("plan", Path(root), concept)
    remember_data(Path(root), concept)
    reused = []
    for stage, perform in STAGE_TASKS.items():
        state = perform(stage, concept, settings, root, return_state=True)
        state.result()
        if state.name == "Reused":
            reused.append(stage)
    return reused


def _name_of_run() -> str:
    return f"tune {', '.join(runtime.flow_run.parameters.get('concepts') or ['all'])}"


def _registered(concept: str, settings: Settings, root: str) -> bool:
    """Whether the registry has it; one that does not answer is asked again by stage register, which is patient."""
    from dopsd.champions import is_registered

    try:
        return is_registered(concept, settings, Path(root))
    except RegistryAway:
        return False


@flow(name="dopsd", flow_run_name=_name_of_run, task_runner=ThreadPoolTaskRunner(max_workers=16), log_prints=True)
def dopsd(
    concepts: list[str] | None = None, overrides: list[str] | None = None, params: str = "params.yaml"
) -> dict[str, str]:
    """Tune concepts of ``data/concepts`` and register what comes out.

    Args:
        concepts: Folders in data/concepts; none means those that params.yaml lists.
        overrides: Settings for this run alone, KEY=VALUE, for example train.max_steps=20.
        params: The settings file.
    """
    settings = load_settings(Path(params), tuple(overrides or ()))
    base(settings, str(Path().resolve()))
    return tune_all(concepts or list(settings.concepts), settings, Path())


def tune_all(concepts: Sequence[str], settings: Settings, root: Path) -> Any:
    """Tune several concepts side by side, on the base that the caller has identified; one that fails does not stop the
    others, but the run fails in the end."""
    _name_flow_run()
    futures = {concept: tune.submit(concept, settings, str(root.resolve())) for concept in concepts}
    wait(list(futures.values()))
    outcomes, failed = {}, []
    for concept, future in futures.items():
        result = future.result(raise_on_failure=False)
        outcomes[concept] = str(result)
        if isinstance(result, BaseException):
            outcomes[concept] = f"failed: {artifacts.one_line(result)}"
            failed.append(concept)
    message = "; ".join(f"{concept}: {text}" for concept, text in outcomes.items())
    return Failed(message=message, data=outcomes) if failed else Completed(message=message, data=outcomes)


def _name_flow_run() -> None:
    """Let the tracker say which flow run a training belongs to (dopsd/origin.py reads it)."""
    url = runtime.flow_run.ui_url
    if url:
        os.environ["DOPSD_FLOW_RUN_URL"] = url
    if runtime.flow_run.id:
        os.environ["DOPSD_FLOW_RUN_ID"] = str(runtime.flow_run.id)


def main(
    concept: Annotated[
        list[str] | None, typer.Option("--concept", "-c", help="A folder in data/concepts; none: all of params.yaml.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting for this run, KEY=VALUE.", metavar="KEY=VALUE")
    ] = None,
    params: Annotated[str, typer.Option("--params", help="The settings.")] = "params.yaml",
) -> None:
    """Run the flow in this process, with the Prefect server in PREFECT_API_URL or one of its own for the while."""
    state = dopsd(concepts=concept, overrides=overrides, params=params, return_state=True)
    raise typer.Exit(0 if state.is_completed() else 1)


if __name__ == "__main__":
    typer.run(main)
