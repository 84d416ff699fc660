"""What a process of ours asks of its machine before it works: a direct way to loopback, and enough open files."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping
from typing import Final

LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy")
_OPEN_FILES: Final = 65_536


def prepare_process() -> None:
    """To be called once, where a program of ours begins; what it starts inherits both."""
    os.environ.update(no_proxy_of(os.environ))
    raise_open_files()


def no_proxy_of(environment: Mapping[str, str]) -> dict[str, str]:
    """``no_proxy`` and ``NO_PROXY`` with this machine's loopback added to what either names.

    A proxy is for what is further away: MLflow, Prefect and Ray are next door, and most clients would ask a proxy for
    them all the same.
    """
    named = [name.strip() for key in ("no_proxy", "NO_PROXY") for name in environment.get(key, "").split(",")]
    whole = ",".join(dict.fromkeys([*filter(None, named), *LOOPBACK]))
    return {"no_proxy": whole, "NO_PROXY": whole}


def proxy_note(environment: Mapping[str, str] = os.environ) -> str:
    """For a message about an address that did not answer: which variables send it elsewhere, passwords left out."""
    named = {key: value for key, value in environment.items() if key.lower() in _PROXIES and value}
    shown = [f"{key}={re.sub(r'//[^/@]*@', '//', value)}" for key, value in sorted(named.items())]
    return f" (through {', '.join(shown)}; is that proxy there?)" if shown else ""


def raise_open_files() -> None:
    """Take as many open files as the machine allows: Ray alone needs some hundreds, and macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
