"""Every number that the README and the figure notebooks state can be traced: to rows of `data/results`, to what a notebook shows, or to the document that it quotes."""

import ast, json, math, re, tomllib
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
FIGURES = sorted((ROOT / "nbs/figs").glob("*.ipynb"))
INDEX = ROOT / "nbs/index.ipynb"

# What a figure notebook states of its document, its set-up or its time, and nobody measured here.
QUOTED = {
    "huh_a02_ema_is_commitment": {15},
    "huh_a10_bounds": {15},
    "huh_fig10_affine_toy": {0.71, 0.55},  # seconds; square roots of .5 and .3
    "huh_fig09_early_collapse": {0.98, 224, 1024, 196},
    "huh_tab03_reconstruction": {90, 16384, 96},
    "kalomaze_fig_router_toy": {256},
    "ledger": {256},
}
NUMBER = re.compile(
    r"(?<![\w.,])(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?P<frac>\.\d+)?(?P<exp>e-?\d+)?\s?(?P<percent>%)?"
)
PLACE = r"[A-Z]?\.?[\d.]+"  # of a document: figure 7, section 4.3, A.10


def prose(text):
    "Markdown without code, formulas, links, years, places in a document, and the level of the intervals."
    text = re.sub(r"```.*?```|`[^`\n]*`|\$[^$]*\$|\]\([^)]*\)|<[^>]*>", " ", text, flags=re.S)
    text = re.sub(
        rf"(?i)\b(figures?|fig\.|tables?|sections?|eqs?\.|equations?|appendi\w+|erratum|errata|python)\s+{PLACE}((\s*(,|and|to|or|-|–)\s*){PLACE})*|A\.\d+|\(\d\.\d\)|their \d\.\d|\b95%|\b20[12]\d\b",
        " ",
        text,
    )
    return re.sub(r"(?<=\d)[.:](?=\s|$|\*)", " ", text)


def stated(text):
    "The measured-looking numbers of a text: (as written, value, half a unit of its last digit, whether in per cent). Whole numbers below ten are words."
    for match in NUMBER.finditer(text := prose(text)):
        whole, frac, exp, percent = match.group("whole", "frac", "exp", "percent")
        if not (whole or frac) or (
            whole and not frac and not exp and not percent and float(whole.replace(",", "")) < 10
        ):
            continue
        if (
            not percent
            and re.match(r"(?!x\b|ms\b|s\b)[^\W\d_]", text[match.end() :])
            and match.group() == match.group().rstrip()
        ):
            continue  # 3x3, 2nd
        half = 0.5 * 10 ** -(len(frac or ".") - 1) * 10 ** int((exp or "e0")[1:])
        yield (
            match.group().strip(),
            float((whole or "0").replace(",", "") + (frac or "") + (exp or "")),
            half,
            bool(percent),
        )


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def shown(path):
    "Every number that a figure notebook shows or computes with: its code, its outputs, its drawing and table, its evidence, its claims."
    texts = []
    for cell in cells(path, "code"):
        texts.append("".join(cell["source"]))
        for out in cell["outputs"]:
            texts += [
                "".join(out.get("text", "")),
                *(
                    "".join(value)
                    for kind, value in out.get("data", {}).items()
                    if kind.startswith("text")
                ),
            ]
    texts += [
        file.read_text()
        for file in (ROOT / f"figures/{path.stem}.md", ROOT / f"data/results/toys/{path.stem}.json")
        if file.is_file()
    ]
    drawing = ROOT / f"figures/{path.stem}.svg"
    texts += re.findall(r"<text[^>]*>([^<]*)", drawing.read_text()) if drawing.is_file() else []
    claims = tomllib.loads((ROOT / "data/claims.toml").read_text())["claim"]
    texts += [str(claim) for claim in claims if claim.get("figure") == path.stem]
    evidence = ROOT / f"data/results/toys/{path.stem}.json"  # ratios stand there as logarithms
    ratios = (
        [
            math.exp(x)
            for claim in json.loads(evidence.read_text())["claims"].values()
            for x in (claim["effect"], claim["low"], claim["high"])
            if x is not None and abs(x) < 50
        ]
        if evidence.is_file()
        else []
    )
    return sorted(
        {
            *ratios,
            *(
                float(n.replace(",", ""))
                for text in texts
                for n in re.findall(
                    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?",
                    text,
                )
            ),
        }
    )


def traced(value, half, percent, known):
    return any(
        abs(number * factor - value) <= half * (1 + 1e-9)
        for number in known
        for factor in ((1, 100) if percent else (1, 1000, 0.001))
    )


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_what_a_figure_notebook_says_it_also_shows(path):
    known, quoted = shown(path), QUOTED.get(path.stem, set())
    lost = [
        (word, "".join(cell["source"])[:60])
        for cell in cells(path, "markdown")
        for word, value, half, percent in stated("".join(cell["source"]))
        if value not in quoted and not traced(value, half, percent, known)
    ]
    assert not lost, f"stated, and neither shown nor quoted: {lost}"


def test_a_wrong_number_would_be_noticed():
    "Another last digit in any number of three digits or more: most are found out, in every notebook that has many (the rest happen to be shown somewhere else)."
    shares = {}
    for path in FIGURES:
        known, found = shown(path), []
        for cell in cells(path, "markdown"):
            for word, value, half, percent in stated("".join(cell["source"])):
                if len(re.sub(r"e.*|\D", "", word).lstrip("0")) >= 3:
                    found += [
                        not traced(value + sign * 6 * half, half, percent, known)
                        for sign in (-1, 1)
                    ]
        if len(found) >= 10:
            shares[path.stem] = sum(found) / len(found)
    assert len(shares) >= 5 and min(shares.values()) > 0.4, shares


def test_the_readme_says_what_the_results_say_now(monkeypatch):
    "The README's cells that write sentences from results are run again; what they write stands in README.md. Neither its prose nor these sentences have a measured number by hand."
    monkeypatch.chdir(INDEX.parent)
    readme, names, written, typed = (
        (ROOT / "README.md").read_text(),
        {},
        [],
        [word for cell in cells(INDEX, "markdown") for word, *_ in stated("".join(cell["source"]))],
    )
    for source in ("".join(cell["source"]) for cell in cells(INDEX, "code")):
        if not (kind := re.match(r"#\| (output|hide)", source)):
            continue
        *body, last = (
            ast.parse(source).body if kind[1] == "output" else [*ast.parse(source).body, None]
        )
        exec(compile(ast.Module(body, []), "index", "exec"), names)
        if last is None:
            continue
        written.append(
            eval(compile(ast.Expression(last.value), "index", "eval"), names).data.strip()
        )
        typed += [
            word
            for node in ast.walk(last)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            for word, *_ in stated(node.value)
        ]
    assert len(written) >= 3
    for text in written:
        assert text.replace("](../", "](") in readme, f"the README does not say now: {text[:200]}"
    said = (
        set(typed) - {"3.11", "3.13", "2.0"} - {"8,192", "65,536", "1,024", "90", "10"}
    )  # versions; set-ups: numbers of codes, the paper's epochs, CIFAR-10
    assert not said, f"numbers written by hand into nbs/index.ipynb: {said}"
