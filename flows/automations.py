"""``python -m flows.automations``: what Prefect's server is to do by itself. Run when the deployments are registered.

A flow run whose machine died would stay "Running" for ever, and keep the nightly run's only concurrency slot with it:
flow runs say every 30 seconds that they are alive (``[tool.prefect.flows]`` in pyproject.toml), and one of which
``MISSED`` such signs are missing is marked as crashed. One that lives and hangs is ended too, the nightly one alone: a
training by hand may take days.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CancelFlowRun, ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.settings import get_current_settings

NAME = "Mark dead flow runs as crashed"
MISSED = 4
HUNG, HOURS = "Cancel nightly runs that hang", 22
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed")


def dead_runs() -> Automation:
    """Crashes a flow run after whose heartbeat neither another one came nor its end."""
    silence = MISSED * (get_current_settings().flows.heartbeat_frequency or 30)
    return Automation(
        name=NAME,
        description=f"No sign of life for {silence} s.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in _ENDS)},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="its process or machine is gone: no heartbeat")],
    )


def hung_nights() -> Automation:
    """Cancels a nightly run that lives and does not end: it would keep its concepts, and every night after it."""
    return Automation(
        name=HUNG,
        description=f"Not over after {HOURS} hours. Training goes on from its checkpoint the next night.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": ["flow"], "prefect.resource.name": ["dopsd-nightly"]}
            ),
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.Running"},
            expect={f"prefect.flow-run.{state}" for state in _ENDS},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(hours=HOURS),
        ),
        actions=[CancelFlowRun()],
    )


def main() -> None:
    """Create them, or bring the server's up to date."""
    for wanted in (dead_runs(), hung_nights()):
        try:
            known = Automation.read(name=wanted.name)
        except ValueError:
            wanted.create()
            continue
        known.trigger, known.actions, known.description = wanted.trigger, wanted.actions, wanted.description
        known.update()


if __name__ == "__main__":
    main()
