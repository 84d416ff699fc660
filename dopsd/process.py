"""What a process of ours asks of its machine: a direct way to loopback and enough open files before it works, and to
take back memory that it no longer needs."""

from __future__ import annotations

import ctypes
import os
import resource
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

_C_LIBRARY = ctypes.CDLL(None)
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_OPEN_FILES: Final = (65_536, 10_240)
"""Wanted; and what macOS allows where it says that there is no limit."""


def prepare_process() -> None:
    """To be called once, where a program of ours begins; what it starts inherits both."""
    os.environ.update(no_proxy_of(os.environ))
    raise_open_files()


def no_proxy_of(environment: Mapping[str, str]) -> dict[str, str]:
    """``no_proxy`` and ``NO_PROXY`` with this machine's loopback added to what either names; nothing where no variable
    names a proxy (macOS asks its own settings then), or all hosts are exempt.

    A proxy is for what is further away: MLflow, Prefect and Ray are next door, and most clients would ask a proxy for
    them all the same.
    """
    named = [name.strip() for key in ("no_proxy", "NO_PROXY") for name in environment.get(key, "").split(",")]
    if not _proxies(environment) or "*" in named:
        return {}
    whole = ",".join(dict.fromkeys([*filter(None, named), *LOOPBACK]))
    return {"no_proxy": whole, "NO_PROXY": whole}


def proxy_note(address: str, environment: Mapping[str, str] = os.environ) -> str:
    """For a message about an address that did not answer: which variable sends it elsewhere, if any does. Whatever
    stands before an ``@`` may be a password, and is left out."""
    parts = urlsplit(address)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return ""
    wanted = (f"{parts.scheme}_proxy", "all_proxy")
    for key, value in sorted(_proxies(environment).items(), key=lambda item: item[0].lower() == "all_proxy"):
        if key.lower() in wanted:
            return f" (through {key}={value.rpartition('@')[2]}; is that proxy there?)"
    return ""


def _proxies(environment: Mapping[str, str]) -> dict[str, str]:
    kinds = ("http_proxy", "https_proxy", "all_proxy")
    return {key: value for key, value in environment.items() if key.lower() in kinds and value}


def return_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc (milliseconds; elsewhere nothing).

    Between blocks of some megabytes, which pictures of one megapixel are made of, it otherwise keeps what was freed:
    an evaluation came to hold ten megabytes more with every picture, and none of them was anybody's.
    """
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


def raise_open_files() -> None:
    """Take as many open files as the machine allows: Ray alone needs some hundreds, and macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in _OPEN_FILES:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        if soft == resource.RLIM_INFINITY or soft >= most:
            return
        with suppress(ValueError, OSError):  # more than the kernel gives; what there is must do
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return
