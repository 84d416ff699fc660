"""Shared fixtures. Tests run on one thread: the models are tiny, and results must not depend on the machine's cores."""

from __future__ import annotations

import pytest
import torch

from tests import tiny


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def family():
    """A fresh random Z-Image family."""
    return tiny.tiny_family()
