"""The page: what it says of made-up numbers, that it needs nothing else, and how a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from selenium.webdriver.common.keys import Keys

from dopsd.data.cache import EncodingCache
from dopsd.evaluation.report import ReportError, write_report
from dopsd.evaluation.suite import Subject, evaluate
from tests.browser import CHROMIUM, DRIVER, Browser, browser
from tests.tiny import tiny_family
from tests.tiny_evaluation import small_world, tiny_run_settings, write_adapter, write_concept

HOSTILE = '<script src="https://evil.example/x.js">alert(\'[V]\')</script> & "quotes"'
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of base, teacher, an adapter that changes much and one that changes nothing."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("report")
    table, holdout = write_concept(root / "concept", small_world(), {"kind": "style", "style": "ink"})
    adapters = [Subject(name, write_adapter(root / name, scale)) for name, scale in (("d-opsd", 0.5), ("sft", 0.0))]
    subjects = [Subject("base", None), Subject("teacher", None), *adapters]
    cache, folder = EncodingCache(root / "cache"), root / "evaluation"
    evaluate(tiny_family(), table, holdout, small_world(), subjects, tiny_run_settings(), cache, folder)
    return folder


def page_of(evaluation: Path, root: Path, **changes: Change) -> str:
    """The page of a copy of which files (``metrics``, ``prompts``, ``index``) were changed first."""
    folder = root / "evaluation"
    shutil.copytree(evaluation, folder)
    for name, change in changes.items():
        path = folder / ("samples/index.json" if name == "index" else f"{name}.json")
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return write_report(folder, root / "train", {"content_hash": "ab" * 32}, root / "deep" / "report.html").read_text()


def without_pictures(page: str) -> str:
    """What a person can read, in one line."""
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", page).replace("\xa0", " ").split())


class Page(HTMLParser):
    """What a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.opened: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key.endswith(("src", "href", "srcset", "action", "poster")) or key == "data":
                self.addresses.append(value or "")
            if key.startswith("on"):
                self.handlers.append(key)
            if key == "id":
                self.ids.append(value or "")
            if key in ("popovertarget", "for"):
                self.opened.append(value or "")


def test_the_page_needs_nothing_else_and_escapes_captions(evaluation: Path, tmp_path: Path) -> None:
    def hostile(index: dict[str, Any]) -> None:
        index["prompts"]["concept"][0] = index["prompts"]["kept"][0] = index["captions"][0] = HOSTILE
        index["settings"]["evaluation"]["prompts"] = [HOSTILE]

    previews = tmp_path / "train" / "d-opsd" / "previews"
    previews.mkdir(parents=True)
    for step in range(0, 100, 10):
        suffix = "png" if step < 50 else "webp"  # of runs before previews were WebP, and since
        Image.new("RGB", (128, 64), "red").save(previews / f"student-{step:06d}.{suffix}")
    log = "".join(json.dumps({"step": step, "train/loss": 1 / step}) + "\n" for step in range(1, 50))
    (tmp_path / "train" / "d-opsd" / "log.jsonl").write_text(log + '{"step": 50, "trai')
    text = page_of(evaluation, tmp_path, index=hostile, metrics=lambda metrics: metrics.update(concept=HOSTILE))
    page = Page()
    page.feed(text)
    assert page.addresses
    assert all(
        address.startswith(("data:image/png;base64,", "data:image/webp;base64,", "#")) for address in page.addresses
    )
    assert not {"script", "iframe", "link", "object", "embed", "form"} & set(page.tags)
    assert not page.handlers
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.opened) <= set(page.ids)
    assert "&lt;script src=&#34;https://evil.example/x.js&#34;&gt;" in text
    assert text.count("<svg") >= 4
    assert "step 0<" in text
    assert "step 90" in text
    assert "Through training" in text


def test_a_missing_evaluation_says_which_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="run stage evaluate first"):
        write_report(tmp_path, tmp_path, {}, tmp_path / "report.html")


# --- what it says -----------------------------------------------------------------------------------------------------


def told(numbers: dict[str, tuple[float, float, float]], **others: Any) -> Change:
    """D-OPSD's headline numbers with their intervals, and whatever else."""

    def change(metrics: dict[str, Any]) -> None:
        metrics["headline"]["d-opsd"] |= {key: value[0] for key, value in numbers.items()}
        metrics["intervals"]["headline"]["d-opsd"] |= {key: list(value[1:]) for key, value in numbers.items()}
        metrics.update(others)

    return change


def test_what_is_further_away_than_another_seed_is_none_and_comes_first(evaluation: Path, tmp_path: Path) -> None:
    def kept(prompts: dict[str, Any]) -> None:
        prompts["kept"]["d-opsd"]["0"]["kept"] = [0.4, -1.63, 0.9, -0.2, 0.0, 0.7]

    numbers = told({"kept": (-0.3, -0.5, -0.1), "kept_near": (-1.63, -2.0, -1.2)})
    page = page_of(evaluation, tmp_path, prompts=kept, metrics=numbers)
    shown = re.findall(r"<figcaption><span>(.*?)</span><b>(.*?)</b>", page.split("What was lost</h2>")[1])[:6]
    asked = json.loads((evaluation / "samples/index.json").read_text())["prompts"]["kept"]
    assert shown == [
        (asked[1], "none"), (asked[3], "none"), (asked[4], "none"), (asked[0], "40 %"), (asked[5], "70 %"),
        (asked[2], "90 %"),
    ]  # fmt: skip
    text = without_pictures(page)
    assert "Did it keep the rest? none ✗ lost 95 % interval −50 to −10 % On 6 general prompts it keeps nothing" in text
    assert "near the concept none" in text
    assert "−163 %" not in text


def test_what_lost_everything_has_leaked_nothing(evaluation: Path, tmp_path: Path) -> None:
    leaked = "the concept has leaked into plain words"
    for number, (kept, said) in enumerate((((0.7, 0.6, 0.8), True), ((-0.2, -0.3, -0.05), False))):
        numbers = told({"kept": kept, "kept_near": (-0.1, -0.2, 0.0)})
        assert (leaked in page_of(evaluation, tmp_path / str(number), metrics=numbers)) == said


def test_a_score_that_rests_on_the_probe_says_how_often_that_is_right(evaluation: Path, tmp_path: Path) -> None:
    numbers = told({"gap_closed_style": (0.9, 0.8, 1.0)}, probe={"accuracy_clean": 0.8612, "accuracy_degraded": 0.7,
                                                                "styles": 5})  # fmt: skip

    def old_styles(metrics: dict[str, Any]) -> None:
        numbers(metrics)
        own = {"known_style": 0.9, "known_cosine": 0.95, "known_lowest": 0.9}
        metrics["headline"]["d-opsd"] |= own
        metrics["intervals"]["headline"]["d-opsd"] |= {key: [0.8, 1.0] for key in own}

    text = without_pictures(page_of(evaluation, tmp_path, metrics=old_styles))
    right = "(probe right in 86 %)"
    for words in (f"of the way to its teacher, style {right} 90 %", f"gap closed: style ↑ {right}", f"style ↑ {right}",
                  f"In style {right} it goes 90 %", f"style {right} probability that a probe",
                  f"known truth, lowest: style {right} 90 %", f"old styles kept ↑ {right}"):  # fmt: skip
        assert words in text


def test_copies_are_shown_where_there_are_some_and_else_one_line_says_so(evaluation: Path, tmp_path: Path) -> None:
    nothing = page_of(evaluation, tmp_path / "none", metrics=told({"copied": (0.0, 0.0, 0.0)}))
    some = page_of(evaluation, tmp_path / "some", metrics=told({"copied": (0.2, 0.1, 0.3)}))
    line = "None of D-OPSD's 10 pictures is a copy of a training picture, beyond what the base draws anyway."
    assert line in without_pictures(nothing)
    assert line not in without_pictures(some)
    part = some.split("Learnt by heart?")[1].split("</section>")[0]
    shown, more = part.split("<details>")
    assert shown.count("<figure") == 4
    assert more.startswith("<summary>The next 6 of 10</summary>")
    assert more.count("<figure") == 6, "every sample beside the training picture nearest to it"
    assert 'class="arrow"' not in part, "one is not what became of the other"


def test_of_a_base_alone_nothing_is_said_that_was_tuned(evaluation: Path, tmp_path: Path) -> None:
    def alone(metrics: dict[str, Any]) -> None:
        metrics.update(models=["base"], against={}, differences={}, headline={})

    page = page_of(evaluation, tmp_path, metrics=alone)
    assert "<dt>base, untuned</dt>" in page
    assert "<dt>teacher</dt>" not in page
    text = without_pictures(page.split("How to read this")[0])
    assert "Nothing was tuned: this page shows the base alone." in text
    for words in ("D-OPSD", "Teacher", "teacher", "None", "What was lost", "What was learnt", "better and"):
        assert words not in text, words


def test_with_one_number_of_steps_no_section_compares_them(evaluation: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    shutil.copytree(evaluation, folder)
    curves = (folder / "few_step.csv").read_text().splitlines()
    (folder / "few_step.csv").write_text("\n".join(line for line in curves if line.split(",")[1] != "2") + "\n")
    text = page_of(folder, tmp_path, metrics=lambda metrics: metrics.update(most_steps=1))
    assert "Few steps and many" not in text


def test_a_large_page_is_bounded_and_its_pictures_keep_their_shapes(evaluation: Path, tmp_path: Path) -> None:
    """Sixty general prompts, forty training pictures, every tile as heavy as a photograph."""
    folder = tmp_path / "large"
    shutil.copytree(evaluation, folder)
    draw = np.random.default_rng(0)
    layers = [draw.integers(0, 255 // n, (512 // n, 320 // n, 3), dtype=np.uint8) for n in (2, 4, 16, 64)]
    blots = np.sum([np.asarray(Image.fromarray(layer).resize((320, 512))) for layer in layers], 0)
    Image.fromarray(blots.astype(np.uint8)).save(folder / "samples" / "tile.webp", quality=90)
    heavy = (folder / "samples" / "tile.webp").stat().st_size
    assert heavy > 80_000
    rows = {"kept": 60, "training": 40}

    def large(index: dict[str, Any]) -> None:
        index["prompts"]["kept"] = [f"prompt {number}" for number in range(60)]
        index["captions"] = [f"caption {number}" for number in range(40)]
        index["tiles"] = [tile for tile in index["tiles"] if tile["split"] != "known"]  # of small worlds alone
        for tile in index["tiles"]:
            tile["files"] = {str(row): "tile.webp" for row in range(rows.get(tile["split"], 10))}

    def many(prompts: dict[str, Any]) -> None:
        for noises in prompts["kept"].values():
            for values in noises.values():
                values["kept"] = [number / 60 for number in range(60)]

    page = page_of(folder, tmp_path, index=large, prompts=many)
    assert len(page) < 15e6, heavy
    shapes = re.findall(r'class="zoom"[^>]*aspect-ratio: ([\d.]+)', page)
    assert len(shapes) > 100
    assert {float(shape) for shape in shapes} == {320 / 512}


# --- how a browser shows it -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(evaluation: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page in a browser, with a portrait among the pictures."""
    root = tmp_path_factory.mktemp("shown")
    folder = root / "source"
    shutil.copytree(evaluation, folder)
    for path in (folder / "samples").glob("concept-*/001.png"):
        with Image.open(path) as image:
            image.resize((48, 96)).save(path)
    page_of(folder, root)
    with browser() as tab:
        yield tab, f"file://{root}/deep/report.html"


OPENED = "return document.querySelectorAll(':popover-open').length"
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium-driver"
)


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1300, 900), (390, 800)])
def test_it_fits_the_screen_and_asks_nobody(shown: tuple[Browser, str], width: int, height: int, dark: bool) -> None:
    tab, address = shown
    tab.look_as(width, height, dark)
    tab.open(address, "Did it learn?")
    assert tab.run("return document.documentElement.scrollWidth") <= width
    assert (
        tab.run("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    )
    if width > 600:
        top = tab.run("return document.querySelector('.pictures').getBoundingClientRect().top")
        assert top < height - 300, "pictures are on the first screen"
    wrong = """
    await Promise.all([...document.images].map(image => { image.loading = "eager"; return image.decode(); }));
    const off = i => Math.abs(i.clientWidth / i.clientHeight / (i.naturalWidth / i.naturalHeight) - 1);
    return [...document.querySelectorAll('.zoom img')].filter(i => i.clientWidth && off(i) > 0.03).map(i => i.alt);
    """
    assert tab.run(wrong) == [], "squashed"
    paper, ink = tab.run("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (paper, ink)]
    assert (brightness[0] < brightness[1]) == dark


@needs_browser
@pytest.mark.parametrize("width", [1300, 390])
def test_seeds_are_switched_by_keyboard(shown: tuple[Browser, str], width: int) -> None:
    tab, address = shown
    tab.look_as(width, 900)
    tab.open(address, "first seed")
    visible = """
    const shown = name => getComputedStyle(document.querySelector('.switch > .' + name)).display !== 'none';
    return [shown('first'), shown('other')];
    """
    assert tab.run(visible) == [True, False]
    tab.press(Keys.TAB)
    tab.press(Keys.ARROW_RIGHT)
    assert tab.run(visible) == [False, True]
    tab.press(Keys.ARROW_LEFT)
    assert tab.run(visible) == [True, False]


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1300, 390])
def test_a_picture_opens_large_and_closes_again(shown: tuple[Browser, str], width: int, dark: bool) -> None:
    tab, address = shown
    tab.look_as(width, 900, dark)
    tab.open(address, "first seed")
    place = """
    const box = document.querySelectorAll('.zoom')[given[0]].getBoundingClientRect();
    return [Math.round(box.x + box.width / 2), Math.round(box.y + box.height / 2)];
    """
    tab.run("document.querySelector('.zoom').scrollIntoView({block: 'center'})")
    x, y = tab.run(place, 0)
    tab.click_at(x, y)
    assert tab.run(OPENED) == 1
    large = "document.querySelector(':popover-open').getBoundingClientRect()"
    assert tab.run(f"const box = {large}; return [box.x, box.y, box.width, box.height]") == [0, 0, width, 900]
    assert tab.run(place, 0) == [x, y], "nothing else moves"
    tab.press(Keys.ESCAPE)
    assert tab.run(OPENED) == 0
    tab.press(Keys.ENTER)
    assert tab.run(OPENED) == 1, "the keyboard is where it was"
    tab.click_at(5, 5)
    assert tab.run(OPENED) == 0
    for where in ((x, y), tab.run(place, 1)):
        tab.click_at(x, y)
        assert tab.run(OPENED) == 1
        tab.click_at(*where)
        assert tab.run(OPENED) == 0, "nor does what lies below open"


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(tiles=[{}]),
        lambda index: index["tiles"][0]["files"].update({"0": "../../../etc/passwd.png"}),
        lambda index: index["tiles"][0]["files"].update({"0": 'a.png" onload="alert(1)'}),
        lambda index: index.update(tiles=3),
    ],
)
def test_an_index_that_is_none_is_one_line_and_no_page(evaluation, tmp_path, change):
    folder = tmp_path / "evaluation"
    shutil.copytree(evaluation, folder)
    index = json.loads((folder / "samples/index.json").read_text())
    change(index)
    (folder / "samples/index.json").write_text(json.dumps(index))
    with pytest.raises(ReportError, match=r"index\.json: no index of samples .*; run stage evaluate again"):
        write_report(folder, tmp_path / "none", {}, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
