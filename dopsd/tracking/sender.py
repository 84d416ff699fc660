"""Compares a run folder with what MLflow has of it, and sends what is missing there.

It can be repeated at any time and keeps no account of its own: what was sent is asked of the server. Numbers by step
are those after the last step that it has; ``sent.json`` among a run's artifacts says which files were sent.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from dopsd.config.groups import TrackingSettings
from dopsd.files import GrowingFile, is_disk_full, now, read_json, whole_file

from .folder import Content, contents, rows
from .server import Refused, connect, tracking_uri, understood

RUN_KEY, SENT = "dopsd.run_key", "sent.json"
KIND = ("mlflow.experimentKind", "custom_model_development")
"""MLflow's word for experiments of runs and not of traces; without it its page guesses, and asks."""
MOST = {"metrics": 1000, "params": 100, "tags": 100}  # of a kind in one call: MLflow's own limits
CHANCES = 3  # so often something of one name may be refused before it is not tried again
FILES_PER_NOTE = 20  # after so many sent.json is written again: as many are sent twice at most, after a kill
PREVIEW_SIDE = 128  # small previews are enlarged to so many pixels of height: MLflow's page shows files as they are
LARGEST = 1.7976931348623157e308  # what MLflow keeps of an infinite number


class _Known:
    """What the server has of a run, as asked once and kept up to date since, and how far the files here were read.
    ``sent``: path of an artifact to the hash of what was sent. ``listed``: folder of artifacts to the paths in it.
    ``compared``: file here to its size and time of change when it was compared."""

    def __init__(self, run: Any) -> None:
        self.run_id, self.started = run.info.run_id, run.info.start_time or 0
        self.status = run.info.status, run.info.end_time
        self.params, self.tags = set(run.data.params), dict(run.data.tags)
        self.data = {found.dataset.digest for found in (run.inputs.dataset_inputs if run.inputs else ())}
        latest = run.data.to_proto().metrics
        self.steps, self.values = {m.key: m.step for m in latest}, {m.key: m.value for m in latest}
        self.sent, self.listed = dict[str, str](), dict[str, set[str]]()
        self.logs, self.compared = dict[Path, GrowingFile](), dict[Path, tuple[int, int]]()


class Comparison:
    """Of the run folder ``run`` with the tracker. ``log`` gets a line for all that a person should know, once."""

    def __init__(self, root: Path, run: Path, settings: TrackingSettings, log: Callable[[str], None]) -> None:
        self.uri = tracking_uri(root)
        self._artifacts = (root / "mlartifacts").resolve().as_uri() if self.uri.startswith("sqlite:") else None
        self._run, self._experiment = run, settings.experiment
        self._log, self._logged, self._known = log, set[str](), dict[str, _Known]()
        self._client: Any = None
        self._experiment_found: str | None = None
        self._refused, self._reasons = Counter[tuple[str, str]](), dict[str, list[str]]()

    def forget(self) -> None:
        """Ask the server anew for all that it has, and for what it refused."""
        self._known.clear()
        self._refused.clear()
        self._experiment_found = None

    def send(self, last: bool) -> None:
        """Send what the server lacks. ``last``: nobody writes the folder now. Raises :class:`~.server.Away`; then some
        of it is still missing there, and the server is to be asked anew (:meth:`forget`)."""
        try:
            found = list(contents(self._run, self.warn))
            for content in found:
                self._send_values(content, last)
            for content in found:  # after all numbers: where artifacts are kept may be away alone
                if content.key in self._known:
                    self._send_files(content, self._known[content.key])
        finally:
            self._report_refusals()

    def warn(self, text: str) -> None:
        """A line for the person at the terminal, once."""
        if text not in self._logged:
            self._logged.add(text)
            self._log(f"tracking: {text}")

    def find(self, key: str) -> Any:
        """The run of ``key`` (a training, or ``training/method``), where the server has one."""
        query = f"tags.`{RUN_KEY}` = '{self._identity()}/{key}'"
        return next(iter(self._call("search_runs", [self._experiment_id()], query)), None)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A call of MLflow's client, which is made in the thread that sends: importing MLflow takes seconds."""
        with understood(self.uri):
            self._client = self._client or connect(self.uri)
            return getattr(self._client, method)(*args, **kwargs)

    def _experiment_id(self) -> str:
        if self._experiment_found is None:
            found = self._call("get_experiment_by_name", self._experiment)
            try:
                made = found or self._call(
                    "create_experiment", self._experiment, artifact_location=self._artifacts, tags=dict([KIND])
                )
            except Refused:  # another process may have made it at this moment
                made = self._call("get_experiment_by_name", self._experiment)
                if made is None:
                    raise
            if found and KIND[0] not in found.tags:  # of before; what a person chose stays
                with suppress(Refused):  # who may add runs may not always change the experiment
                    self._call("set_experiment_tag", found.experiment_id, *KIND)
            self._experiment_found = made if isinstance(made, str) else made.experiment_id
        return self._experiment_found

    def _identity(self) -> str:
        """A name of this run folder's own, so that what was made of it is found again; a new one where it is lost."""
        path = self._run / "tracking" / "id"
        name = path.read_text(errors="replace", encoding="utf-8") if path.exists() else ""
        if not re.fullmatch(r"[0-9a-f]{32}", name):
            name = uuid.uuid4().hex
            with whole_file(path) as partial:
                partial.write_text(name, encoding="utf-8")
        return name

    def _send_values(self, content: Content, last: bool) -> None:
        parent = self._known.get(content.key.partition("/")[0])
        if ("/" in content.key and parent is None) or self._refused[content.key, "run"] >= CHANCES:
            return  # refused, as was said
        parents = {"mlflow.parentRunId": parent.run_id} if "/" in content.key and parent else {}
        try:
            known = self._known.get(content.key) or self._open(content, parents)
        except Refused as refusal:
            self._refuse(content, "run", refusal)
            return
        self._known[content.key] = known
        self._send_notes(content, content.tags | parents, known)
        metrics = self._new_metrics(content, known, last)
        while batch := list(islice(metrics, MOST["metrics"])):
            self._send_batch(content, known, "metrics", batch)
        self._send_status(content, known)

    def _open(self, content: Content, parents: Mapping[str, str]) -> _Known:
        """Find the run of ``content`` on the server, or make it."""
        run = self.find(content.key) or self._call(
            "create_run", self._experiment_id(), start_time=content.status.get("started"), run_name=content.name,
            tags={RUN_KEY: f"{self._identity()}/{content.key}", **parents},
        )  # fmt: skip
        known = _Known(run)
        known.sent = self._read_sent(content, known)
        return known

    def _send_notes(self, content: Content, tags: Mapping[str, str], known: _Known) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        changed = [RunTag(key, value) for key, value in tags.items() if known.tags.get(key) != value]
        self._send_batch(content, known, "tags", changed)
        missing = [Param(key, value) for key, value in content.params.items() if key not in known.params]
        self._send_batch(content, known, "params", missing)
        known.tags |= tags
        known.params |= set(content.params)
        data = {"profile": None, **content.data}
        if data.get("hash") and (digest := data["hash"][:36]) not in known.data:
            dataset = Dataset(data["name"], digest, "local", data["source"], profile=json.dumps(data["profile"]))
            inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
            self._attempt(content, f"data set {data['name']}", "log_inputs", known.run_id, inputs)
            known.data.add(digest)

    def _new_metrics(self, content: Content, known: _Known, last: bool) -> Iterator[Any]:
        """What the server has not got; from here on it counts as what it has."""
        from mlflow.entities import Metric

        for path in content.logs:
            for step, when, values in rows(known.logs.setdefault(path, GrowingFile(path)), self.warn, last):
                for key, value in values.items():
                    if step > known.steps.get(key, -1):
                        known.steps[key] = step
                        yield Metric(key, value, when, step)
        for key, value in content.numbers.items():
            kept = max(min(value, LARGEST), -LARGEST)  # nan stays nan
            if repr(known.values.get(key)) != repr(kept):
                known.values[key] = kept
                yield Metric(key, value, now(), 0)

    def _send_batch(self, content: Content, known: _Known, kind: str, batch: Sequence[Any]) -> None:
        """Send values of one kind in one call; by halves where they are too many, or some of them are refused."""
        batch = [each for each in batch if self._refused[content.key, f"{kind[:-1]} {each.key}"] < CHANCES]
        if batch and len(batch) <= MOST[kind]:
            try:
                self._call("log_batch", known.run_id, **{kind: batch}, synchronous=True)
                return
            except Refused as refusal:
                if len(batch) == 1:
                    self._refuse(content, f"{kind[:-1]} {batch[0].key}", refusal)
                    return
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]) if batch else ():
            self._send_batch(content, known, kind, half)

    def _send_files(self, content: Content, known: _Known) -> None:
        unnoted = 0
        for path, target in content.files:
            try:
                unnoted += self._send_file(content, known, path, target)
            except FileNotFoundError:
                pass  # replaced at this moment: the next comparison sees it
            except (OSError, ValueError) as error:
                if is_disk_full(error):
                    raise
                self.warn(f"{path} cannot be read ({type(error).__name__}); it is left out")
            if unnoted == FILES_PER_NOTE or (unnoted and path == content.files[-1][0]):
                self._attempt(content, f"file {SENT}", "log_dict", known.run_id, known.sent, SENT)
                unnoted = 0

    def _send_file(self, content: Content, known: _Known, path: Path, target: str | tuple[str, int]) -> bool:
        """Whether it was sent."""
        info = path.stat()
        stamp = info.st_size, info.st_mtime_ns
        if known.compared.get(path) == stamp:
            return False
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = target if isinstance(target, str) else _picture_name(*target, known.started, path.suffix)
        folder, what, sent = name.rpartition("/")[0] or None, f"file {name}", False
        if known.sent.get(name) == digest and self._is_listed(content, known, name):
            pass
        elif isinstance(target, str):
            sent = self._attempt(content, what, "log_artifact", known.run_id, str(path), folder)
        else:
            with tempfile.TemporaryDirectory(prefix="dopsd-preview-") as place:
                _write_picture(path, Path(place) / Path(name).name)
                sent = self._attempt(content, what, "log_artifacts", known.run_id, place, folder)
        known.compared[path] = stamp
        if sent:
            known.sent[name] = digest
        return sent

    def _send_status(self, content: Content, known: _Known) -> None:
        status, ended = content.status.get("status"), content.status.get("ended")
        if status == "RUNNING" and known.status[0] != status:
            self._attempt(content, "status", "update_run", known.run_id, status=status)
        elif status in ("FINISHED", "FAILED", "KILLED") and known.status != (status, ended):
            self._attempt(content, "status", "set_terminated", known.run_id, status, ended)
        known.status = (status, ended) if status else known.status

    def _is_listed(self, content: Content, known: _Known, name: str) -> bool:
        folder = name.rpartition("/")[0]
        if folder not in known.listed:
            known.listed[folder] = set()
            try:
                found = self._call("list_artifacts", known.run_id, folder or None)
                known.listed[folder] = {info.path for info in found}
            except Refused as refusal:
                self._refuse(content, "the list of files", refusal)
        return name in known.listed[folder]

    def _read_sent(self, content: Content, known: _Known) -> dict[str, str]:
        """``sent.json``, where there is one; half of one, after an upload that died, has all files sent again, once."""
        with tempfile.TemporaryDirectory(prefix="dopsd-sent-") as place:
            if self._is_listed(content, known, SENT):
                self._attempt(content, f"file {SENT}", "download_artifacts", known.run_id, SENT, place)
            return read_json(Path(place) / SENT)

    def _attempt(self, content: Content, what: str, method: str, *args: Any, **kwargs: Any) -> bool:
        """A call whose refusal is noted and passed over; whether it was taken."""
        try:
            self._call(method, *args, **kwargs)
        except Refused as refusal:
            self._refuse(content, what, refusal)
            return False
        return True

    def _refuse(self, content: Content, what: str, refusal: Refused) -> None:
        self._refused[content.key, what] += 1
        self._reasons.setdefault(str(refusal), []).append(f"{what} of {content.name}")

    def _report_refusals(self) -> None:
        """A line for each reason to refuse; what was named before is not named again."""
        for reason, names in self._reasons.items():
            if new := [name for name in dict.fromkeys(names) if name not in self._logged]:
                self._logged.update(new)
                shown = ", ".join(new[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
                self._log(f"tracking: refused by the tracker: {shown} ({reason}); the rest is sent")
        self._reasons.clear()


def _picture_name(key: str, step: int, started: int, suffix: str) -> str:
    """As ``MlflowClient.log_image`` has it, but always the same: one that is drawn again replaces the first."""
    unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{key}/{step}")
    return f"images/{key.replace('/', '~')}+step+{step}+timestamp+{started + step}+{unique}{suffix}"


def _write_picture(source: Path, target: Path) -> None:
    """A preview as MLflow's page wants it: enlarged where it is small, and a small copy beside."""
    from mlflow.tracking.multimedia import compress_image_size
    from PIL import Image

    with Image.open(source) as picture:
        factor = max(1, PREVIEW_SIDE // picture.height)
        image = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if factor > 1:
        image.save(target, lossless=True)  # which is WebP's word; a PNG always is
    else:
        shutil.copyfile(source, target)
    compress_image_size(image).save(target.with_name(f"{target.stem}+compressed.webp"))
