"""Look at figures in a real browser, and follow the README's links: `python .ci/browser.py`.

Figures: no text leaves the canvas or lies over another one, no letter is too small to read, every
text is text, in one typeface that is installed. README: every link and image leads to a file of the
repository, and every image has an alternative text. Names of SVG and Markdown files may follow the
command; none means all that git tracks. Needs what `make setup` and `make browser` install.
"""

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from math import hypot
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

WIDTH = 838  # CSS pixels: what a README's text has on its host's page
SMALLEST = 8  # pixels of a letter's font size
MARGIN = 1  # pixels by which a text may leave the canvas
OVERLAP_WIDTH = 2  # pixels of two texts, along the lower one, that may lie over one another
OVERLAP_HEIGHT = 1 / 3  # of the lower one's height, likewise
ALTERNATIVE = 10  # characters of an image's alternative text
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
READMES = ("README.md", "CONTRIBUTING.md")
PATIENCE = 120_000  # milliseconds: a busy machine is slow to start a browser

# ---- what the browser draws ----

# A text's box is that of its ink. getBBox gives the em box, from the font's ascent to its descent,
# 1.16 of the font size in DejaVu Sans where a capital has .73: two labels one under the other, with
# air between them, would overlap. So the ink of each letter is measured on a canvas, so large that
# rounding to pixels is nothing, and laid where the browser has put the letter. A line's box is the
# rectangle around its letters along its own baseline; the screen's matrix makes it a quadrilateral,
# so that a slanted label is not taken for the upright rectangle around it.
MEASURE = r"""
(width) => {
  const root = document.documentElement;
  const broken = document.querySelector("parsererror");
  if (broken) return {error: `is no XML: ${broken.textContent}`};
  if (!root.hasAttribute("viewBox")) return {error: "has no viewBox, so that nothing scales it"};
  const view = root.viewBox.baseVal;
  const height = width * view.height / view.width;
  root.setAttribute("width", width);
  root.setAttribute("height", height);

  const isShown = x => x.checkVisibility({opacityProperty: true, visibilityProperty: true});
  const hasLetters = x => x.textContent.trim() !== "";
  const texts = [...document.querySelectorAll("text")].filter(x => hasLetters(x) && isShown(x));
  // matplotlib's groups: the lines of one label
  const groups = [...document.querySelectorAll("g")].filter(x => /^text_\d+$/.test(x.id));

  // left, top, right and bottom of a letter from its origin, at font size 1
  const pen = new OffscreenCanvas(1, 1).getContext("2d");
  const known = new Map();
  function inkOf(letter, style) {
    const font = `${style.fontStyle} ${style.fontWeight} 1000px ${style.fontFamily}`;
    if (!known.has(font + letter)) {
      pen.font = font;
      const ink = pen.measureText(letter);
      const start = [-ink.actualBoundingBoxLeft, -ink.actualBoundingBoxAscent];
      const end = [ink.actualBoundingBoxRight, ink.actualBoundingBoxDescent];
      known.set(font + letter, [...start, ...end].map(x => x / 1000));
    }
    return known.get(font + letter);
  }

  // what has letters of its own: in a formula, each letter is a tspan
  function leavesOf(line) {
    const spans = [...line.querySelectorAll("tspan")].filter(hasLetters);
    return spans.length ? spans : [line];
  }

  // the letters that the browser counts: runs of spaces are one, and none at the ends
  function lettersOf(leaf) {
    const raw = leaf.textContent;
    if (raw.length === leaf.getNumberOfChars()) return raw;
    const shown = raw.replace(/[ \t\r\n]+/g, " ").replace(/^ | $/g, "");
    if (shown.length !== leaf.getNumberOfChars()) throw new Error(`cannot count "${raw}"`);
    return shown;
  }

  function cornersOf(line) {
    let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
    for (const leaf of leavesOf(line)) {
      const style = getComputedStyle(leaf);
      const size = parseFloat(style.fontSize);
      let index = 0;
      for (const letter of lettersOf(leaf)) {
        const {x, y} = leaf.getStartPositionOfChar(index);
        const ink = inkOf(letter, style);
        index += letter.length;
        if (ink[0] === ink[2]) continue;  // a space
        [left, top] = [Math.min(left, x + size * ink[0]), Math.min(top, y + size * ink[1])];
        [right, bottom] = [Math.max(right, x + size * ink[2]), Math.max(bottom, y + size * ink[3])];
      }
    }
    const corners = [[left, top], [right, top], [right, bottom], [left, bottom]];
    const matrix = line.getScreenCTM();
    return corners.map(([x, y]) => new DOMPoint(x, y).matrixTransform(matrix)).map(p => [p.x, p.y]);
  }

  function measured(lines) {
    const sizes = [], families = new Set();
    for (const line of lines) {
      const {a, b, c, d} = line.getScreenCTM();
      for (const leaf of leavesOf(line)) {
        const style = getComputedStyle(leaf);
        sizes.push(parseFloat(style.fontSize) * Math.sqrt(Math.abs(a * d - b * c)));
        families.add(style.fontFamily.split(",")[0].replaceAll('"', ""));
      }
    }
    const words = lines.map(line => leavesOf(line).map(leaf => leaf.textContent).join(""));
    return {
      words: words.join(" ").trim(),
      lines: lines.map(cornersOf),
      size: Math.min(...sizes),
      families: [...families],
    };
  }

  // matplotlib writes a comment with the text where it draws it as paths (or sets a formula)
  function commentsOf(group) {
    const nodes = document.createNodeIterator(group, NodeFilter.SHOW_COMMENT);
    const found = [];
    for (let node = nodes.nextNode(); node; node = nodes.nextNode()) found.push(node.data.trim());
    return found.join(" ");
  }

  // the frame around a text is a patch in its group; everything else but <text> draws letters
  function isDrawn(group) {
    const marks = [...group.querySelectorAll("use, path")];
    const glyphs = marks.filter(x => !x.closest("defs, g[id^=patch_]"));
    const hasText = group.querySelector("text") !== null;
    if (glyphs.length === 0) return !hasText && commentsOf(group) !== "";
    return glyphs.some(x => isShown(x) && (x.tagName === "use" || !hasText));
  }

  const labels = groups.map(group => texts.filter(text => group.contains(text)));
  const others = texts.filter(text => !labels.flat().includes(text)).map(text => [text]);
  return {
    height,
    texts: [...labels.filter(lines => lines.length > 0), ...others].map(measured),
    drawn: groups.filter(isDrawn).map(commentsOf),
  };
}
"""

Point = tuple[float, float]


class Text(NamedTuple):
    "A text of a figure, in pixels."

    words: str
    lines: list[list[Point]]  # of each line the four corners, the first three along its letters
    size: float  # of its smallest letter
    families: list[str]  # the first of each list of fonts

    def __str__(self) -> str:
        return repr(self.words if len(self.words) <= 40 else f"{self.words[:37]}...")


class Figure(NamedTuple):
    "What a browser shows of an SVG file."

    height: float
    texts: list[Text]
    drawn: list[str]  # texts whose letters are paths


def browser() -> str | None:
    "The path of an installed browser."
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def lacking() -> str:
    "What is not installed of that which looks at figures, and what installs it; empty if all is."
    parts = []
    if browser() is None:
        parts.append("no Chromium (make browser)")
    if shutil.which("fc-match") is None:
        parts.append("no fc-match (make browser)")
    if find_spec("playwright") is None:
        parts.append("no playwright (make setup)")
    return ", ".join(parts)


@contextmanager
def opened() -> Iterator[Callable[[Path], Figure]]:
    """A browser, as a function that looks at an SVG file; it raises ValueError for a broken one.

    While it is open, an event loop runs in this thread.
    """
    # not a part of the study's environment
    from playwright.sync_api import sync_playwright

    with sync_playwright() as drivers:
        chromium = drivers.chromium.launch(executable_path=browser(), timeout=PATIENCE)
        page = chromium.new_page(viewport={"width": WIDTH, "height": WIDTH})
        page.set_default_timeout(PATIENCE)

        def look(path: Path) -> Figure:
            page.goto(path.resolve().as_uri())
            found = page.evaluate(MEASURE, WIDTH)
            if "error" in found:
                raise ValueError(found["error"])
            texts = [Text(**text) for text in found["texts"]]
            return Figure(found["height"], texts, found["drawn"])

        yield look
        chromium.close()


# ---- geometry ----


def cross(a: Point, b: Point, c: Point) -> float:
    "Twice the signed area of a triangle."
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def intersection(polygon: list[Point], window: list[Point]) -> list[Point]:
    "What two convex polygons share (Sutherland and Hodgman 1974); empty where they share nothing."
    # the window's corners may go round either way
    turn = 1 if cross(*window[:3]) > 0 else -1
    for a, b in zip(window, window[1:] + window[:1]):
        kept = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1]):
            side_p, side_q = turn * cross(a, b, p), turn * cross(a, b, q)
            if side_p >= 0:
                kept.append(p)
            if side_p * side_q < 0:
                part = side_p / (side_p - side_q)
                kept.append((p[0] + part * (q[0] - p[0]), p[1] + part * (q[1] - p[1])))
        polygon = kept
    return polygon


def extent(polygon: list[Point], a: Point, b: Point) -> float:
    "The length of a polygon in the direction from a to b."
    x, y = b[0] - a[0], b[1] - a[1]
    along = [(x * p[0] + y * p[1]) / hypot(x, y) for p in polygon]
    return max(along) - min(along)


def height_of(line: list[Point]) -> float:
    "The height of a line of text, across its letters."
    return hypot(line[3][0] - line[0][0], line[3][1] - line[0][1])


def overlap(one: list[Point], other: list[Point]) -> tuple[float, float]:
    "Width and height in pixels of what two lines share, along and across the lower one."
    shared = intersection(one, other)
    if not shared:
        return 0, 0
    lower = min(one, other, key=height_of)
    return extent(shared, lower[0], lower[1]), extent(shared, lower[0], lower[3])


# ---- the faults of a figure ----


def small_letters(figure: Figure) -> Iterator[str]:
    "Letters below the smallest size, exponents among them."
    for text in figure.texts:
        # sizes are read and scaled in single precision
        if text.size < SMALLEST - 0.01:
            yield f"{text} has letters of {text.size:.1f} px, at least {SMALLEST}"


def cut_texts(figure: Figure) -> Iterator[str]:
    "Texts that leave the canvas."
    for text in figure.texts:
        x = [point[0] for line in text.lines for point in line]
        y = [point[1] for line in text.lines for point in line]
        beyond = {
            "left": -min(x),
            "right": max(x) - WIDTH,
            "top": -min(y),
            "bottom": max(y) - figure.height,
        }
        for side, by in beyond.items():
            if by > MARGIN:
                yield f"{text} leaves the canvas by {by:.0f} px, {side}"


def overlapping_texts(figure: Figure) -> Iterator[str]:
    "Pairs of texts one over the other; the lines of one text may touch."
    for one, other in itertools.combinations(figure.texts, 2):
        for a, b in itertools.product(one.lines, other.lines):
            width, height = overlap(a, b)
            lower = min(height_of(a), height_of(b))
            if width > OVERLAP_WIDTH and height > OVERLAP_HEIGHT * lower:
                yield f"{one} and {other} overlap by {width:.0f} x {height:.0f} px"
                break


def drawn_texts(figure: Figure) -> Iterator[str]:
    "Texts that are no text."
    for words in figure.drawn:
        yield f"{words!r} is drawn as paths, not written as text"


@cache
def stand_in(family: str) -> str:
    "The family that this machine takes for another one; the same where it is installed."
    escaped = re.sub(r"([\\:,-])", r"\\\1", family)
    done = subprocess.run(
        ["fc-match", "-f", "%{family}", escaped], check=True, capture_output=True, text=True
    )
    # a face may bear several names
    names = done.stdout.split(",")
    return family if family.lower() in map(str.lower, names) else names[0]


def typefaces(figure: Figure) -> Iterator[str]:
    "Several typefaces, as where formulas have their own, and such as are not installed."
    families = sorted({family for text in figure.texts for family in text.families})
    if len(families) > 1:
        yield f"has texts in {len(families)} typefaces: {', '.join(families)}"
    for family in families:
        if stand_in(family) != family:
            yield f"{family} is not installed: texts are measured in {stand_in(family)}"


def figure_faults(path: Path, look: Callable[[Path], Figure]) -> list[str]:
    "All faults of an SVG file."
    try:
        figure = look(path)
    except ValueError as error:
        return [f"{path}: {error}"]
    rules = (drawn_texts, typefaces, small_letters, cut_texts, overlapping_texts)
    return [f"{path}: {fault}" for rule in rules for fault in rule(figure)]


# ---- the README ----


def tracked(*patterns: str) -> list[str]:
    "The files that git tracks, from the folder we are in."
    done = subprocess.run(
        ["git", "ls-files", "-z", "--", *patterns], check=True, capture_output=True, text=True
    )
    return done.stdout.split("\0")[:-1]


def plain(tokens: list[dict]) -> str:
    "The letters of a heading or of an alternative text."
    parts = []
    for token in tokens:
        if token["type"] in ("text", "codespan"):
            parts.append(token["raw"])
        elif token["type"] != "image":
            parts.append(plain(token.get("children", [])))
    return "".join(parts)


class Document(HTMLParser):
    "The links, images and anchors of a Markdown file, and of the HTML in it."

    def __init__(self, text: str):
        # comes with nbconvert
        import mistune

        super().__init__()
        self.links: list[str] = []
        self.images: list[tuple[str, str]] = []  # with their alternative texts
        self.anchors: list[str] = []
        self.visit(mistune.create_markdown(renderer="ast", plugins=["table"])(text))

    def visit(self, tokens: list[dict]) -> None:
        "Gather from tokens and from all that is inside them; code has nothing inside."
        for token in tokens:
            kind, inside = token["type"], token.get("children", [])
            if kind == "link":
                self.links.append(token["attrs"]["url"])
            elif kind == "image":
                self.images.append((token["attrs"]["url"], plain(inside)))
            elif kind == "heading":
                self.anchors.append(self.anchor(plain(inside)))
            elif kind in ("block_html", "inline_html"):
                self.feed(token["raw"])
            self.visit(inside)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors += [values[name] for name in ("id", "name") if name in values]
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "img":
            self.images.append((values.get("src", ""), values.get("alt", "")))

    def anchor(self, heading: str) -> str:
        "GitHub's name of a heading: lower case, hyphens for blanks, a number from the second on."
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        numbered = (f"{name}-{number}" for number in itertools.count(1))
        return next(x for x in itertools.chain([name], numbered) if x not in self.anchors)


def target_of(path: str, place: str) -> str:
    "The path that a link from a document at a path means; `/` is the repository's root."
    if not place:
        return path
    if place.startswith("/"):
        return normpath(place.lstrip("/"))
    return normpath(join(dirname(path), place))


def link_fault(document: Document, path: str, url: str, files: set[str]) -> str:
    "What is wrong with a link from a document at a path; empty where nothing is."
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return ""
    if not parts.path and not parts.fragment:
        return "leads nowhere"
    target = target_of(path, unquote(parts.path))
    folder = "" if target == "." else f"{target}/"
    if target not in files and not any(name.startswith(folder) for name in files):
        return "is no file that git tracks"
    if not parts.fragment or not target.endswith(".md"):
        return ""
    if target != path:
        document = Document(Path(target).read_text(encoding="utf-8"))
    return "" if unquote(parts.fragment) in document.anchors else "is no heading"


def readme_faults(path: str) -> list[str]:
    "All faults of a Markdown file: links that lead nowhere, images that say nothing."
    files = set(tracked())
    document = Document(Path(path).read_text(encoding="utf-8"))
    found = []
    for url in [*document.links, *(url for url, _ in document.images)]:
        fault = link_fault(document, path, url, files)
        if fault:
            found.append(f"{path}: {url!r} {fault}")
    for url, words in document.images:
        if len(words.strip()) < ALTERNATIVE:
            found.append(
                f"{path}: {url!r} has an alternative text of {len(words.strip())} characters, "
                f"at least {ALTERNATIVE}"
            )
    return found


# ---- all of it ----


def main(names: list[str]) -> None:
    names = names or tracked("figures/*.svg", *READMES)
    figures = [Path(name) for name in names if name.endswith(".svg")]
    found = [fault for name in names if name.endswith(".md") for fault in readme_faults(name)]
    unseen = figures and lacking()
    if unseen:
        found.append(f"figures were not looked at: {unseen}")
    elif figures:
        with opened() as look:
            found += [fault for path in figures for fault in figure_faults(path, look)]
    if found:
        sys.exit("\n".join(found) + f"\n{len(found)} faults")
    print(f"{len(names)} files, without a fault: {len(figures)} figures in a browser")


if __name__ == "__main__":
    main(sys.argv[1:])
