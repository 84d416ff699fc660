"""What MLflow is told, and how: the only place that speaks to it. Every call here may raise when the server is away.

Sending a record twice does no harm: a metric is one row per (run, key, step, time, value), parameters and tags are set
to the same value, artifacts overwrite themselves, runs and preview pictures are looked for before they are made.
"""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from .spool import Record, Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_KEY = "dopsd.run_key"
METRICS_PER_CALL = 1000  # MLflow's own limit
PARAMS_PER_CALL = 100
PARAM_LENGTH = 6000


def tracking_uri(root: Path) -> str:
    """``MLFLOW_TRACKING_URI``, or a SQLite file in ``root``."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve()}/mlflow.db"


def without_secrets(text: str, uri: str) -> str:
    """``text`` without the user and password of ``uri``."""
    try:
        userinfo, at, _ = urlsplit(uri).netloc.rpartition("@")
    except ValueError:
        return text.replace(uri, "the tracker")
    if not at:
        return text
    for secret in (userinfo + "@", userinfo, userinfo.partition(":")[2]):
        text = text.replace(secret, "") if secret else text
    return text


def public_uri(uri: str) -> str:
    """The tracker's address as it may be shown: no user, password or query."""
    if uri.startswith("sqlite:"):
        return uri
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def connect(uri: str) -> MlflowClient:
    """A client for ``uri`` that fails soon: waiting is the sender's business, not MLflow's."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
    ):
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


class Server:
    """Delivers records to one MLflow server, for one spool."""

    def __init__(self, uri: str, experiment: str, artifacts: Path, spool: Spool) -> None:
        self.uri, self.experiment, self.artifacts, self.spool = uri, experiment, artifacts, spool
        self._client: MlflowClient | None = None
        self._runs: dict[str, str] = {}

    @property
    def client(self) -> MlflowClient:
        """Made at first use, in the thread that sends: importing MLflow takes seconds."""
        if self._client is None:
            self._client = connect(self.uri)
        return self._client

    def forget(self) -> None:
        """Look runs up anew: after a failure the server may be another one, or may have lost them."""
        self._runs.clear()

    def metrics(self, records: Sequence[Record]) -> None:
        """Deliver metric records of one run in as few calls as MLflow allows."""
        from mlflow.entities import Metric

        rows = [Metric(key, value, r["time"], r["step"]) for r in records for key, value in r["values"].items()]
        for start in range(0, len(rows), METRICS_PER_CALL):
            self._call(records[0], metrics=rows[start : start + METRICS_PER_CALL])

    def deliver(self, record: Record) -> None:
        """Deliver any other record."""
        getattr(self, f"_{record['kind']}")(record)

    def _call(self, record: Record, **batch: Any) -> None:
        self.client.log_batch(self._run(record), synchronous=True, **batch)

    def _run(self, record: Record) -> str:
        """The id of the record's run on the server; made there if it is not."""
        key = record["run"]
        if key not in self._runs:
            self._runs[key] = self.find(key) or self._create(key, record.get("about") or {})
        return self._runs[key]

    def find(self, key: str) -> str | None:
        """The id of the run of ``key`` (a training, or ``training/method``), where the server has one."""
        found = self.client.search_runs([self._experiment()], f"tags.`{RUN_KEY}` = '{self.spool.id}/{key}'")
        return found[0].info.run_id if found else None

    def _create(self, key: str, about: Mapping[str, Any]) -> str:
        tags = {RUN_KEY: f"{self.spool.id}/{key}"}
        if "/" in key:  # one method of a training: below the training's own run
            tags["mlflow.parentRunId"] = self._run({"run": key.partition("/")[0], "about": about.get("parent")})
        return self.client.create_run(
            self._experiment(), start_time=about.get("time"), tags=tags, run_name=about.get("name", key)
        ).info.run_id

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        if found is not None:
            return found.experiment_id
        local = self.artifacts.resolve().as_uri() if self.uri.startswith("sqlite:") else None
        return self.client.create_experiment(self.experiment, artifact_location=local)

    # --- one method for each kind of record ---

    def _start(self, record: Record) -> None:
        self.client.update_run(self._run(record), status="RUNNING")
        self._tags(record)

    def _tags(self, record: Record) -> None:
        from mlflow.entities import RunTag

        self._call(record, tags=[RunTag(key, value) for key, value in record["values"].items()])

    def _params(self, record: Record) -> None:
        from mlflow.entities import Param

        rows = [Param(key, value) for key, value in record["values"].items()]
        for start in range(0, len(rows), PARAMS_PER_CALL):
            self._call(record, params=rows[start : start + PARAMS_PER_CALL])

    def _dataset(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(record["name"], record["hash"][:36], "local", record["source"], profile=record["profile"])
        self.client.log_inputs(
            self._run(record), [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        )

    def _image(self, record: Record) -> None:
        """As ``MlflowClient.log_image`` lays images out, but under a name that a second try writes over: an upload that
        died halfway leaves neither two of them nor half a one."""
        from mlflow.tracking.multimedia import compress_image_size
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
        from PIL import Image

        run = self._run(record)
        unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{self.spool.id}/{record['file']}")
        key = record["key"].replace("/", "~")
        name = f"{key}+step+{record['step']}+timestamp+{record['time']}+{unique}"
        with Image.open(self.spool.file(record["file"])) as image, tempfile.TemporaryDirectory() as folder:
            image.save(Path(folder) / f"{name}.png")
            compress_image_size(image).save(Path(folder) / f"{name}+compressed.webp")
            self.client.log_artifacts(run, folder, "images")
        self.client.set_tag(run, MLFLOW_LOGGED_IMAGES, True)

    def _artifact(self, record: Record) -> None:
        self.client.log_artifact(self._run(record), str(self.spool.file(record["file"])), record["folder"] or None)

    def _end(self, record: Record) -> None:
        self.client.set_terminated(self._run(record), record["status"], record["time"])


def is_rejection(error: Exception) -> bool:
    """Whether the tracker understood and refused (HTTP 400), as against being away, busy or closed to us."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.get_http_status_code() == 400
