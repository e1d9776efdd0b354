"""The page of a comparison: what it holds, that nothing given to it is taken for HTML, and how it acts in Chromium."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from chromium import CHROMIUM, Browser
from orbitdit import ConfigError, OrbitQuantConfig
from orbitdit.evaluate import FULL_PRECISION, Result
from orbitdit.page import Figure, comparison_page, read_figure
from orbitdit.policy import Layer, build_plan
from orbitdit.report import SHOWN, results_dict

NASTY = "\"a <script>alert(1)</script> & '$title' ${title}"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20"><path d="M0 0h40v20"/></svg>'
PROMPTS = ["a red circle", "two squares", NASTY]
FIGURE = Figure("a figure", f"data:image/svg+xml;base64,{base64.b64encode(SVG).decode()}")
RIGHT, LEFT = ("ArrowRight", 39), ("ArrowLeft", 37)


def results(labels=("W4A4", "W2A4"), number=3, size=(64, 64)):
    rng = np.random.default_rng(0)
    shown = [rng.integers(0, 256, (number, *size, 3), dtype=np.uint8) for _ in range(1 + len(labels))]
    marks = [(True, False, None)[i % 3] for i in range(number)]
    full = Result(FULL_PRECISION, shown[0], marks, 30_000_000, 16.0, None, 11.2)
    return [full] + [
        Result(label, pictures, marks, 5_000_000, 2.04, 19.5, 20.0)
        for label, pictures in zip(labels, shown[1:], strict=True)
    ]


def page(found=None, prompts=PROMPTS, figures=(), **settings):
    found = found or results()
    layers = [
        Layer("blocks.0.to_q", 64, 64, True),
        Layer("blocks.1.to_q", 64, 64, True),
        Layer("proj_out", 64, 8, True),
    ]
    plans = [build_plan("Model<b>", layers, OrbitQuantConfig(bits)) for bits in ("w4a4", "w2a4")]
    record = results_dict(found, prompts, **{"model": "org/<i>name</i>", "seed": 7, "rules": [], **settings})
    return comparison_page(found, prompts, plans, record, figures)


class Reader(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._within = [], [], []
        self.feed(text)
        self.close()
        assert not self._within

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input", "path"):
            self._within.append(tag)

    def handle_endtag(self, tag):
        if tag != "path":
            assert self._within.pop() == tag

    def handle_data(self, data):
        if self._within and self._within[-1] not in ("style", "script"):
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_pictures_are_embedded_once_exactly_and_in_order():
    found = results()
    images = [a for a in Reader(page(found)).all("img") if "src" in a]
    assert len(images) == len(PROMPTS) * len(found)
    for n, attributes in enumerate(images):
        prompt, result = divmod(n, len(found))
        assert attributes["alt"] == f"{PROMPTS[prompt]}, {found[result].label}"
        content = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(content)) as picture:
            np.testing.assert_array_equal(np.asarray(picture), found[result].pictures[prompt])


@pytest.mark.parametrize(("width", "pixelated"), [(255, True), (256, False)])
def test_only_small_pictures_are_enlarged_without_smoothing(width, pixelated):
    images = [a for a in Reader(page(results(size=(8, width)))).all("img") if "src" in a]
    assert {a.get("class") for a in images} == ({"pixels"} if pixelated else {None})
    assert {(a["width"], a["height"]) for a in images} == {(str(width), "8")}


def test_what_is_given_is_never_taken_for_html():
    reader = Reader(page(results(labels=["<b>W4A4</b>", "W2A4"]), rules=[NASTY]))
    assert len(reader.all("script")) == 1
    assert not reader.all("i")
    text = " ".join(reader.texts)
    for given in (NASTY, "<b>W4A4</b>", "org/<i>name</i>", "Model<b>"):
        assert given in text
    assert all(len(a) == 0 for a in reader.all("b"))


def test_the_page_names_nothing_outside_itself():
    text = page(figures=[FIGURE])
    reader = Reader(text)
    policy = next(a["content"] for a in reader.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == POLICY
    named = [a[key] for _, a in reader.tags for key in ("src", "href", "srcset", "action", "data") if key in a]
    assert named
    assert all(uri.startswith("data:image/") for uri in named)
    assert not re.search(r"url\(|@import|https?:", text)


def test_figures_tables_plans_and_versions_are_there():
    text = " ".join(" ".join(Reader(page(figures=[FIGURE])).texts).split())
    for expected in (
        "Full precision, W4A4 and W2A4",
        "PSNR to full precision, dB",
        "right pictures",
        "stored bits per quantized weight",
        "2 layers quantized, 0 INT4, 1 kept.",
        "blocks.*.to_q",
        "a figure",
        "seed 7",
        "rules none",
        "torch",
        "commit",
    ):
        assert expected in text
    assert "Figures" not in " ".join(Reader(page()).texts)


def test_many_prompts_are_cut_and_said_to_be():
    number = SHOWN + 2
    reader = Reader(page(results(number=number, size=(4, 4)), prompts=["a circle"] * number))
    assert len(reader.all("article")) == len(reader.all("option")) == SHOWN
    assert f"The first {SHOWN} of {number} prompts." in " ".join(reader.texts)


def test_full_precision_alone_and_unjudged_pictures_make_a_page():
    found = [results()[0]._replace(right=[None] * len(PROMPTS))]
    text = " ".join(Reader(page(found)).texts)
    assert "Full precision" in text
    assert "nothing missing" not in text


def test_figures_are_read_or_refused(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "ks_distance-w4.png")
    (tmp_path / "drawn.svg").write_bytes(SVG)
    assert read_figure(tmp_path / "ks_distance-w4.png").caption == "ks distance w4"
    assert read_figure(tmp_path / "ks_distance-w4.png").uri.startswith("data:image/png;base64,iVBOR")
    assert read_figure(tmp_path / "drawn.svg").uri.startswith("data:image/svg+xml;base64,")
    for name, content in (("a.svg", b"<?xml version='1.0'?><html/>"), ("b.png", b"GIF89a"), ("c.svg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{name} is neither PNG nor SVG"):
            read_figure(tmp_path / name)
    with pytest.raises(ConfigError, match=r"none.png cannot be read \(No such file"):
        read_figure(tmp_path / "none.png")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The page in Chromium, from disk."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    folder = tmp_path_factory.mktemp("page")
    (folder / "index.html").write_text(page(figures=[FIGURE]), encoding="utf-8")
    browser = Browser(folder / "profile")
    try:
        browser.size(1280, 900)
        browser.open((folder / "index.html").as_uri())
        yield browser
    finally:
        browser.close()


FIRST = "document.querySelector('.pair')"
AT = f"{FIRST}.style.getPropertyValue('--at')"
INPUT = f"{FIRST}.querySelector('input')"


def box(browser, selector):
    script = f"(({{x, y, width, height}}) => [x, y, width, height])({selector}.getBoundingClientRect())"
    return browser.value(script)


def test_every_picture_loads_and_nothing_is_requested(opened):
    sizes = opened.value("Promise.all([...document.images].map((i) => i.decode().then(() => i.naturalWidth)))")
    assert len(sizes) == 3 * 3 + 2 * 2 + 1
    assert all(size > 0 for size in sizes)
    requested = [e["params"]["request"]["url"] for e in opened.events if e["method"] == "Network.requestWillBeSent"]
    outside = [url for url in requested if not url.startswith("data:image/")]
    assert [url.rpartition("/")[2] for url in outside] == ["index.html"]
    assert not [e for e in opened.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]


def test_the_policy_stops_what_a_page_could_ask_for(opened):
    """Otherwise the test above could not fail."""
    tried = opened.value(
        "new Promise((done) => { const i = new Image(); i.onerror = () => done('stopped');"
        "i.onload = () => done('got'); i.src = 'http://127.0.0.1:9/x.png'; })"
    )
    assert tried == "stopped"
    assert any("Content Security Policy" in str(e) for e in opened.events if e["method"] == "Log.entryAdded")
    opened.events.clear()


def test_the_divider_follows_the_mouse(opened):
    x, y, width, height = box(opened, FIRST)
    assert opened.value(AT) == "50%"
    opened.mouse("mousePressed", x + width / 2, y + height / 3)
    opened.mouse("mouseMoved", x + width / 4, y + height / 2)
    assert opened.value(AT) == "25%"
    left, _, bar, _ = box(opened, f"{FIRST}.querySelector('.bar')")
    assert left + bar / 2 == pytest.approx(x + width / 4, abs=1)
    assert opened.value(f"getComputedStyle({FIRST}.querySelector('.changed')).clipPath") == "inset(0px 0px 0px 25%)"
    opened.mouse("mouseMoved", x + 2 * width, y)
    assert opened.value(AT) == "100%"
    opened.mouse("mouseReleased", x + 2 * width, y)
    opened.mouse("mouseMoved", x + width / 2, y + height / 2)
    assert opened.value(AT) == "100%"
    assert opened.value("document.querySelectorAll('.pair')[1].style.getPropertyValue('--at')") == "50%"


def test_the_divider_follows_the_arrow_keys_and_shows_its_focus(opened):
    opened.value("document.querySelector('[data-step=\"1\"]').focus()")
    opened.key("Tab", 9)
    assert opened.value(f"document.activeElement === {INPUT}")
    assert opened.value(f"getComputedStyle({FIRST}).outlineStyle") == "solid"
    before = int(opened.value(f"{INPUT}.value"))
    for _ in range(3):
        opened.key(*LEFT)
    assert opened.value(AT) == f"{before - 3}%"
    opened.key(*RIGHT)
    assert opened.value(AT) == f"{before - 2}%"
    assert opened.value(f"{INPUT}.getAttribute('aria-valuetext')") == f"{before - 2}% full precision"
    assert opened.value(f"{INPUT}.getAttribute('aria-label')") == "Divider between full precision and W4A4"


def test_another_prompt_is_shown_by_button_by_list_and_by_its_card(opened):
    def shown():
        return opened.value(f"[...{FIRST}.querySelectorAll('img')].map((i) => i.alt)")

    def picked():
        return opened.value(
            "[document.querySelector('#prompt').value, document.querySelector('.card.current h3').innerText]"
        )

    assert shown() == ["a red circle, full precision", "a red circle, W4A4"]
    opened.value("document.querySelector('[data-step=\"1\"]').click()")
    assert shown() == ["two squares, full precision", "two squares, W4A4"]
    opened.value("document.querySelectorAll('.card')[2].querySelector('button').click()")
    assert shown() == [f"{NASTY}, full precision", f"{NASTY}, W4A4"]
    assert picked() == ["2", NASTY]
    opened.value("document.querySelector('[data-step=\"1\"]').click()")
    assert picked() == ["0", "a red circle"]
    opened.value("{ const s = document.querySelector('#prompt'); s.value = 1; s.dispatchEvent(new Event('change')); }")
    assert picked() == ["1", "two squares"]
    spoken = opened.value("document.querySelector('[aria-live]').textContent")
    assert re.fullmatch(r"full precision ✗ wrong; W4A4 ✗ wrong \d+\.\d\sdB", spoken)


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_sticks_out_sideways(opened, width):
    opened.size(width, 740, phone=width < 700)
    opened.value("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert opened.value("document.documentElement.scrollWidth") == width
    beyond = "(e) => !e.closest('.scroll, .hidden') && e.getBoundingClientRect().right > innerWidth + 1"
    assert opened.value(f"[...document.querySelectorAll('body *')].filter({beyond}).map((e) => e.outerHTML)") == []
    if width == 360:
        assert opened.value(
            "[...document.querySelectorAll('.results .scroll')].every((s) => s.scrollWidth <= s.clientWidth)"
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes_and_motion_is_not_forced(opened, scheme):
    features = [("prefers-color-scheme", scheme), ("prefers-reduced-motion", "reduce")]
    opened.send("Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in features])
    names = ("ground", "surface", "ink", "muted", "accent", "right", "wrong")
    style = "getComputedStyle(document.documentElement)"
    colour = {name: opened.value(f"{style}.getPropertyValue('--{name}').trim()") for name in names}
    for ground in ("ground", "surface"):
        for ink in names[2:]:
            assert contrast(colour[ink], colour[ground]) >= 4.5, (ink, ground)
    assert opened.value(f"{style}.scrollBehavior") == "auto"
    assert opened.value("getComputedStyle(document.querySelector('.card')).transitionDuration") == "0s"


def contrast(one, other):
    """Ratio of the WCAG 2.2 relative luminances of two #rgb or #rrggbb colours."""

    def luminance(colour):
        digits = colour.lstrip("#")
        digits = digits if len(digits) == 6 else "".join(2 * d for d in digits)
        channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
