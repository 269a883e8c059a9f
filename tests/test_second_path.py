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
from vqstudy.cells import sweep, sweeps
from vqstudy.records import unplanned
from vqstudy.rule import WORDS, compare_sides, find, handed_over, judge, off_scale
from vqstudy.stats import PLACES, SAYS, Contrast, inner_usage, interval, load_claims

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests/recompute.py"
LEDGER = (ROOT / "figures/ledger.md").read_text(encoding="utf-8")
OURS = recompute.words(ROOT)
ROWS = {name: row for name, row in recompute.read_ledger(LEDGER).items() if row["scale"]}


def test_a_second_path_gives_the_ledgers_words():
    assert list(recompute.differences(OURS, LEDGER)) == []
    assert len(ROWS) > 30 and {row["kind"] for row in ROWS.values()} == {"identity", "toy", "run"}


def test_the_second_path_stands_alone(tmp_path):
    tree = ast.parse(SCRIPT.read_text())
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "scipy"}
    command = [sys.executable, "-I", SCRIPT]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "the ledger agrees\n"), run.stdout + run.stderr


def test_the_list_of_cells_that_no_plan_has_is_that_of_the_plans():
    drawn = {name: sweep(name)["figures"] for name in sweeps()}
    claims = load_claims(ROOT / "data/claims.toml")
    names = {name for name in drawn for c in claims if name == c.sweep or c.figure in drawn[name]}
    cells = {name: {place: unplanned(name, place) for place in PLACES[1:]} for name in names}
    cells = {name: {place: ids for place, ids in each.items() if ids}
             for name, each in cells.items()}
    listed = recompute.unplanned_cells(ROOT / "data/results")
    advice = "data/results/unplanned.json is old: draw the ledger again"
    assert listed == {name: each for name, each in cells.items() if each}, advice


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
    "no interval": (r" \[[-+\d.]+, [-+\d.]+\]", ""),
    "no effect": (r"\| [×+-][^<|]*<br>(?=\d+ seeds)", "| <br>"),
    "no p": (r"<br>p [\d.e-]+ \([\d.e-]+\)", ""),
}


@pytest.mark.parametrize("column", OTHER)
def test_a_changed_number_is_seen(column):
    old, new = OTHER[column]
    whole = (n for n, row in ROWS.items() if row["seeds"].isdigit() and "[" in row["effect [95%]"])
    found = list(recompute.differences(OURS, planted(name := next(whole), old, new)))
    assert len(found) == 1 and found[0].startswith(f"{name}: ")


@pytest.mark.parametrize("answer, other", [("yes", "not as claimed"), ("no", "as claimed")])
def test_a_changed_answer_is_seen(answer, other):
    name = next(name for name, row in ROWS.items() if row["as claimed"] == answer)
    for new in (f"<br>{other}", ""):
        found = list(recompute.differences(OURS, planted(name, "<br>(not )?as claimed", new)))
        assert len(found) == 1 and found[0].startswith(f"{name}: as claimed {answer!r}")


def test_a_claim_that_is_missing_or_too_many_is_seen():
    name = next(iter(ROWS))
    without = "\n".join(line for line in LEDGER.split("\n") if f'<a id="{name}">' not in line)
    assert list(recompute.differences(OURS, without)) == [f"{name}: only in claims.toml"]
    more = planted(name, f'"{name}"', '"nobody-says-so"')
    assert "nobody-says-so: only in the ledger" in list(recompute.differences(OURS, more))


# ---- what figures find in runs ----


@pytest.mark.parametrize("stem", recompute.FIGURES)
def test_a_figure_hands_over_what_its_runs_say(stem):
    whole = json.loads((ROOT / f"data/results/toys/{stem}.json").read_text())
    scale, of_figure = whole["scale"], recompute.FIGURES[stem][1]
    found = of_figure(ROOT / "data/results", scale)
    assert found.keys() == whole["claims"].keys()
    for name, values in whole["claims"].items():
        effects, base, _ = found[name]
        ours = recompute.summary(effects) | ({"base": base} if base else {})
        theirs = {key: values[key] for key in ours}
        assert ours == pytest.approx(theirs, rel=1e-5), name


def project_of(folder):
    "A project beside this one, whose files are those of this one until they are replaced."
    (folder / "data/results/toys").mkdir(parents=True)
    for path in [ROOT / "data/claims.toml", *(ROOT / "data/results").glob("**/*.*")]:
        if path.suffix in (".toml", ".csv", ".json") and "samples" not in path.parts:
            (folder / path.relative_to(ROOT)).symlink_to(path)
    return folder


CHANGED = {
    "huh_fig06": ("vq + l2 + alt", "gap", {"huh-fig06-alternation-narrows-gap"}),
    "huh_fig09": ("vq", "nearest_cq", {"huh-fig09-divergence-grows"}),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_history_is_seen(tmp_path, name):
    method, column, claims = CHANGED[name]
    path = project_of(tmp_path) / f"data/results/{name}.history.csv"
    table, rows = pd.read_csv(path), pd.read_csv(ROOT / f"data/results/{name}.csv")
    mine = table.cell.isin(rows.cell[(rows.method == method) & (rows.seed == 1)])
    table.loc[mine & (table.step > 0), column] *= 7
    path.unlink()
    table.to_csv(path, index=False)
    found = list(recompute.differences(recompute.words(tmp_path), LEDGER))
    assert {line.partition(":")[0] for line in found} == claims


def leave_runs(folder, sweep, runs, scale):
    "The table and histories of runs: (cell, row, steps by number)."
    same = dict(scale=scale, num_codes=256, updates=24, inner=1)
    rows = [same | dict(cell=cell, status="done") | row for cell, row, _ in runs]
    pd.DataFrame(rows).to_csv(folder / f"{sweep}.csv", index=False)
    lines = [dict(cell=cell, scale=scale, step=step) | values
             for cell, _, steps in runs for step, values in steps.items()]
    pd.DataFrame(lines).to_csv(folder / f"{sweep}.history.csv", index=False)


def test_the_first_steps_by_hand(tmp_path):
    def steps(codes, end):
        "The active codes after one step, and at the end."
        calm = dict(active_codes=200, nearest_cq=3.0, relative_error=0.5, gap=2.0, gap_relative=1.0)
        run = {step: dict(calm) for step in (*range(17), 20, 24)}
        run[1] |= dict(active_codes=codes, gap_relative=0.8)
        run[7] |= dict(relative_error=1.5, gap=3.0)
        run[15] |= dict(active_codes=12, nearest_cq=6.0)
        run[16] |= dict(relative_error=99.0, gap=99.0)
        run[24] |= dict(active_codes=end, gap_relative=0.2)
        return run

    runs = [(f"c{seed}", dict(method="vq", seed=seed), steps(64, 12)) for seed in range(3)]
    other = dict(method="vq + alt", seed=0)
    strange = [("alt", other, steps(9, 200)), ("old", dict(method="vq", seed=3), steps(9, 200))]
    strange.append(("lost", dict(method="vq", seed=4, status="failed"), steps(9, 200)))
    leave_runs(tmp_path, "huh_fig09", runs + strange, "paper")
    (tmp_path / "unplanned.json").write_text('{"huh_fig09": {"paper": ["old"]}}')
    found = recompute.first_steps(tmp_path, "paper")
    ends = {"half-idle-after-one-step": (math.log(64.5 / 192.5), 0.5, 1)}
    ends["collapse-within-16-steps"] = math.log(12.5 / 244.5 * 19), 0.05, 15
    ends |= {"divergence-grows": (math.log(2), None, 15), "error-jumps": (math.log(3), None, 15)}
    ends["gap-spikes"] = math.log(1.5), None, 15
    ends = {f"huh-fig09-{name}": end for name, end in ends.items()}
    ends["huh-gap-falls-with-collapse"] = math.log(0.25), None, 24
    assert found.keys() == ends.keys()
    for name, (effect, base, updates) in ends.items():
        assert found[name][0] == pytest.approx(dict.fromkeys(range(3), effect)), name
        assert found[name][1:] == (base, updates), name
    runs[0] = ("c0", dict(method="vq", seed=0), steps(64, 13))  # 5.1% of the codes: no collapse
    leave_runs(tmp_path, "huh_fig09", runs, "paper")
    assert "huh-gap-falls-with-collapse" not in recompute.first_steps(tmp_path, "paper")


def test_the_late_gap_by_hand(tmp_path):
    def steps(*late):
        "Gap and relative gap after 100 and 200 steps."
        early = {0: dict(gap=1e9, gap_relative=1e9)}
        return early | {100 * (i + 1): dict(gap=g, gap_relative=r) for i, (g, r) in enumerate(late)}

    alternated, joint = steps((1, 0.5), (4, 0.7)), steps((4, 0.9), (16, 0.9))
    runs = [(f"a{s}", dict(method="vq + l2 + alt", seed=s), alternated) for s in range(3)]
    runs += [(f"j{s}", dict(method="vq + l2", seed=s), joint) for s in range(4)]
    leave_runs(tmp_path, "huh_fig06", runs, "desk")
    inner = [("i0", dict(method="vq + l2 + alt", seed=0, inner=4), steps((9e9, 9), (9e9, 9)))]
    leave_runs(tmp_path, "huh_fig06_inner", inner, "desk")
    found = recompute.late_gap(tmp_path, "desk")
    ends = {"gap": math.log(0.25), "relative-gap": -0.3}
    for name, effect in ends.items():
        effects, base, updates = found.pop(f"huh-fig06-alternation-narrows-{name}")
        assert effects == pytest.approx(dict.fromkeys(range(3), effect))
        assert (base, updates) == (None, 24)
    assert not found


# ---- a constructed ledger ----

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


HEAD = """### Huh et al. 2023: runs

| claim | contrast | effect | word | from |
| --- | --- | --- | --- | --- |
"""


def constructed(tmp_path, published):
    "Our words on one claim with the document's effect, and a ledger that says the same."
    (tmp_path / "data/results").mkdir(parents=True)
    text = METRICS + claim_text(1, "lower", "mse", "mechanism", '{method = "b"}')
    (tmp_path / "data/claims.toml").write_text(f"{text}published = {published}\n")
    runs = [("a", s, x) for s, x in enumerate((0.49, 0.5, 0.51))] + [("b", s, 1) for s in range(3)]
    rows = pd.DataFrame(runs, columns=["method", "seed", "mse"])
    rows = rows.assign(cell=range(6), dataset="x", scale="gpu", status="done", updates=100)
    rows = rows.assign(deep=rows.method == "a")
    rows.to_csv(tmp_path / "data/results/walks.csv", index=False)
    ours = recompute.words(tmp_path)
    one = ours["claim-1"]
    effect = "×{:.3f} [{:.3f}, {:.3f}]<br>3 seeds<br>".format(*one["ends"])
    effect += f"document ×{published}, {'inside' if published == 0.5 else 'outside'}"
    word = f"**same direction** at gpu, 100 updates<br>as claimed<br>p {one['p']:.2g} "
    word += f"({one['adjusted']:.2g})"
    return ours, f'{HEAD}| <a id="claim-1"></a>t | c | {effect} | {word} | f |\n'


@pytest.mark.parametrize("published, inside", [(0.5, "inside"), (0.3, "outside")])
def test_a_documents_effect_on_the_other_side_of_our_interval_is_seen(tmp_path, published, inside):
    ours, text = constructed(tmp_path, published)
    assert ours["claim-1"]["in size"] == inside and not list(recompute.differences(ours, text))
    other = {"inside": "outside", "outside": "inside"}[inside]
    faults = {f", {inside}": f", {other}", f"×{published}, ": "×0.77, ", "as claimed": "nothing"}
    for old, new in faults.items():
        assert len(list(recompute.differences(ours, text.replace(old, new)))) == 1, old
    left_out = re.sub("<br>document[^|]*", " ", text)
    found = list(recompute.differences(ours, left_out))
    assert found[0] == f"claim-1: document {published}, the ledger says ''"


# ---- both paths on constructed tables ----

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


def both_paths(tmp_path, seed, monkeypatch, lost=lambda rows: rows):
    """The words of a constructed project by either path; what stands beside them is compared here.

    lost: takes values out of the rows.
    """
    monkeypatch.setattr("vqstudy.stats.bootstrap", lambda *_: (math.nan, math.nan))
    rng = np.random.default_rng(seed)
    cases = list(product(SAYS, ("mse", "usage"), ("final", "mechanism")))
    b = ['{method = "b"}', "0.7"]
    texts = [claim_text(i, *case, b[i % 7 == 0]) for i, case in enumerate(cases)]
    (tmp_path / "data/results").mkdir(parents=True)
    path = tmp_path / "data/claims.toml"
    path.write_text(METRICS + "".join(texts))
    lost(random_rows(rng)).to_csv(tmp_path / "data/results/walks.csv", index=False)
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


LOST = {
    "no mse": lambda rows: rows.drop(columns="mse"),
    "on one side": lambda rows: rows.assign(mse=rows.mse.where(rows.method == "b")),
}


@pytest.mark.parametrize("what", LOST)
def test_both_paths_take_no_word_from_a_stand_in(tmp_path, monkeypatch, what):
    for seed in range(3):
        first, second = both_paths(tmp_path / str(seed), seed, monkeypatch, LOST[what])
        assert first == second, seed
        claims = load_claims(tmp_path / str(seed) / "data/claims.toml")
        errors = {c.id: bool(c.stand_in) for c in claims if c.metric == "mse"}
        assert {True, False} == {*errors.values()}
        words = {True: "cannot decide", False: "not measured"}
        assert {name: first[name] for name in errors} == {n: words[x] for n, x in errors.items()}


def share_claim(says):
    name = says.replace(" ", "-")
    return f"""[[claim]]
id = "share-{name}"
source = "huh2023"
place = "p"
text = "t"
figure = "f"
contrast = "c"
metric = "usage"
says = "{says}"
smallest = 0.02
published = -0.2
scales = ["gpu"]
kind = "run"
about = "mechanism"
"""


@pytest.mark.parametrize("codes", [(90, 93, 88), (120, 135, 131), (250, 256, 251)])
def test_both_paths_agree_on_shares_that_figures_hand_over(tmp_path, codes):
    (tmp_path / "data/results/toys").mkdir(parents=True)
    path = tmp_path / "data/claims.toml"
    path.write_text(METRICS + "".join(map(share_claim, SAYS)))
    claims = load_claims(path)
    active = {seed: inner_usage(k / 256, 256) for seed, k in enumerate(codes)}
    one = compare_sides(active, 0.5, "usage", "logit")
    fields = one.contrast._asdict() | dict(base=one.base)
    fields = {key: None if x != x else x for key, x in fields.items()}
    whole = dict(scale="gpu", claims={c.id: fields for c in claims})
    (tmp_path / "data/results/toys/f.json").write_text(json.dumps(whole))
    found = {c.id: handed_over(c, one.contrast, "gpu", None, one.base) for c in claims}
    first = {name: verdict.word for name, verdict in judge(claims, found).items()}
    second = recompute.words(tmp_path)
    assert {name: two["word"] for name, two in second.items()} == first
    ends = [off_scale(x, "logit", one.base) for x in one.contrast[:3]]
    for two in second.values():
        np.testing.assert_allclose(two["ends"], ends)


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
