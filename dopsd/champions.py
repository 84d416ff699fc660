"""Between the stages and the registry: is a new version due, and making one.

Stage register calls :func:`register_version`; the nightly flow asks :func:`reasons_to_train` first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopsd.config import Settings
from dopsd.evaluation.paired import PAIRED, Paired, PairedError, read_paired, write_paired
from dopsd.files import write_json
from dopsd.identity import VersionIdentity, drawing_of, ground_of, plan_of, questions_of, version_identity
from dopsd.models import ModelError, family_class, open_base, resolved
from dopsd.models.base import Request
from dopsd.models.reading import reader_of
from dopsd.params import FEATURES
from dopsd.project import StageError, cache_of, load_base, read_concept, read_result, run_folder, world_of
from dopsd.registry import ANCHOR, CHAMPION, Anchor, Entry, Registry, RegistryAway, Verdict, judge
from dopsd.registry.gate import measure_deltas

if TYPE_CHECKING:
    from dopsd.data.manifest import ConceptTable

VERSION = "version"
"""What a version calls itself in its own scores."""
_DRAWN_WITH = "dopsd.base.drawing"
"""Tag: hash of what of its base a version is drawn with."""


def identity_today(concept: str, content_hash: str, settings: Settings, root: Path) -> VersionIdentity:
    """What a version of ``concept`` would be made from today. ``content_hash``: of its data."""
    from dopsd.train.start import start_hash

    own = resolved(settings.of(concept, root))
    start = start_hash(own.train, root, run_folder(concept, root))
    return version_identity(content_hash, own, open_base(own.model, root), start)


def reasons_to_train(concept: str, table: ConceptTable, settings: Settings, root: Path) -> list[str]:
    """Why ``concept`` is to be tuned again; empty where its champion, or its latest candidate that the gate judged, was
    made from just this data, base, method and settings. Raises ``RegistryAway``."""
    registry = Registry(root)
    now = identity_today(concept, table.content_hash, settings, root)
    champion = registry.champion(concept)
    if champion is None:
        judged = registry.judged(concept, now)
        return [] if judged else ["it has no champion"]
    version, identity = champion
    differences = now.differences(identity)
    if not differences or registry.judged(concept, now):
        return []
    return [f"{what} changed since version {version.version}" for what in differences]


def is_registered(concept: str, settings: Settings, root: Path) -> bool:
    """Whether stage register has nothing to do: the registry is off, or has a judged version made from just this."""
    if not (settings.tracking.enabled and settings.registry.enabled):
        return True
    validated = read_result(run_folder(concept, root) / "validated.json", "validate")
    return Registry(root).judged(concept, identity_today(concept, validated["content_hash"], settings, root))


def register_version(concept: str, settings: Settings, root: Path) -> None:
    """Register the first method's adapter and judge it, on the same prompts and noise as champion and anchor; the
    outcome is kept in ``registered.json``. Settings: resolved, of the concept. Raises ``RegistryAway``."""
    from dopsd.evaluation.backbones import seen_of
    from dopsd.origin import git_tags
    from dopsd.tracking import run_id
    from dopsd.train.start import start_hash

    run, registry = run_folder(concept, root), Registry(root)
    training = read_result(run / "train" / "training.json", "train")["training"]
    found = run_id(root, run, training, settings.tracking)
    if found is None:
        raise RegistryAway("the tracker has not got this training yet; run stage register again when it answers")
    validated = read_result(run / "validated.json", "validate")
    base = open_base(settings.model, root)
    identity = version_identity(validated["content_hash"], settings, base, start_hash(settings.train, root, run))
    plan = plan_of(settings, base, seen=seen_of(settings.evaluation, root))
    questions = _Questions(questions_of(plan, validated), ground_of(plan, validated), drawing_of(plan))
    tags = git_tags(root) | {"dopsd.training": training, "dopsd.data.hash": validated["content_hash"],
                             "dopsd.base": base.source.shown, _DRAWN_WITH: questions.drawing}  # fmt: skip
    mine = _scores_of(run / "evaluation" / PAIRED, settings.train.methods[0])
    verdict, anchor = _judge(registry, concept, identity, mine, questions, settings, root)
    with tempfile.TemporaryDirectory(prefix="dopsd-scores-") as place:
        write_paired(Path(place) / "scores.json", mine)
        entry = Entry(questions.asked, mine.scores, mine.models[VERSION], Path(place) / "scores.json")
        outcome = registry.register(
            concept, found, identity, entry, verdict, tags, _files(run, settings, base.source.folder),
            _serving(concept, settings, root), anchor,
        )  # fmt: skip
    write_json(run / "registered.json", outcome.__dict__)
    state = "is the champion" if outcome.promoted else "is a candidate, not the champion"
    print(f"register: {outcome.name} version {outcome.version} {state}: {outcome.reason}")


def _scores_of(path: Path, model: str) -> Paired:
    """The base's scores per prompt, and ``model``'s as those of the version that is to be."""
    try:
        paired = read_paired(path)
        if model not in paired.models:
            raise PairedError(f"{path}: has no scores of {model}")
        return paired.of(model, VERSION)
    except PairedError as error:
        raise StageError(f"{error}; run stage evaluate first") from None


def _files(run: Path, settings: Settings, base: Path) -> dict[str, Path]:
    """What is stored with a version, and nowhere else in the tracker; the base where it is small enough."""
    from dopsd.export import CARD_FILE, COMFYUI_FILE, DIFFUSERS_FILE, WEIGHTS

    export, method = run / "export", settings.train.methods[0]
    stored = sum(f.stat().st_size for f in base.rglob("*") if f.is_file()) <= settings.registry.max_base_gib * 2**30
    files = {
        "adapter": export / WEIGHTS if (export / WEIGHTS).is_dir() else export / DIFFUSERS_FILE,
        "comfyui": export / COMFYUI_FILE,
        "card": export / CARD_FILE,
        "about": run / "adapters" / f"{method}.json",
    }
    if not files["comfyui"].exists():  # of what has no names that are known to load there
        del files["comfyui"]
    return files | ({"base": base} if stored else {})


def _serving(concept: str, settings: Settings, root: Path) -> dict[str, Any]:
    """How a version is drawn with, away from this project."""
    source, side = open_base(settings.model, root, "draw").source, settings.data.resolution
    call = family_class(settings.model).call(Request(""), side, side, settings.evaluation.few)
    table, _ = read_concept(concept, settings, root)
    room = reader_of(settings, root).room
    return {
        "base": source.name or str(source.folder), "revision": source.revision,
        "call": {key: value for key, value in call.items() if key != "prompt"},
        "placeholder": settings.data.placeholder, "edits": any(row.references for row in table.rows),
    } | ({} if room is None else {"prompt_tokens": room})  # fmt: skip


# --- whom it is compared with -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Questions:
    """``asked``: hash of all that the evaluation asks; ``ground``: of what of it the anchor stands on; ``drawing``: of
    the base's files that draw."""

    asked: str
    ground: str
    drawing: str


@dataclass(frozen=True)
class _Rival:
    """A version of the registry (MLflow's) that the new one is compared with, as ``name``."""

    name: str
    version: Any
    made: VersionIdentity

    @property
    def words(self) -> str:
        return f"the {self.name} (version {self.version.version})"


class _NotComparable(Exception):
    """Why versions of the registry cannot be asked today's questions, tonight or later. What passes or is to be mended
    here (memory, a backbone, today's base) is none: with that the stage fails, and is run again."""

    def __init__(self, rivals: Sequence[_Rival], why: str) -> None:
        self.rivals = tuple(rivals)
        super().__init__(f"{' and '.join(rival.words for rival in rivals)}: {why}")

    @property
    def advice(self) -> str:
        """In one line, with the aliases that stand in the way."""
        held = {alias for rival in self.rivals for alias in (rival.name, *rival.version.aliases)}
        aliases = [alias for alias in (CHAMPION, ANCHOR) if alias in held]
        if aliases == [ANCHOR]:
            return (f"{self}: not compared; set the alias {ANCHOR} in MLflow to a version that can be, the champion "
                    "say, and run stage register again")  # fmt: skip
        what = f"the alias {aliases[0]}" if len(aliases) == 1 else f"the aliases {' and '.join(aliases)}"
        return f"{self}: not compared; if this version is better, set {what} in MLflow to it"


def _judge(
    registry: Registry, concept: str, identity: VersionIdentity, mine: Paired, questions: _Questions,
    settings: Settings, root: Path,
) -> tuple[Verdict, Anchor | None]:  # fmt: skip
    """The gate's verdict, and the anchor where it is a new one. An anchor that was made for another base and cannot be
    compared is none any more: with another base it is another ground."""
    rivals, anchor = _rivals(registry, concept, questions.ground)
    rivals = [_on_this_base(rival, identity, questions.drawing) for rival in rivals]
    note = ""
    while True:
        try:
            with tempfile.TemporaryDirectory(prefix="dopsd-rivals-") as place:
                scores = _scores(
                    registry, rivals, mine, identity, questions.asked, concept, settings, root, Path(place)
                )
            break
        except _NotComparable as error:
            if [rival.name for rival in error.rivals] != [ANCHOR] or error.rivals[0].made.base == identity.base:
                return Verdict(False, error.advice), None
            rivals, anchor = [rival for rival in rivals if rival.name != ANCHOR], None
            note = f"; {error}: it is the anchor no longer" + (", the champion is" if rivals else "")
    new = None
    if anchor is None:  # the last rival is to be it, or else this version
        name, its = (rivals[-1].version.version, scores[rivals[-1].name]) if rivals else ("", mine)
        new = anchor = Anchor(str(name), questions.ground, measure_deltas(its.models[VERSION], its.models["base"]))
    verdict = judge(
        mine.models[VERSION], mine.models["base"], mine.scores,
        {rival.words: scores[rival.name].models[VERSION] for rival in rivals}, anchor.deltas, settings.registry,
    )  # fmt: skip
    return replace(verdict, reason=verdict.reason + note), new


def _rivals(registry: Registry, concept: str, ground: str) -> tuple[list[_Rival], Anchor | None]:
    """Champion and anchor, as far as there are any, and what was noted of the anchor; ``None`` where it is a new one.

    A person's choice holds: an alias that is not where it was noted. On another ground the champion of now is the
    anchor; new pictures to train on alone are none."""
    champion, chosen, noted = registry.champion(concept), registry.holder(concept, ANCHOR), registry.anchor(concept)
    if chosen is not None and noted is not None and str(chosen[0].version) == noted.version and noted.ground != ground:
        chosen = None
    chosen = chosen or champion
    if chosen is None:
        return [], None
    if champion is None or champion[0].version == chosen[0].version:
        rivals = [_Rival(CHAMPION if champion else ANCHOR, *chosen)]
    else:
        rivals = [_Rival(CHAMPION, *champion), _Rival(ANCHOR, *chosen)]
    known = noted is not None and (noted.version, noted.ground) == (str(chosen[0].version), ground)
    return rivals, noted if known else None


def _on_this_base(rival: _Rival, identity: VersionIdentity, drawing: str) -> _Rival:
    """As one that was made for today's base, where that differs from its own in what the teacher alone sees with."""
    if rival.version.tags.get(_DRAWN_WITH) != drawing:
        return rival
    return replace(rival, made=replace(rival.made, base=identity.base))


def _scores(
    registry: Registry, rivals: Sequence[_Rival], mine: Paired, identity: VersionIdentity, asked: str, concept: str,
    settings: Settings, root: Path, place: Path,
) -> dict[str, Paired]:  # fmt: skip
    """The rivals' scores, by their names, on today's questions. Those that were asked others, or whose scores cannot be
    read, are evaluated again: all that were made for one base at once, and as they are served, with the weights that
    were exported. Raises :class:`_NotComparable`."""
    found: dict[str, Paired] = {}
    others: dict[str, list[_Rival]] = {}
    for rival in rivals:
        scores = _stored(registry, rival, mine, asked, place / f"scores-{rival.name}")
        if scores is None:
            others.setdefault(rival.made.base, []).append(rival)
        else:
            found[rival.name] = scores
    for base, group in others.items():
        words = " and ".join(rival.words for rival in group)
        print(f"register: {words}: not asked yet what is asked today; evaluating anew")
        its_base = None
        if base != identity.base:
            (place / f"base-{group[0].name}").mkdir()
            its_base = registry.base(group[0].version, place / f"base-{group[0].name}")
            if its_base is None:
                raise _NotComparable(group, "made for another base, which is gone")
        found |= _evaluate_again(registry, group, concept, settings, root, its_base, place / f"again-{group[0].name}")
    return found


def _stored(registry: Registry, rival: _Rival, mine: Paired, asked: str, folder: Path) -> Paired | None:
    """What was stored with a version, where it answers today's questions and can be paired with ``mine``: it has the
    same scores, of as many prompts."""
    folder.mkdir()
    path = registry.scores(rival.version, asked, folder)
    if path is None:
        return None
    try:
        scores = read_paired(path)
        theirs = scores.models[VERSION]
    except (PairedError, KeyError):
        return None
    own = mine.models[VERSION]
    counts = [{score: len(noises["first"]) for score, noises in its.items()} for its in (theirs, own)]
    return scores if counts[0] == counts[1] else None


def _evaluate_again(
    registry: Registry, rivals: Sequence[_Rival], concept: str, settings: Settings, root: Path,
    base_folder: Path | None, place: Path,
) -> dict[str, Paired]:  # fmt: skip
    """What today's evaluation says of versions, on today's base or the one that was stored in ``base_folder``. Raises
    :class:`_NotComparable`, and what an evaluation raises."""
    from dopsd.distill.targets import AdapterError
    from dopsd.evaluation.backbones import check_backbones
    from dopsd.evaluation.suite import Subject, evaluate
    from dopsd.given import read_export

    table, holdout = read_concept(concept, settings, root)
    evaluation = settings.evaluation
    asked = {  # what the gate compares, and no more: curves, distances and judges take most of the time
        "steps": tuple(sorted({evaluation.few, evaluation.many})),
        "backbones": tuple(name for name in evaluation.backbones if name.partition(":")[0] in FEATURES),
    }
    settings = settings.model_copy(update={"evaluation": evaluation.model_copy(update=asked)})
    its = settings
    if base_folder is not None:
        model = settings.model.model_copy(update={"path": str(base_folder), "revision": None})
        its = settings.model_copy(update={"model": model})
    check_backbones(settings.evaluation.backbones, root, settings.evaluation.rubric)
    world, subjects = world_of(settings, root), [Subject("base", None)]
    for rival in rivals:
        given = registry.adapter(rival.version, place / rival.name)
        if given is None:
            raise _NotComparable([rival], "its adapter is gone from the tracker's files")
        try:
            subjects.append(Subject(rival.name, read_export(given, place / rival.name / "again.safetensors")))
        except AdapterError as error:
            raise _NotComparable([rival], f"its adapter cannot be read ({error})") from None
    try:
        evaluate(
            load_base(its, root, use="draw"), table, holdout, world, subjects, settings, cache_of(root),
            place / "evaluation", root=root,
        )  # fmt: skip
    except (ModelError, AdapterError) as error:  # of another family, say, or whole weights and a rounded base
        if isinstance(error, ModelError) and base_folder is None:
            raise  # today's base: no fault of theirs
        if len(rivals) > 1:  # one of them may be sound
            alone = [_evaluate_again(registry, [rival], concept, settings, root, base_folder,
                                     place / f"{rival.name}-alone") for rival in rivals]  # fmt: skip
            return {name: scores for its in alone for name, scores in its.items()}
        raise _NotComparable(rivals, f"cannot be drawn with these settings ({error})") from None
    return {rival.name: _scores_of(place / "evaluation" / PAIRED, rival.name) for rival in rivals}
