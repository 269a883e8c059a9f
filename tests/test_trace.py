"""Every number that the README and the figure notebooks state can be traced.

Its source is a row of `data/results`, something a notebook shows, or the document it quotes.
"""

import ast
import json
import math
import re
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / ".ci"))
import readme  # noqa: E402

FIGURES = sorted((ROOT / "nbs/figs").glob("*.ipynb"))
INDEX = ROOT / "nbs/index.ipynb"
CLAIMS = tomllib.loads((ROOT / "data/claims.toml").read_text())["claim"]

# What a figure notebook states of its document, its set-up or its time, and nobody measured here.
QUOTED = {
    "fifty_tab01_vqvae": {32, 8192, 0.8},
    "huh_a02_ema_is_commitment": {15},
    "huh_a10_bounds": {15},
    "huh_ablations": {35_156},
    "huh_fig05_warmup": {90},
    "huh_fig06_gradient_gap": {90},
    "huh_fig07_activation": {32, 64, 128, 256},
    "huh_fig09_early_collapse": {0.98, 224, 1024, 196},
    "huh_fig04_maskgit_curves": {1000, 5000},
    "huh_fig11_maskgit_samples": {128},
    "huh_tab01_collapse_prevention": {128, 512},
    "huh_tab03_reconstruction": {90, 16384, 96},
    "huh_tab09_maskgit_fid": {24.8, 40.4, 29.7, 15.6, 4.9, 64, 128, 9000},
    "kalomaze_fig_router_toy": {256},
    "kalomaze_router": {64, 256, 1024, 65_536},
    "kalomaze_flow_decoder": {65536, 1000, 600},
    "ledger": {256},
    "vqvae_posterior_collapse": {10},
    "vqvae_prior_samples": {10, 64, 80, 1000},
}
# The same in the README: versions; numbers of codes, a life span, the name of CIFAR-10, a width.
VERSIONS = {"3.11", "3.13", "2.0"}
SET_UPS = {"8,192", "65,536", "1,024", "20", "10", "150"}

NOT_PROSE = r"```.*?```|`[^`\n]*`|\$[^$]*\$|\]\([^)]*\)|<[^>]*>"  # code, formula, link, tag
PLACE = r"[A-Z]?\.?[\d.]+"  # of a document: figure 7, section 4.3, A.10
PLACED = r"figures?|fig\.|tables?|sections?|eqs?\.|equations?|appendi\w+|erratum|errata|python"
PLACES = (
    rf"(?i)\b({PLACED})\s+{PLACE}((\s*(,|and|to|or|-|–)\s*){PLACE})*"
    r"|A\.\d+|\(\d\.\d\)|their \d\.\d"
    r"|\b95%|\b20[12]\d\b"  # the level of the intervals, years
)
WRITTEN = re.compile(
    r"(?<![\w.,])(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?P<fraction>\.\d+)?"
    r"(?P<power>e-?\d+)?\s?(?P<percent>%)?"
)
UNIT = re.compile(r"(?!x\b|ms\b|s\b)[^\W\d_]")  # what makes a name of a number: 3x3, 2nd
SHOWN = re.compile(
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?"
)


class Number(NamedTuple):
    "A number as it is written, its value, half a unit of its last digit, whether it is per cent."

    written: str
    value: float
    half: float
    percent: bool


def prose(text):
    "Markdown without code, formulas, links, years, places, and the level of the intervals."
    text = re.sub(NOT_PROSE, " ", text, flags=re.S)
    text = re.sub(PLACES, " ", text)
    return re.sub(r"(?<=\d)[.:](?=\s|$|\*)", " ", text)  # the end of a sentence or a list's number


def number(match):
    "The number of a match of WRITTEN."
    whole, fraction, power, percent = match.group("whole", "fraction", "power", "percent")
    digits = (whole or "0").replace(",", "") + (fraction or "")
    half = 0.5 * 10 ** -(len(fraction or ".") - 1) * 10 ** int((power or "e0")[1:])
    return Number(match.group().strip(), float(digits + (power or "")), half, bool(percent))


def stated(text):
    "The numbers of a text that look measured. Whole numbers below ten are words."
    text = prose(text)
    for match in WRITTEN.finditer(text):
        if not (match["whole"] or match["fraction"]):
            continue
        found = number(match)
        is_plain = not (match["fraction"] or match["power"] or match["percent"])
        if is_plain and found.value < 10:
            continue
        is_joined = match.group() == match.group().rstrip() and not match["percent"]
        if is_joined and UNIT.match(text[match.end() :]):
            continue
        yield found


@cache
def cells(path, kind):
    "The sources of a notebook's cells of a kind, with their outputs."
    found = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]
    return [("".join(cell["source"]), cell.get("outputs", [])) for cell in found]


def stated_in(path):
    "Each number that a notebook's prose states, with the beginning of its cell."
    return [(each, text[:60]) for text, _ in cells(path, "markdown") for each in stated(text)]


def texts_of(output):
    data = output.get("data", {})
    texts = ["".join(value) for kind, value in data.items() if kind.startswith("text")]
    return ["".join(output.get("text", "")), *texts]


def ratios(path):
    "The numbers of an evidence file, where ratios stand as logarithms, as ratios."
    claims = json.loads(path.read_text())["claims"].values()
    logarithms = [claim[key] for claim in claims for key in ("effect", "low", "high")]
    return [math.exp(x) for x in logarithms if x is not None and abs(x) < 50]


@cache
def shown(path):
    """Every number that a figure notebook shows or computes with.

    They are those of its code, its outputs, its drawing, its table, its evidence and its claims.
    """
    texts = [str(claim) for claim in CLAIMS if claim.get("figure") == path.stem]
    for source, outputs in cells(path, "code"):
        texts.append(source)
        texts += [text for output in outputs for text in texts_of(output)]
    table, evidence = f"figures/{path.stem}.md", f"data/results/toys/{path.stem}.json"
    texts += [(ROOT / name).read_text() for name in (table, evidence) if (ROOT / name).is_file()]
    drawing = ROOT / f"figures/{path.stem}.svg"
    if drawing.is_file():
        texts += re.findall(r"<text[^>]*>([^<]*)", drawing.read_text())
    values = {float(word.replace(",", "")) for text in texts for word in SHOWN.findall(text)}
    if (ROOT / evidence).is_file():
        values |= set(ratios(ROOT / evidence))
    return sorted(values)


def traced(value, half, percent, known):
    "Whether a value is one of those known, to its last digit and perhaps in another unit."
    factors = (1, 100) if percent else (1, 1000, 0.001)
    allowed = half * (1 + 1e-9)
    return any(abs(each * factor - value) <= allowed for each in known for factor in factors)


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_what_a_figure_notebook_says_it_also_shows(path):
    known, quoted = shown(path), QUOTED.get(path.stem, set())
    lost = [
        (each.written, cell)
        for each, cell in stated_in(path)
        if each.value not in quoted and not traced(*each[1:], known)
    ]
    assert not lost, f"stated, and neither shown nor quoted: {lost}"


def digits_of(written):
    "The number of its significant digits."
    return len(re.sub(r"e.*|\D", "", written).lstrip("0"))


def noticed(path):
    "For each number of three digits or more, up and down: whether a wrong last digit is found out."
    known = shown(path)
    return [
        not traced(each.value + sign * 6 * each.half, each.half, each.percent, known)
        for each, _ in stated_in(path)
        if digits_of(each.written) >= 3
        for sign in (-1, 1)
    ]


def test_a_wrong_number_would_be_noticed():
    "Most are, in most notebooks that have many; the rest happen to be shown somewhere else."
    found = [noticed(path) for path in FIGURES]
    shares = [sum(each) / len(each) for each in found if len(each) >= 10]
    # a swept toy shows so many numbers that a third is all that can be asked of it
    assert len(shares) >= 5 and min(shares) > 0.3 and sorted(shares)[len(shares) // 2] > 0.6, shares


def typed(source):
    "The measured-looking numbers in the string literals of an expression."
    constants = [node.value for node in ast.walk(source) if isinstance(node, ast.Constant)]
    return {n.written for text in constants if isinstance(text, str) for n in stated(text)}


def test_the_readme_says_what_the_results_say_now(monkeypatch):
    """The cells that fill README's slots are run again; README.md is the notebook with them.

    Neither its prose nor these sentences have a measured number by hand.
    """
    monkeypatch.chdir(INDEX.parent)
    names, by_hand = {}, {each.written for each, _ in stated_in(INDEX)}
    for source, _ in cells(INDEX, "code"):
        if not source.startswith(("#| hide", "#| slots")):
            continue
        body = ast.parse(source).body
        by_hand |= {written for statement in body for written in typed(statement)}
        last = body.pop() if source.startswith("#| slots") else None
        exec(compile(ast.Module(body, []), "index", "exec"), names)
    values = eval(compile(ast.Expression(last.value), "index", "eval"), names)
    notebook = nbformat.read(INDEX, as_version=4)
    assert readme.slots(notebook) == values, "execute nbs/index.ipynb again"
    assert (ROOT / "README.md").read_text() == readme.readme(notebook), "make readme"
    by_hand -= VERSIONS | SET_UPS
    assert not by_hand, f"numbers written by hand into nbs/index.ipynb: {by_hand}"


def index(*cells):
    "A notebook of Markdown, and of cells that show something, given as pairs."
    made = nbformat.v4.new_notebook()
    for cell in cells:
        if isinstance(cell, str):
            made.cells.append(nbformat.v4.new_markdown_cell(cell))
            continue
        source, value = cell
        shown = nbformat.v4.new_output("execute_result", {"text/plain": repr(value)})
        made.cells.append(nbformat.v4.new_code_cell(source, outputs=[shown]))
    return made


def test_slots_are_filled_and_only_they():
    filled = index("# A", "so {{gap}}", ("#| slots\nvalues", dict(gap="1.07")))
    assert readme.readme(filled) == "# A\n\nso 1.07\n"
    with pytest.raises(ValueError, match="the slot gap has no value; known: other"):
        readme.readme(index("so {{gap}}", ("#| slots\nvalues", dict(other="1"))))
    with pytest.raises(ValueError, match="no slot takes the value other"):
        readme.readme(index("so {{gap}}", ("#| slots\nvalues", dict(gap="1", other="2"))))


def test_the_readme_is_short():
    "Words before the layout, without code, tags, links' targets and rulers of tables."
    text = (ROOT / "README.md").read_text().partition("## Layout")[0]
    text = re.sub(r"```.*?```|<[^>]*>|\]\([^)]*\)|[|*`-]", " ", text, flags=re.S)
    assert 300 < len(text.split()) < 1000
