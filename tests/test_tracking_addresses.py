"""What the tracker does without a server: addresses shown without secrets, and its helpers."""

from __future__ import annotations

from pathlib import Path

import pytest

from dopsd.origin import git_tags
from dopsd.tracking import public_uri, without_secrets
from dopsd.tracking.folder import flatten


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://mia:s3cret@host:5000/x?token=abc", "http://host:5000/x"),
        ("postgresql://mia:s3cret@db/mlflow", "postgresql://db/mlflow"),
        ("sqlite:////home/mia/mlflow.db", "sqlite:////home/mia/mlflow.db"),
    ],
)
def test_addresses_are_shown_without_secrets(uri: str, shown: str) -> None:
    assert public_uri(uri) == shown
    text = without_secrets(f"cannot open {uri}: wrong password {'s3cret' if '@' in uri else ''}", uri)
    assert "s3cret" not in text
    assert text.startswith("cannot open ")


def test_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flatten({"a": {"b": 1, "c": {"d": (2, 3)}}}) == {"a.b": 1, "a.c.d": (2, 3)}
    monkeypatch.delenv("DOPSD_COMMIT", raising=False)
    assert git_tags(tmp_path) == {}
    monkeypatch.setenv("DOPSD_COMMIT", "abc")
    assert git_tags(tmp_path) == {"mlflow.source.git.commit": "abc"}, "an image has no repository"
