"""Would the tests notice? Every small fault that mutmut makes in the method's own code, one by one: `make mutants`.

Writes docs/mutants.json and, from it, docs/mutants.md. ``python -m tests.mutants --again`` tries again only what the
run before did not kill, and what was written since; ``--write`` writes the two files from what is below ``mutants/``.

mutmut leaves out functions with decorators, and here that would be the average, the start and the teacher's answer
(``@torch.no_grad()``), so it is told to put its switch below them. Of a refusal only the condition is mutated: what
``raise`` says is text for people.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import textwrap
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import libcst as cst
import mutmut.__main__ as mutmut
from mutmut.mutation import file_mutation

ROOT = Path(__file__).parent.parent
RESULTS, REPORT = ROOT / "docs" / "mutants.json", ROOT / "docs" / "mutants.md"

PARTS = {"dopsd/train/trainer.py": {"milestones", "learning_rate", "_train_step", "_predict"}}
"""Of these files only these functions: the step, not what is around it."""

KILLED = ("killed", "timeout")

_CASE = "`warnings` matches messages in any case"
_KINDS = "of the two kinds only `x0` is asked after, and the types allow no third"
EQUIVALENT = {
    'off_policy: loss: LossKind = "XXvelocityXX",': _KINDS,
    'off_policy: loss: LossKind = "VELOCITY",': _KINDS,
    '_inject: warnings.filterwarnings("ignore", message="already found a `peft_config` attribute")': _CASE,
    '_inject: warnings.filterwarnings("ignore", message="ALREADY FOUND A `PEFT_CONFIG` ATTRIBUTE")': _CASE,
    "AdapterPair.remove: self._merged.use(None)": "`None` is as false as `False`",
    'rollout: loss: LossKind = "XXvelocityXX",': _KINDS,
    'rollout: loss: LossKind = "VELOCITY",': _KINDS,
}
"""``function: line as mutated`` -> why no test can, or need, tell it from the code."""

_RANDOM = "a GPU's random numbers would be set back too, which only a GPU tells"
OPEN = {"_inject: with torch.random.fork_rng(devices=None), warnings.catch_warnings():": _RANDOM}
"""The same for what a test could tell, and none does."""


# --- what mutmut is told ----------------------------------------------------------------------------------------------

_file = ""
_generate, _skip = mutmut.create_mutants_for_file, file_mutation.MutationVisitor._skip_node_and_children
_arrange = file_mutation.function_trampoline_arrangement


def _generate_for(filename: Path, output: Path) -> Any:
    global _file
    _file = filename.as_posix()
    return _generate(filename, output)


def _skips(self: Any, node: cst.CSTNode) -> bool:
    if isinstance(node, cst.Raise):
        return True
    if isinstance(node, cst.FunctionDef):
        return node.name.value not in PARTS.get(_file, {node.name.value})
    return _skip(self, node)


def _arranged(function: cst.FunctionDef, mutants: Any, class_name: str | None) -> Any:
    """mutmut's own, with the decorators around the switch and not around each of the mutants."""
    declared, nodes, assigned, names = _arrange(function, mutants, class_name)
    if not any(isinstance(d.decorator, cst.Name) and d.decorator.value == "classmethod" for d in function.decorators):
        nodes = [nodes[0], *[node.with_changes(decorators=()) for node in nodes[1:]]]
    return declared, nodes, assigned, names


def _prepare() -> None:
    mutmut.create_mutants_for_file = _generate_for
    file_mutation.MutationVisitor._skip_node_and_children = _skips
    file_mutation.function_trampoline_arrangement = _arranged


# --- what came of it --------------------------------------------------------------------------------------------------


def _outcomes() -> list[tuple[str, str, str]]:
    """``(file, mutant, status)`` of every mutant."""
    found = []
    for path in mutmut.walk_mutatable_files():
        data = mutmut.SourceFileMutationData(path=path)
        data.load()
        found += [
            (path.as_posix(), name, mutmut.status_by_exit_code[code]) for name, code in data.exit_code_by_key.items()
        ]
    return found


def _forget_survivors() -> None:
    for path in mutmut.walk_mutatable_files():
        data = mutmut.SourceFileMutationData(path=path)
        data.load()
        for name, code in data.exit_code_by_key.items():
            if mutmut.status_by_exit_code[code] not in KILLED:
                data.exit_code_by_key[name] = None
        data.save()


def _change(file: str, mutant: str) -> tuple[str, str]:
    """The lines before and after."""
    lines = mutmut.get_diff_for_mutant(mutant, path=file).splitlines()
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    before, after = (" ".join(line[1:].strip() for line in changed if line[0] == sign) for sign in "-+")
    return before, after


def _ran(arguments: list[str]) -> dict[str, str]:
    """What, when and where; of an earlier run where this one only writes."""
    if "--write" in arguments:
        stored = json.loads(RESULTS.read_text())
        return {key: stored[key] for key in ("command", "date", "machine")}
    again = f", then `python -m tests.mutants {' '.join(arguments)}`" if arguments else ""
    return {
        "command": f"`make mutants`{again}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} cores, no GPU; Python {platform.python_version()}",
    }


def _results() -> dict[str, Any]:
    files: dict[str, Counter[str]] = {}
    survivors = []
    for file, mutant, status in _outcomes():
        counts = files.setdefault(file, Counter())
        counts["mutants"] += 1
        killed = status in KILLED
        counts["killed" if killed else "survived" if status == "survived" else "not run"] += 1
        counts["of them by time"] += status == "timeout"
        if killed:
            continue
        function = mutant.rpartition("__mutmut_")[0].rpartition(".")[2].removeprefix("x_").replace("xǁ", "")
        function = function.replace("ǁ", ".")
        before, after = _change(file, mutant)
        reason = EQUIVALENT.get(f"{function}: {after}")
        counts["equivalent"] += reason is not None
        survivors.append(
            {"file": file, "function": function, "status": status, "before": before, "after": after, "reason": reason}
        )
    return {
        "files": {file: dict(counts) for file, counts in files.items()},
        "survivors": survivors,
    }


def _share(counts: dict[str, int]) -> str:
    real = counts["mutants"] - counts.get("equivalent", 0)
    return f"{100 * counts.get('killed', 0) / max(1, real):.1f} %"


def _report(results: dict[str, Any]) -> str:
    keys = ("mutants", "killed", "survived", "equivalent", "not run")
    rows = [(f"`{file}`", counts) for file, counts in results["files"].items()]
    rows.append(("all", dict(sum((Counter(counts) for _, counts in rows), Counter()))))
    lines = [
        "# Would the tests notice?",
        "",
        f"Written by {results['command']}",
        f"on {results['date']} ({results['machine']}), from [mutants.json](mutants.json).",
        "",
        "[mutmut](https://mutmut.readthedocs.io) makes one small fault at a time in the",
        "code of the method (`*` for `/`, `<` for `<=`, an argument left out or `None`, another number or text) and",
        "runs the quick tests that reach it. A mutant is killed when one of them fails or takes much too long. What",
        "`raise` says is left as it is; of the trainer only the step is mutated (`tests/mutants.py`).",
        "",
        "| file | mutants | killed | survived | of them equivalent | not run | killed of the others |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *[
            f"| {name} | {' | '.join(str(counts.get(key, 0)) for key in keys)} | {_share(counts)} |"
            for name, counts in rows
        ],
        "",
    ]
    for title, wanted in (("Equivalent", True), ("Survivors that are not", False)):
        chosen = [s for s in results["survivors"] if (s["reason"] is not None) == wanted]
        lines += [f"## {title}", ""] + ([] if chosen else ["None.", ""])
        for s in chosen:
            known = OPEN.get(f"{s['function']}: {s['after']}", "no test tells it yet")
            said = s["reason"] or (known if s["status"] == "survived" else s["status"])
            text = f"- `{s['function']}`: `{s['after']}` for `{s['before']}`: {said}."
            lines += textwrap.wrap(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        lines += [""] if chosen else []
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str]) -> None:
    os.chdir(ROOT)
    if "--write" not in arguments:
        _prepare()
        chosen = [name for name in arguments if not name.startswith("-")]
        if "--again" in arguments:
            _forget_survivors()
        elif not chosen:
            shutil.rmtree(ROOT / "mutants", ignore_errors=True)
        with tempfile.TemporaryDirectory() as place:
            os.environ["PYTEST_DEBUG_TEMPROOT"] = place
            mutmut._run(chosen, 1)
    results = _ran(arguments) | _results()
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    REPORT.write_text(_report(results))


if __name__ == "__main__":
    main(sys.argv[1:])
