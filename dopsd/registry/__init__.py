"""Registered adapters: each one a version of the model ``dopsd-<concept>``, the best of them its champion.

A version carries what it was made from and its mean scores as tags, its scores per prompt as a file, and all it takes
to draw with it: a fresh process needs the registry alone (:mod:`.serving`). Every new version is ``@candidate``;
:mod:`.gate` says whether it also becomes ``@champion``. ``@anchor`` is the champion that no later one may fall behind.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopsd.files import disk_full, is_disk_full
from dopsd.identity import VersionIdentity
from dopsd.tracking import connect, tracking_uri, without_secrets

from .gate import About, Values, Verdict, described, in_short, judge

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["ANCHOR", "CHAMPION", "Anchor", "Entry", "Outcome", "Registry", "RegistryAway", "Verdict", "judge",
           "model_name"]  # fmt: skip

CANDIDATE, CHAMPION, ANCHOR = "candidate", "champion", "anchor"
_MADE, _SCORES, _GATE, _ASKED, _ANCHOR = "dopsd.made.", "dopsd.scores", "dopsd.gate", "dopsd.asked", "dopsd.anchor"
_FILE, _LARGEST = "scores.json", 16 * 2**20
_DESCRIPTION, _RUN_NAME = 4900, 250
"""Characters of a description, where MLflow takes 5,000, and of a run's name in its database."""
_SERVING = Path(__file__).with_name("serving.py")
_NEEDS = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pillow", "mlflow")


class RegistryAway(RuntimeError):
    """The registry does not answer; what was to be registered is still there, and can be registered later."""


@dataclass(frozen=True)
class Outcome:
    """What became of a registration."""

    name: str
    version: str
    promoted: bool
    reason: str
    run_id: str
    experiment_id: str


@dataclass(frozen=True)
class Anchor:
    """The version that no champion may fall behind while ``ground`` stays, and by how much it may be below, score by
    score. ``version``: ``""`` is the one that is being registered."""

    version: str
    ground: str
    deltas: Mapping[str, float]


@dataclass(frozen=True)
class Entry:
    """How a version scored. ``asked``: hash of the questions; ``scores``: what there is; ``values``: its own, per
    prompt; ``file``: all of this and the base's, which is stored with it."""

    asked: str
    scores: About
    values: Values
    file: Path

    @property
    def means(self) -> dict[str, float]:
        """By the names that they have everywhere in the tracker."""
        return {f"score/{score}": sum(seeds["first"]) / len(seeds["first"]) for score, seeds in self.values.items()}


def model_name(concept: str) -> str:
    """The registered model of a concept."""
    return f"dopsd-{concept}"


class Registry:
    """The model registry of one tracking server (``MLFLOW_TRACKING_URI``, or the SQLite file in ``root``)."""

    def __init__(self, root: Path) -> None:
        self.uri = tracking_uri(root)
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """Made at first use: importing MLflow takes seconds."""
        if self._client is None:
            self._client = connect(self.uri)
        return self._client

    def holder(self, concept: str, alias: str) -> tuple[ModelVersion, VersionIdentity] | None:
        """The version that has ``alias``, and what it was made from; ``None`` where there is none."""
        found = self._alias(model_name(concept), alias)
        return (found, _identity_of(found)) if found else None

    def champion(self, concept: str) -> tuple[ModelVersion, VersionIdentity] | None:
        """The champion's version and what it was made from; ``None`` where there is none."""
        return self.holder(concept, CHAMPION)

    def anchor(self, concept: str) -> Anchor | None:
        """What was noted of the anchor when it was set; ``None`` where nothing was, or nothing that can be read. Where
        a person has moved the alias since, it is of another version."""
        with self._answers():
            models = self.client.search_registered_models(f"name='{model_name(concept)}'")
        try:
            noted = json.loads(models[0].tags[_ANCHOR])
            deltas = {str(score): float(delta) for score, delta in noted["deltas"].items()}
            if not all(math.isfinite(delta) and delta >= 0 for delta in deltas.values()):
                return None
            return Anchor(str(noted["version"]), str(noted["ground"]), deltas)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            return None

    def scores(self, version: ModelVersion, asked: str, folder: Path) -> Path | None:
        """Fetch how a version scored, where that was asked ``asked``; ``None`` where it was not, or has no such file of
        a reasonable size."""
        from mlflow.artifacts import download_artifacts, list_artifacts

        if version.tags.get(_ASKED) != asked:
            return None
        with self._answers():
            source = f"{version.source}/artifacts"
            stored = {Path(file.path).name: file.file_size for file in list_artifacts(source, tracking_uri=self.uri)}
            if not 0 < (stored.get(_FILE) or 0) <= _LARGEST:
                return None
            return Path(download_artifacts(f"{source}/{_FILE}", dst_path=str(folder), tracking_uri=self.uri))

    def judged(self, concept: str, identity: VersionIdentity) -> bool:
        """Whether a version made from just this was judged already, whatever came of it."""
        with self._answers():
            versions = self.client.search_model_versions(f"name='{model_name(concept)}'")
        return any(_identity_of(version) == identity and _GATE in version.tags for version in versions)

    def adapter(self, version: ModelVersion, folder: Path) -> Path | None:
        """Fetch a version's adapter, as diffusers reads it: the one that is served. Returns its file, or the folder of
        a trained transformer; ``None`` where somebody deleted it."""
        from mlflow.artifacts import download_artifacts, list_artifacts

        with self._answers():
            source = f"{version.source}/artifacts"
            stored = {Path(file.path).name for file in list_artifacts(source, tracking_uri=self.uri)}
            name = next((name for name in ("adapter", "adapter.safetensors") if name in stored), None)
            if name is None:
                return None
            folder.mkdir(parents=True, exist_ok=True)
            return Path(download_artifacts(f"{source}/{name}", dst_path=str(folder), tracking_uri=self.uri))

    def base(self, version: ModelVersion, folder: Path) -> Path | None:
        """Fetch the base that a version was made for, without its teacher's half; ``None`` where it was too large to be
        stored."""
        from mlflow.artifacts import download_artifacts, list_artifacts

        with self._answers():
            source = f"{version.source}/artifacts"
            stored = list_artifacts(source, tracking_uri=self.uri)
            if not any(file.is_dir and Path(file.path).name == "base" for file in stored):
                return None
            return Path(download_artifacts(f"{source}/base", dst_path=str(folder), tracking_uri=self.uri))

    def register(
        self, concept: str, run_id: str, identity: VersionIdentity, entry: Entry, verdict: Verdict,
        tags: Mapping[str, str], files: Mapping[str, Path], serving: Mapping[str, Any], anchor: Anchor | None = None,
    ) -> Outcome:  # fmt: skip
        """Make a version of ``files`` (``adapter``, ``card``, ``about``, and where they are there ``comfyui`` and
        ``base``) with its scores, and the champion of it where ``verdict`` says so. ``anchor``: a new one to be noted.

        Registering the same run with the same scores again makes no second version.
        """
        name, content = model_name(concept), entry.file.read_bytes()
        values = {f"{_MADE}{key}": value for key, value in identity.__dict__.items()}
        values |= {_SCORES: hashlib.sha256(content).hexdigest(), _ASKED: entry.asked, **tags,
                   f"{_GATE}": verdict.word, f"{_GATE}.reason": verdict.reason[:2000]}  # fmt: skip
        values |= {f"dopsd.{key.replace('/', '.')}": f"{mean:.4f}" for key, mean in entry.means.items()}
        with self._answers():
            self._ensure(name)
            found = self._existing(name, run_id, values)
            version = found or self._create(name, run_id, {**files, "scores": entry.file}, serving, values)
            self.client.update_model_version(name, version.version, described(verdict, entry.scores)[:_DESCRIPTION])
            self._show(run_id, f"{concept} v{version.version} {in_short(verdict)}", entry.means)
            self.client.set_registered_model_alias(name, CANDIDATE, version.version)
            if anchor is not None and (anchor.version or verdict.passed):
                self._note(name, replace(anchor, version=anchor.version or str(version.version)))
            if verdict.passed:
                self.client.set_registered_model_alias(name, CHAMPION, version.version)
            experiment = self.client.get_run(run_id).info.experiment_id
        return Outcome(name, str(version.version), verdict.passed, verdict.reason, run_id, experiment)

    def _note(self, name: str, anchor: Anchor) -> None:
        """The note first: without the alias it is of another version, and is made anew."""
        self.client.set_registered_model_tag(name, _ANCHOR, json.dumps(asdict(anchor), sort_keys=True))
        self.client.set_registered_model_alias(name, ANCHOR, anchor.version)

    def _show(self, run_id: str, text: str, means: Mapping[str, float]) -> None:
        """For the page that compares two versions: it shows names, parameters and metrics of their runs, and neither
        tags nor descriptions. A parameter can be set but once, and a version may be judged again."""
        shown = text if len(text) <= _RUN_NAME else text[: _RUN_NAME - 1] + "…"
        self.client.update_run(run_id, name=shown)
        for key, mean in means.items():
            self.client.log_metric(run_id, key, mean)

    def _ensure(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _existing(self, name: str, run_id: str, values: Mapping[str, str]) -> ModelVersion | None:
        for version in self.client.search_model_versions(f"name='{name}'"):
            if version.run_id == run_id and version.tags.get(_SCORES) == values[_SCORES]:
                for key, value in values.items():
                    self.client.set_model_version_tag(name, version.version, key, value)
                return version
        return None

    def _create(
        self, name: str, run_id: str, files: Mapping[str, Path], serving: Mapping[str, Any], values: Mapping[str, str]
    ) -> ModelVersion:
        with tempfile.TemporaryDirectory(prefix="dopsd-model-") as place:
            model = Path(place) / "model"
            _save_model(model, files, serving)
            folder = f"model-{values[_SCORES][:8]}"
            self.client.log_artifacts(run_id, str(model), folder)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{folder}"
        return self.client.create_model_version(name, source, run_id, tags=dict(values))

    def _alias(self, name: str, alias: str) -> ModelVersion | None:
        from mlflow.exceptions import MlflowException

        with self._answers():
            try:
                return self.client.get_model_version_by_alias(name, alias)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise

    def _answers(self) -> _Answers:
        return _Answers(self.uri)


class _Answers:
    """Turns a registry that does not answer into :class:`RegistryAway`, without secrets in its message."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        from mlflow.exceptions import MlflowException

        if error is not None and is_disk_full(error):
            raise disk_full(error, Path.cwd()) from None
        if isinstance(error, MlflowException | OSError):
            text = " ".join(without_secrets(str(error), self._uri).split())[:300]
            raise RegistryAway(f"the registry did not take it ({text}); run stage register again later") from None


def _identity_of(version: ModelVersion) -> VersionIdentity:
    return VersionIdentity(**{key: version.tags.get(_MADE + key, "") for key in VersionIdentity.__dataclass_fields__})


def _save_model(folder: Path, files: Mapping[str, Path], serving: Mapping[str, Any]) -> None:
    """An MLflow model in ``folder``: the code of :mod:`.serving`, the files, the versions it was tested with."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    options = ParamSchema([ParamSpec(name, "long", 0) for name in ("seed", "steps", "height", "width")])
    inputs = Schema([ColSpec("string")])
    if serving.get("edits"):  # lists of strings; declared as that, MLflow refuses a table where a row has none (NaN)
        inputs = Schema([ColSpec("string", "prompt"), ColSpec(AnyType(), "images", required=False)])

    with tempfile.TemporaryDirectory(prefix="dopsd-files-") as place:
        artifacts = {}
        for key, path in files.items():
            target = Path(place) / key
            if path.is_dir():  # the teacher's half of a base draws nothing
                shutil.copytree(path, target, ignore=shutil.ignore_patterns("vlm", "world"))
            else:
                target = target.with_name(f"{key}{path.suffix}")
                shutil.copyfile(path, target)
            artifacts[key] = str(target)
        with warnings.catch_warnings():  # the signature is given; MLflow would also guess it from an example
            warnings.filterwarnings("ignore", ".*An input example was not provided", UserWarning)
            warnings.filterwarnings("ignore", ".*Add type hints to the .predict", UserWarning)
            mlflow.pyfunc.save_model(
                path=str(folder),
                python_model=str(_SERVING),
                artifacts=artifacts,
                model_config=dict(serving),
                signature=ModelSignature(inputs=inputs, params=options),
                pip_requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in _NEEDS],
            )
