"""What a page of another origin can try against a service on this machine, tried in a real browser.

Every way that needs no consent of the service: simple requests, which browsers send without asking it first, forms, and
requests with the password that the browser keeps; and the right password in a header, which it must ask for first.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

from tests.browser import Browser

FETCH = """
const [url, options] = given;
try {
    const answer = await fetch(url, options);
    return {type: answer.type, status: answer.status, text: await answer.text()};
} catch (error) {
    return {type: "error", status: 0, text: ""};
}
"""
FORM = """
const [url, name, value] = given;
const frame = Object.assign(document.createElement("iframe"), {name: "answer"});
document.body.append(frame);
const form = Object.assign(document.createElement("form"),
    {action: url, method: "post", enctype: "text/plain", target: "answer"});
form.append(Object.assign(document.createElement("input"), {name: name, value: value}));
document.body.append(form);
const loaded = new Promise(done => frame.addEventListener("load", done));
form.submit();
await loaded;
let text = "";
try { text = frame.contentDocument ? frame.contentDocument.body.innerText : ""; } catch (error) { }
frame.remove();
return {type: "form", status: 0, text: text};
"""
SOCKET = """
const [url] = given;
return await new Promise(done => {
    const socket = new WebSocket(url, "prefect");
    socket.onopen = () => socket.send(JSON.stringify({type: "auth", token: ""}));
    socket.onmessage = message => done(message.data);
    socket.onclose = () => done("closed");
});
"""


@dataclass(frozen=True)
class Answer:
    """What the page got to see."""

    attack: str
    type: str
    status: int
    text: str


def post_all(page: Browser, url: str, content: dict[str, Any], password: str) -> list[Answer]:
    """Try every way to have ``content`` taken by ``url``; ``password`` is the header of one who may."""
    answers = []
    kinds = ("text/plain", "application/json", "application/x-www-form-urlencoded")
    for mode, credentials, kind in itertools.product(("cors", "no-cors"), ("omit", "include"), kinds):
        options: dict[str, Any] = {"method": "POST", "mode": mode, "credentials": credentials}
        options |= {"headers": {"Content-Type": kind}, "body": json.dumps(content)}
        answers.append(_fetch(page, f"{mode} {credentials} {kind}", url, options))
        if mode == "cors":
            options["headers"] = {**options["headers"], "Authorization": password}
            answers.append(_fetch(page, f"{mode} {credentials} {kind} with the password", url, options))
    head, tail = json.dumps(content | {"end": "|"}).split("|")
    answers.append(Answer("form", **page.run(FORM, url, f"{head}", f"{tail}")))
    return answers


def read_all(page: Browser, url: str, content: dict[str, Any] | None = None) -> list[Answer]:
    """Try every way to read ``url``: by GET, or by POST where there is ``content``."""
    answers = []
    for mode, credentials in itertools.product(("cors", "no-cors"), ("omit", "include")):
        options: dict[str, Any] = {"mode": mode, "credentials": credentials}
        if content is not None:
            options |= {"method": "POST", "body": json.dumps(content)}
        answers.append(_fetch(page, f"read {mode} {credentials}", url, options))
    return answers


def _fetch(page: Browser, attack: str, url: str, options: dict[str, Any]) -> Answer:
    return Answer(f"{attack} {url}", **page.run(FETCH, url, options))
