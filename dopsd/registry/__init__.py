"""Registered adapters: each one a version of the model ``dopsd-<concept>``, the best of them its champion.

A version carries what it was made from and how it scored as tags, and all it takes to draw with it: a fresh process
needs the registry alone (:mod:`.serving`). Every new version is ``@candidate``; :mod:`.gate` says whether it also
becomes ``@champion``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopsd.config import RegistrySettings
from dopsd.files import disk_full, is_disk_full
from dopsd.identity import VersionIdentity
from dopsd.tracking import connect, tracking_uri, without_secrets

from .gate import Verdict, bar_of, judge

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["CHAMPION", "Outcome", "Registry", "RegistryAway", "Verdict", "judge", "model_name"]

CANDIDATE, CHAMPION = "candidate", "champion"
_MADE, _SCORES, _GATE = "dopsd.made.", "dopsd.scores", "dopsd.gate"
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

    def champion(self, concept: str) -> tuple[ModelVersion, VersionIdentity, dict[str, Any]] | None:
        """The champion's version, what it was made from and how it scored; ``None`` where there is none."""
        found = self._alias(model_name(concept), CHAMPION)
        return (found, _identity_of(found), json.loads(found.tags.get(_SCORES, "{}"))) if found else None

    def judged(self, concept: str, identity: VersionIdentity) -> bool:
        """Whether a version made from just this was judged already, whatever came of it."""
        with self._answers():
            versions = self.client.search_model_versions(f"name='{model_name(concept)}'")
        return any(_identity_of(version) == identity and _GATE in version.tags for version in versions)

    def adapter(self, version: ModelVersion, folder: Path) -> Path:
        """Fetch a version's adapter, as diffusers reads it: the one that is served. Returns its file, or the folder of
        a trained transformer."""
        from mlflow.artifacts import download_artifacts, list_artifacts

        with self._answers():
            source = f"{version.source}/artifacts"
            stored = {Path(file.path).name for file in list_artifacts(source, tracking_uri=self.uri)}
            source += "/adapter" if "adapter" in stored else "/adapter.safetensors"
            return Path(download_artifacts(source, dst_path=str(folder), tracking_uri=self.uri))

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
        self, concept: str, run_id: str, identity: VersionIdentity, scores: Mapping[str, Any], tags: Mapping[str, str],
        champion_scores: Mapping[str, Any] | None, files: Mapping[str, Path], serving: Mapping[str, Any],
        settings: RegistrySettings, obstacle: str = "",
    ) -> Outcome:  # fmt: skip
        """Make a version of ``files`` (``adapter``, ``card``, ``about``, and where they are there ``comfyui`` and
        ``base``); judge it.

        ``scores`` are this version's, ``champion_scores`` the champion's on the same prompts and seeds; ``obstacle``:
        why it could not be asked them, so that it stays. Registering the same run with the same scores again makes no
        second version.
        """
        name = model_name(concept)
        if obstacle:
            verdict = Verdict(False, f"{obstacle}: not compared; set the alias {CHAMPION} by hand if this is better")
        else:
            verdict = judge(scores, champion_scores, settings)
        if verdict.passed:
            scores = {**scores, "bar": bar_of(scores, champion_scores)}
        values = {f"{_MADE}{key}": value for key, value in identity.__dict__.items()}
        values |= {_SCORES: json.dumps(scores, sort_keys=True), **tags, f"{_GATE}": verdict.word,
                   f"{_GATE}.reason": verdict.reason}  # fmt: skip
        with self._answers():
            self._ensure(name)
            found = self._existing(name, run_id, values)
            version = found or self._create(name, run_id, files, serving, values)
            self.client.set_registered_model_alias(name, CANDIDATE, version.version)
            if verdict.passed:
                self.client.set_registered_model_alias(name, CHAMPION, version.version)
            experiment = self.client.get_run(run_id).info.experiment_id
        return Outcome(name, str(version.version), verdict.passed, verdict.reason, run_id, experiment)

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
            folder = f"model-{hashlib.sha256(values[_SCORES].encode()).hexdigest()[:8]}"
            self.client.log_artifacts(run_id, str(model), folder)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{folder}"
        return self.client.create_model_version(
            name, source, run_id, tags=dict(values), description=values[f"{_GATE}.reason"]
        )

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
