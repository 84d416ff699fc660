"""MLflow's log-in, which also turns away what pages of other origins send. Named in the file that ``Logins`` writes.

A browser that has logged in sends the password along by itself, for whichever page asks. MLflow trusts every page of
this machine, on any port: on a shared machine that is a page of any user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flask import Request, Response, request

if TYPE_CHECKING:
    from werkzeug.datastructures import Authorization


def authenticate() -> Authorization | Response:
    """Who asks, or the answer to somebody who may not. MLflow calls this for each request that wants a log-in."""
    from mlflow.server.auth import authenticate_request_basic_auth  # it imports this module in its turn

    if is_foreign(request):
        return Response("Not from a page of another origin.\n", 403, mimetype="text/plain")
    return authenticate_request_basic_auth()


def is_foreign(asked: Request) -> bool:
    """Whether a page of another origin made the request. Programs send none of these headers, browsers always do.

    A link to a page is followed from anywhere; what it shows stays in a window of its own.
    """
    origin = asked.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != asked.host:  # behind a proxy the scheme is another here
        return True
    if asked.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin"):
        return False
    is_link = asked.headers.get("Sec-Fetch-Mode") == "navigate" and asked.headers.get("Sec-Fetch-Dest") == "document"
    return not (is_link and asked.method == "GET")
