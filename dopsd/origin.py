"""What a training came from, besides its data and settings: the commit, and the flow run it was started by."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git_tags(root: Path) -> dict[str, str]:
    """The commit that ``root`` is at, and whether files differ from it. An image has no repository: there it is what
    DOPSD_COMMIT says. Empty where nothing says it."""
    try:
        commit, status = (
            subprocess.run(
                ["git", *command], cwd=root, capture_output=True, encoding="utf-8", check=True, timeout=20
            ).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        built_from = os.environ.get("DOPSD_COMMIT")
        return {"mlflow.source.git.commit": built_from} if built_from else {}
    return {"mlflow.source.git.commit": commit.strip(), "dopsd.git.dirty": str(bool(status.strip())).lower()}


def flow_tags() -> dict[str, str]:
    """The flow run that this process works for, where there is one (flows/train.py sets these)."""
    names = {"DOPSD_FLOW_RUN_ID": "dopsd.flow_run.id", "DOPSD_FLOW_RUN_URL": "dopsd.flow_run.url"}
    return {tag: os.environ[name] for name, tag in names.items() if os.environ.get(name)}
