"""Pictures of both web pages after a run, for docs/: a real headless Chromium at the services that `make up` started.

    make up && source .cache/services/env
    prefect deployment run dopsd/train --param concepts='["style-ink"]' --watch
    python benchmarks/screenshots.py            # writes docs/images/prefect-*.png and docs/images/mlflow-*.png

Debian: ``apt-get install chromium-driver``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OUT = ROOT / "docs" / "images"


def main() -> None:
    """Open the pages of a concept's newest version one by one and take their pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", default="style-ink")
    parser.add_argument("--mlflow", default=os.environ.get("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000"))
    parser.add_argument("--prefect", default=os.environ.get("PREFECT_API_URL", "http://127.0.0.1:4200/api"))
    given = parser.parse_args()
    from mlflow import MlflowClient

    from infra.local.logins import PrefectLogin
    from tests.browser import CHROMIUM, DRIVER, browser

    if not (CHROMIUM and DRIVER):
        raise SystemExit("chromium or chromedriver: not found; on Debian: apt-get install chromium-driver")
    client = MlflowClient(given.mlflow)
    newest = client.get_model_version_by_alias(f"dopsd-{given.concept}", "candidate")
    run = client.get_run(newest.run_id)
    experiment = f"{given.mlflow}/#/experiments/{run.info.experiment_id}"
    below = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    method = next(r.info.run_id for r in below if r.data.tags["dopsd.method"] == "d-opsd")
    wanted = {"artifacts": {"key": {"any_": [f"{given.concept}-result"]}}}
    prefect = httpx.Client(auth=PrefectLogin(given.prefect, os.environ["PREFECT_API_AUTH_STRING"]))
    (found,) = prefect.post(f"{given.prefect}/artifacts/latest/filter", json=wanted).raise_for_status().json()
    artifact = found["latest_id"]
    flow_run = run.data.tags["dopsd.flow_run.id"]
    name = prefect.get(f"{given.prefect}/flow_runs/{flow_run}").raise_for_status().json()["name"]
    pages = given.prefect.removesuffix("/api")
    with browser() as page:
        page.log_in_to_prefect(pages, os.environ["PREFECT_API_AUTH_STRING"])
        page.log_in_to_mlflow(
            given.mlflow, ":".join(os.environ[f"MLFLOW_TRACKING_{n}"] for n in ("USERNAME", "PASSWORD"))
        )
        page.open(f"{pages}/runs/flow-run/{flow_run}", name, "Completed", f"tune {given.concept}")
        page.click("Task Runs")
        page.wait("train " + given.concept)
        page.shoot(OUT / "prefect-flow-run.png")
        page.open(f"{pages}/artifacts/artifact/{artifact}", "D-OPSD", "its run")
        page.shoot(OUT / "prefect-artifact.png")
        page.open(f"{experiment}/runs/{run.info.run_id}", "dopsd.flow_run.id")
        page.shoot(OUT / "mlflow-run.png")
        page.open(f"{experiment}/runs/{method}/model-metrics", "preview/student", "images_per_second")
        page.wait_for_pictures(2)
        page.shoot(OUT / "mlflow-charts.png")
        page.open(f"{experiment}/runs/{method}/system-metrics", "cpu_utilization_percentage")
        page.shoot(OUT / "mlflow-system.png")
        page.open(f"{experiment}/runs/{method}/artifacts", "images")
        page.shoot(OUT / "mlflow-artifacts.png")
    print(f"{OUT}/prefect-*.png, mlflow-*.png")


if __name__ == "__main__":
    main()
