"""The words of the ledger, found again by a script that shares no code with it."""

import ast
import json
import math
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import recompute
from vqstudy.cells import sweeps
from vqstudy.records import unplanned
from vqstudy.rule import WORDS, find, handed_over, judge, off_scale
from vqstudy.stats import SAYS, Contrast, interval, load_claims

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests/recompute.py"
LEDGER = (ROOT / "figures/ledger.md").read_text(encoding="utf-8")
# which rows are planned is no verdict: the second path is told
UNPLANNED = {
    name: [cell for scale in ("desk", "gpu", "paper") for cell in unplanned(name, scale)]
    for name in {claim.sweep for claim in load_claims(ROOT / "data/claims.toml")}
    if (ROOT / f"data/results/{name}.csv").is_file() and name in sweeps()
}
OURS = recompute.words(ROOT, UNPLANNED)
ROWS = {name: row for name, row in recompute.read_ledger(LEDGER).items() if row["scale"]}


def test_a_second_path_gives_the_ledgers_words():
    assert list(recompute.differences(OURS, LEDGER)) == []
    assert len(ROWS) > 30 and {row["kind"] for row in ROWS.values()} == {"identity", "toy", "run"}


def test_the_second_path_knows_nothing_of_the_package():
    tree = ast.parse(SCRIPT.read_text())
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "scipy"}
    told = json.dumps(UNPLANNED)
    run = subprocess.run([sys.executable, "-I", SCRIPT, ROOT, told], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "the ledger agrees\n"), run.stdout + run.stderr


def planted(name, old, new):
    "The ledger with a change in the row of one claim."
    lines = LEDGER.split("\n")
    i = next(i for i, line in enumerate(lines) if f'<a id="{name}">' in line)
    changed = re.sub(old, new, lines[i], count=1)
    assert changed != lines[i]
    return "\n".join([*lines[:i], changed, *lines[i + 1 :]])


# the nearest other word, where that is not the opposite
OTHER_WORD = {"opposite": "undecided", "no effect": "no effect, same side"}


@pytest.mark.parametrize("name", ROWS)
def test_a_changed_word_is_seen(name):
    word = OURS[name]["word"]
    text = planted(name, rf"\*\*{word}\*\*", f"**{OTHER_WORD.get(word, 'opposite')}**")
    found = list(recompute.differences(OURS, text))
    assert len(found) == 1 and found[0].startswith(f"{name}: {word}, the ledger says ")


# what stands in each column of a row that has seeds and an interval, and what is planted there
OTHER = {
    "seeds": (r"<br>\d+ seeds", "<br>997 seeds"),
    "effect [95%]": (r"(?<=\d) \[[+-]?", " [+7"),
    "last digit": (r"\d(?=, [+-]?[\d.]+\])", lambda digit: str((int(digit[0]) + 2) % 10)),
    "p (Holm)": (r"<br>p [\d.e-]+ \(", "<br>p 0.512 ("),
}


@pytest.mark.parametrize("column", OTHER)
def test_a_changed_number_is_seen(column):
    old, new = OTHER[column]
    whole = (n for n, row in ROWS.items() if row["seeds"].isdigit() and "[" in row["effect [95%]"])
    found = list(recompute.differences(OURS, planted(name := next(whole), old, new)))
    assert len(found) == 1 and found[0].startswith(f"{name}: ")


def test_a_claim_that_is_missing_or_too_many_is_seen():
    name = next(iter(ROWS))
    without = "\n".join(line for line in LEDGER.split("\n") if f'<a id="{name}">' not in line)
    assert list(recompute.differences(OURS, without)) == [f"{name}: only in claims.toml"]
    more = planted(name, f'"{name}"', '"nobody-says-so"')
    assert "nobody-says-so: only in the ledger" in list(recompute.differences(OURS, more))


# ---- both paths on constructed tables ----

METRICS = '[metrics]\nmse = "lower"\nusage = "higher"\nst = "lower"\n'


def claim_text(i, says, metric, about, b):
    unit = 'unit = "ratio"\n' if metric == "mse" else ""
    stand_in = 'stand_in = "st"\n' if i % 3 == 0 and metric == "mse" else ""
    return f"""[[claim]]
id = "claim-{i}"
source = "huh2023"
place = "p"
text = "t"
sweep = "walks"
where = {{dataset = ["x", "y"]}}
a = {{method = "a", deep = true}}
b = {b}
metric = "{metric}"
{unit}{stand_in}says = "{says}"
smallest = 0.05
scales = ["desk", "gpu"]
kind = "run"
about = "{about}"
document_updates = 5000
"""


def random_rows(rng):
    "Two methods, one to three lengths, two to five seeds, some lost, at two scales."
    table = []
    gain = rng.choice([-0.6, -0.2, -0.02, 0, 0.02, 0.3])
    spread = rng.choice([1e-4, 0.002, 0.2])
    seeds = int(rng.integers(2, 6))
    chosen = sorted(rng.choice([100, 400, 450, 1600], rng.integers(1, 4), replace=False))
    for scale, more in (("desk", 0), ("gpu", -3)):
        for updates in chosen:
            for method in "ab":
                for seed in range(max(seeds + more, 0)):
                    part = gain * (method == "a") * (updates / 400) ** rng.choice([0.0, 0.3])
                    x = math.exp(rng.normal(part, spread))
                    active = rng.binomial(64, 1 / (1 + math.exp(-2 * part)))
                    status = rng.choice(["done"] * 30 + ["failed", "diverged"])
                    row = dict(scale=scale, dataset="x", method=method, seed=seed, status=status)
                    row |= dict(updates=updates, num_codes=64, deep=method == "a")
                    if status == "done":
                        row |= dict(mse=x, usage=active / 64, st=x + 1)
                    table.append(row | dict(cell=f"{method}{seed}{scale}"))
    return pd.DataFrame(table)


def first_path(claims, rows):
    "The words by the package, of the largest scale with three pairs."
    findings = {}
    for claim in claims:
        places = {place: rows[rows.scale == place] for place in ("gpu", "desk")}
        each = [find(claim, part, place) for place, part in places.items() if len(part)]
        each = [one for one in each if one]
        three = [one for one in each if sum(one.contrast[5:]) >= 3]
        findings[claim.id] = (three or each or [None])[0]
    return findings, judge(claims, findings)


def both_paths(tmp_path, seed, monkeypatch):
    "The words of a constructed project by either path; what stands beside them is compared here."
    monkeypatch.setattr("vqstudy.stats.bootstrap", lambda *_: (math.nan, math.nan))
    rng = np.random.default_rng(seed)
    cases = list(product(SAYS, ("mse", "usage"), ("final", "mechanism")))
    b = ['{method = "b"}', "0.7"]
    texts = [claim_text(i, *case, b[i % 7 == 0]) for i, case in enumerate(cases)]
    (tmp_path / "data/results").mkdir(parents=True)
    path = tmp_path / "data/claims.toml"
    path.write_text(METRICS + "".join(texts))
    random_rows(rng).to_csv(tmp_path / "data/results/walks.csv", index=False)
    rows = pd.read_csv(tmp_path / "data/results/walks.csv")
    findings, verdicts = first_path(load_claims(path), rows)
    second = recompute.words(tmp_path)
    for name, one in second.items():
        found = findings[name]
        if found:
            assert (one["scale"], one["updates"]) == (found.scale, found.updates)
            unit, base = found.measured.unit, found.measured.base
            ours = [off_scale(x, unit, base) for x in found.contrast[:3]]
            np.testing.assert_allclose(one["ends"], ours, rtol=1e-9, atol=1e-12)
    first = {name: verdict.word for name, verdict in verdicts.items()}
    return first, {name: one["word"] for name, one in second.items()}


def test_both_paths_agree_on_constructed_tables(tmp_path, monkeypatch):
    earned = set()
    for seed in range(25):
        first, second = both_paths(tmp_path / str(seed), seed, monkeypatch)
        assert first == second, seed
        earned |= set(first.values())
    assert earned == set(WORDS) - {"not measured"}


def test_both_paths_agree_on_evidence_of_figures(tmp_path):
    text = METRICS + "".join(
        f'[[claim]]\nid = "toy-{says.replace(" ", "-")}"\nsource = "huh2023"\nplace = "p"\n'
        f'text = "t"\nfigure = "f"\ncontrast = "c"\nmetric = "mse"\nsays = "{says}"\n'
        'smallest = 0.1\nscales = ["toy"]\nkind = "toy"\n'
        for says in SAYS
    )
    (tmp_path / "data/results/toys").mkdir(parents=True)
    path = tmp_path / "data/claims.toml"
    path.write_text(text)
    claims = load_claims(path)
    several = [[0.3, 0.31, 0.29], [0.01, 0.02, -0.01, 0.0], [-0.4, -0.2, -0.3], [0.2], [0.1, 0.4]]
    for effects in several:
        mean, low, high, n = interval(effects)
        fields = dict(effect=mean, low=low, high=high, n=n)
        fields = {key: None if x != x else x for key, x in fields.items()}
        whole = dict(scale="toy", claims={c.id: fields for c in claims})
        (tmp_path / "data/results/toys/f.json").write_text(json.dumps(whole))
        found = {c.id: handed_over(c, Contrast(mean, low, high, n=n), "toy") for c in claims}
        words = {name: verdict.word for name, verdict in judge(claims, found).items()}
        assert {name: one["word"] for name, one in recompute.words(tmp_path).items()} == words
