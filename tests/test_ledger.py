"""The file of claims holds together, and the ledger gives each the word that its runs allow."""

import functools
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
import pandas as pd
import papermill
import pytest
from projects import leave, new_project, notebook
from recompute import read_ledger
from vqstudy import cells, files, records
from vqstudy.configure import RECIPE_PARAMETERS
from vqstudy.figures import effect_text
from vqstudy.quantizers import keywords, recipe
from vqstudy.rule import as_claimed, margin_of, on_scale, word_of
from vqstudy.stats import PLACES, SOURCES, Contrast, holds, interval, load_claims, paired

ROOT = Path(__file__).parents[1]
CLAIMS = load_claims(ROOT / "data" / "claims.toml")
IN_SWEEPS = [claim for claim in CLAIMS if claim.sweep in cells.sweeps()]
PLANNED_SWEEPS = [claim for claim in CLAIMS if claim.sweep and claim not in IN_SWEEPS]
PUBLISHED = [claim for claim in CLAIMS if claim.published is not None]

# the figures of the study, there or to come
PLANNED = """
huh_fig01_covariate_shift huh_tab01_collapse_prevention huh_fig02_divergence huh_fig03_toy_dynamics
huh_tab02_classification huh_tab03_reconstruction huh_fig04_maskgit_curves huh_tab09_maskgit_fid
huh_fig11_maskgit_samples huh_fig05_warmup huh_fig06_gradient_gap huh_fig07_activation
huh_a05_p_active huh_a07_rectified huh_fig08_initialisation huh_fig09_early_collapse
huh_fig10_affine_toy
huh_tab10_alternation huh_a02_ema_is_commitment huh_a10_bounds huh_ablations huh_errata
fifty_fig_gradient_field fifty_fig_himmelblau fifty_tab01_vqvae fifty_tab02_05_paradigms
fifty_fig_ablations fifty_fig_gradients kalomaze_router kalomaze_router_map
kalomaze_fig_router_toy
kalomaze_flow_decoder vqvae_collapse_remedies vqvae_posterior_collapse vqvae_prior_samples
bench_search bench_router bench_overhead
""".split()


def name_of(claim):
    return claim.id


def test_every_document_has_claims():
    documents = [claim.source for claim in CLAIMS if not claim.ours]
    count = {source: documents.count(source) for source in SOURCES}
    assert len(CLAIMS) >= 60 and count["huh2023"] >= 40 and min(count.values()) >= 5, count
    assert len({claim.text + claim.compared for claim in CLAIMS}) == len(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_a_claim_names_what_there_is(claim):
    tables = [table for table in (claim.where, claim.a, claim.b) if isinstance(table, dict)]
    for table in tables:
        if "method" in table:
            keywords(table["method"])  # raises for what is no recipe
    if claim.figure:
        assert claim.figure in PLANNED
        return
    # huh_tab02 and huh_tab02_nu both belong to a figure that begins with huh_tab02
    heads = ["_".join(stem.split("_")[:2]) for stem in PLANNED]
    stems = [head for head in heads if f"{claim.sweep}_".startswith(f"{head}_")]
    assert claim.sweep in cells.sweeps() or stems
    assert claim.a != claim.b and "toy" not in claim.scales
    assert claim.scales == [place for place in PLACES if place in claim.scales]
    if claim in IN_SWEEPS:
        known = cells.parameters(cells.sweep(claim.sweep)["notebook"])
        assert all(table.keys() <= known.keys() for table in tables)


# ---- sweeps to come: their columns, and what they vary ----

# beside those of nbs/runs/reconstruct.ipynb, by the sweep of whose notebook they will be parameters
TO_COME = {
    "fifty_tab02_05": {"paradigm"},
}
RECONSTRUCT = cells.parameters("reconstruct")


def sides(claim):
    "The rows that a claim compares, each as all columns that it names."
    return [claim.where | side for side in (claim.a, claim.b) if isinstance(side, dict)]


def each_of(value):
    return value if isinstance(value, list) else [value]


def is_a_value(name, value):
    "Whether a field of a table can hold this value of a column of the run notebook."
    kind = RECONSTRUCT[name].type
    if kind is dict:  # as text
        return isinstance(value, str) and files.text(json.loads(value)) == value
    if kind is float and isinstance(value, int):
        return not isinstance(value, bool)
    return type(value) is kind


@pytest.mark.parametrize("claim", PLANNED_SWEEPS, ids=name_of)
def test_a_sweep_to_come_has_the_columns_of_its_claims(claim):
    own = TO_COME.get(claim.sweep, set())
    for side in sides(claim):
        lost = side.keys() - RECONSTRUCT.keys() - own
        assert not lost, f"{claim.sweep} has no column {', '.join(lost)}"
        for name in side.keys() - own:
            assert all(is_a_value(name, value) for value in each_of(side[name])), name
        options = json.loads(side.get("recipe_options", "{}"))
        if options:
            recipe(side["method"], 4, 16, **options)


@pytest.mark.parametrize("sweep", TO_COME)
def test_a_column_to_come_is_named_by_a_claim_and_not_there_yet(sweep):
    assert sweep not in cells.sweeps(), "its notebook says now what columns it has"
    mine = [side for claim in CLAIMS if claim.sweep == sweep for side in sides(claim)]
    assert TO_COME[sweep] <= set().union(*mine) and not TO_COME[sweep] & RECONSTRUCT.keys()


def counts_for(name, method):
    "Whether a column can tell rows of a method apart: not where the recipe does not take it."
    taken = RECIPE_PARAMETERS.get(name)
    return taken is None or method is None or taken in keywords(method)


def left_free(side, planned):
    """The columns that a side does not name and in which two rows that it may mean differ.

    planned: what the claims of its sweep name. A row of any method counts, since a grid has every
    method with all values, if all else that it names is named by the side, and the same.
    """
    free = {}
    for other in planned:
        for name in other.keys() - side.keys():
            rest = {key: x for key, x in other.items() if key not in (name, "method")}
            if rest.items() <= side.items() and counts_for(name, side.get("method")):
                free.setdefault(name, set()).add(other[name])
    return {name for name, values in free.items() if len(values) > 1}


def hashable(side):
    return {name: tuple(x) if isinstance(x, list) else x for name, x in side.items()}


@pytest.mark.parametrize("claim", PLANNED_SWEEPS, ids=name_of)
def test_a_claim_leaves_no_column_free_that_another_varies(claim):
    mine = [other for other in PLANNED_SWEEPS if other.sweep == claim.sweep]
    planned = [hashable(side) for other in mine for side in sides(other)]
    for side in sides(claim):
        free = left_free(hashable(side), planned)
        assert not free, f"{side} leaves {', '.join(sorted(free))} free"


def test_what_a_side_leaves_free():
    narrow, wide = (dict(method="router", num_codes=8, code_dim=d) for d in (16, 64))
    beta = [dict(method="vq", code_dim=64, beta=x) for x in (0.5, 0.9)]
    for method in ("router", "vq"):
        assert left_free(dict(method=method, num_codes=8), [narrow, wide]) == {"code_dim"}
    assert not left_free(dict(method="vq", num_codes=4), [narrow, wide])
    assert not left_free(dict(method="vq", num_codes=8), [wide])
    assert left_free(wide, [*beta, dict(method="router", bias=True)]) == set()  # takes no beta
    assert left_free(wide | dict(method="vq + l2"), beta) == {"beta"}


# ---- sweeps that are there ----


def as_in_a_table(value):
    return files.text(value) if isinstance(value, dict) else value


@functools.cache
def planned_rows(sweep, place):
    return pd.DataFrame([cell.parameters for cell in cells.plan(sweep, place)]).map(as_in_a_table)


@pytest.mark.parametrize("claim", IN_SWEEPS, ids=name_of)
def test_a_claim_finds_one_row_a_seed_in_the_planned_grid(claim):
    decidable = False
    for place in claim.scales:
        if place not in cells.sweep(claim.sweep)["scales"]:
            continue
        rows = planned_rows(claim.sweep, place)
        rows = rows[holds(rows, claim.where)]
        tables = [table for table in (claim.a, claim.b) if isinstance(table, dict)]
        sides = [rows[holds(rows, table)] for table in tables]
        for side in sides:
            counts = f"{place}: {len(side)} rows for {side.seed.nunique()} seeds"
            assert not side.seed.duplicated().any(), counts
        decidable |= all(len(side) for side in sides)
    assert decidable, "no scale that can decide it plans its rows"


@pytest.mark.parametrize("claim", PUBLISHED, ids=name_of)
def test_the_published_effect_would_earn_the_word_that_the_claim_says(claim):
    effect = on_scale(claim.published, claim.unit)
    word = word_of(Contrast(*[effect] * 3), claim.says, margin_of(claim)).word
    assert as_claimed(word, claim.says)


def codes_at_desk(claim):
    "The sizes of the codebooks that a claim's desk rows have, or those that they stand on."
    if "num_codes" in claim.where:
        return [claim.where["num_codes"]]
    planned = cells.plan(claim.sweep, "desk")
    return [p.parameters["num_codes"] for cell in planned for p in cell.parents.values()]


def test_large_claims_are_not_decided_by_small_runs():
    for claim in CLAIMS:
        if claim.id.startswith("router-65k"):
            assert "65,536" in claim.text, claim.id
        if "65,536" in claim.text:
            assert "toy" not in claim.scales
            assert "desk" not in claim.scales or set(codes_at_desk(claim)) == {65_536}, claim.id
        if claim.figure == "kalomaze_router_map" and "desk" in claim.scales:
            assert claim.ours and "1,024" in claim.text, claim.id
        if claim.sweep.startswith("fifty_tab02"):
            assert "desk" not in claim.scales


@pytest.mark.parametrize("sweep", ["huh_tab03_celeba", "fifty_tab01"])
def test_a_sweep_s_claims_may_be_decided_at_desk_where_their_methods_run_there(sweep):
    run = {cell.parameters["method"] for cell in cells.plan(sweep, "desk")}
    mine = [claim for claim in CLAIMS if claim.sweep == sweep and "desk" in claim.scales]
    assert mine
    for claim in mine:
        sides = [side for side in (claim.a, claim.b) if isinstance(side, dict)]
        assert {side["method"] for side in sides} <= run, claim.id


LEDGER = (ROOT / "figures/ledger.md").read_text(encoding="utf-8")
COMMITTED = read_ledger(LEDGER)
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")


def test_committed_ledger_has_every_claim():
    assert COMMITTED.keys() == {claim.id for claim in CLAIMS}
    for claim in CLAIMS:
        told = f"{claim.id} is not in figures/ledger.md: run `make figures`"
        assert claim.text in COMMITTED[claim.id]["claim"], told
        assert COMMITTED[claim.id]["kind"] == claim.kind


def test_every_link_of_the_ledger_leads_to_a_file_of_the_repository():
    command = ["git", "ls-files", "--cached", "--", "nbs", "data", "figures"]
    known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    anchors = re.findall(r'<a id="([^"]+)"></a>', LEDGER)
    assert sorted(anchors) == sorted(claim.id for claim in CLAIMS)
    for path, anchor in LINK.findall(LEDGER):
        if path:
            target = os.path.normpath(f"figures/{path}")
            assert target in known.splitlines(), f"ledger.md links to {path}"
        assert not anchor or anchor in anchors, f"ledger.md links to #{anchor}"


@functools.cache
def figures_of_sweeps():
    return {name: cells.sweep(name)["figures"] for name in cells.sweeps()}


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_a_claim_links_to_what_decides_it(claim):
    row = COMMITTED[claim.id]
    names, figures = [claim.sweep], figures_of_sweeps().get(claim.sweep, [])
    if claim.figure:
        names = [name for name, drawn in figures_of_sweeps().items() if claim.figure in drawn]
        figures = [claim.figure]
    wanted = [f"nbs/sweeps/{name}.yaml" for name in names]
    wanted += [f"nbs/figs/{figure}.ipynb" for figure in figures]
    if row["scale"]:
        measured = [name for name in names if row["scale"] in cells.sweep(name)["scales"]]
        wanted += [f"data/results/{name}.json" for name in measured]
        wanted += [f"data/results/toys/{claim.figure}.json"] if claim.figure else []
        assert all((ROOT / path).is_file() for path in wanted)
    there = {f"../{path}" for path in wanted if (ROOT / path).is_file()}
    links = {path for path, _ in LINK.findall(row["from"])}
    assert there <= links and (links or "to come" in row["from"])
    assert f"](#{claim.id})" in row["claim"]


def test_the_first_table_of_the_ledger_counts_the_claims_by_kind():
    "The README shows it."
    table = next(part for part in LEDGER.split("\n\n") if part.startswith("|"))
    head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    counts = pd.DataFrame(rows, columns=head).set_index("kind").astype(int)
    kinds = dict(identity="identities", toy="toys", run="runs")
    measured = [row for row in COMMITTED.values() if row["scale"]]
    for kind, name in kinds.items():
        mine = [row for row in measured if row["kind"] == kind]
        assert counts.claims[name] == sum(claim.kind == kind for claim in CLAIMS)
        assert counts.measured[name] == len(mine) == counts.loc[name, head[3:-1]].sum()
        assert counts["as claimed"][name] == sum(row["as claimed"] == "yes" for row in mine)


# ---- a whole project of constructed results ----

WALK = 'dataset: str = "street"\nmethod: str = "a"\nseed: int = 0\nout: str = ""'
ERRORS = {
    "vq": (1.0, 1.1, 0.9),
    "vq + l2": (0.5, 0.56, 0.44),
    "vq + replace": (1.0, 1.12, 0.9),
    "vq + ema": (0.2, 0.9, 1.6),
    "gumbel": (0.5, None, 0.45),
    "sq": (0.5, math.inf, 0.45),
}
WALKS = f"""
notebook: walk
grid: {{method: {json.dumps(list(ERRORS))}}}
seeds: [0, 1, 2]
scales: {{smoke: {{fixed: {{dataset: photos}}}}, desk: {{}}, gpu: {{seeds: [0]}}}}
"""


def toml(value):
    "A value in TOML; JSON's but for tables."
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ", ".join(f"{key} = {json.dumps(x)}" for key, x in value.items()) + "}"


def claim(name, source, **keys):
    words = dict(id=name, source=source, place="p", text=f"text of {name}")
    kind = dict(kind="toy") if "figure" in keys else dict(kind="run", about="mechanism")
    table = words | kind | dict(metric="mse", says="lower", smallest=0.1) | keys
    return "[[claim]]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in table.items())


def by_sweep(name, method, **keys):
    sides = dict(a=dict(method=method), b=dict(method="vq")) | keys
    where = dict(sweep="walks", where=dict(dataset="street"), scales=["desk", "gpu"])
    return claim(name, "huh2023", unit="ratio", **where, **sides)


def by_figure(name, source, compared, **keys):
    return claim(name, source, figure="toy", contrast=compared, scales=["toy"], **keys)


CONSTRUCTED = [
    by_sweep("reproduced", "vq + l2"),
    by_sweep("contradicted", "vq + replace"),
    by_sweep("undecided", "vq + ema"),
    by_sweep("failed", "gumbel"),
    by_sweep("diverged", "sq"),
    by_sweep("absent", "router"),
    by_sweep("no-worse", "vq + l2", says="not higher", ours=True),
    by_sweep("stated", "vq + l2", b=0.9, says="higher"),
    by_figure("toy-exact", "fifty2024", "one against two", says="equal"),
    by_figure("toy-seeds", "router-post", "three against four"),
    by_figure("toy-unheard", "vqvae-primer", "five against six"),
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    new_project(tmp_path, WALK, "x = 1", walks=WALKS)
    notebook(tmp_path / "nbs/figs/toy.ipynb", "x = 1")
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    (tmp_path / "figures").mkdir()
    claims = '[metrics]\nmse = "lower"\n' + "".join(CONSTRUCTED)
    records.write(tmp_path / "data/claims.toml", claims)
    return tmp_path


def run(scale):
    "Leave the constructed results of a scale, and collect them."
    for cell in cells.plan("walks", scale):
        error = ERRORS[cell.parameters["method"]][cell.parameters["seed"]]
        status = {None: "failed", math.inf: "diverged"}.get(error, "done")
        leave(cell, dict(mse=error), status, history=[dict(epoch=1, loss=1.0)])
    records.collect("walks", scale)


def draw(project, scale=""):
    "Run the ledger in the project; its claims' rows, by id."
    source, target = ROOT / "nbs/figs/ledger.ipynb", project / "executed.ipynb"
    given = dict(scale=scale)
    where = dict(cwd=project, progress_bar=False, kernel_name="python3")
    papermill.execute_notebook(source, target, given, **where)
    figures = project / "figures" / ("smoke" if scale == "smoke" else "")
    return read_ledger((figures / "ledger.md").read_text(encoding="utf-8"))


WORDS = {
    "reproduced": "same direction at desk",
    "contradicted": "no effect at desk",
    "undecided": "undecided at desk",
    "failed": "undecided at desk (1 pair failed; 2 whole pairs, too few)",
    "diverged": "undecided at desk (1 pair diverged; 2 whole pairs, too few)",
    "absent": "not measured",
    "no-worse": "not opposite at desk",
    "stated": "undecided at desk (opposite without the other claims of its table)",
    "toy-exact": "no effect in a toy",
    "toy-seeds": "same direction in a toy",
    "toy-unheard": "not measured",
}
AS_CLAIMED = {"reproduced": "yes", "contradicted": "no", "no-worse": "yes"}
AS_CLAIMED |= {"toy-exact": "yes", "toy-seeds": "yes"}
COUNTS = """
| huh2023 | run | 1 | 0 | 1 | 0 | 4 | 0 | 1 | 1 |
| fifty2024 | toy | 0 | 0 | 1 | 0 | 0 | 0 | 0 | 1 |
| our questions | run | 0 | 1 | 0 | 0 | 0 | 0 | 0 | 1 |
| all | identity | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |
| all | toy | 1 | 0 | 1 | 0 | 0 | 0 | 1 | 2 |
| all | run | 1 | 1 | 1 | 0 | 4 | 0 | 1 | 2 |
| desk | 1 | 0 | 1 | 0 | 4 | 0 | 1 |
| gpu | 0 | 0 | 0 | 0 | 0 | 0 | 0 |
""".strip()


def test_ledger_from_results_to_words(project):
    run("desk")
    run("gpu")
    records.evidence("toy", {"toy-exact": 1e-9, "toy-seeds": interval([-0.5, -0.6, -0.4])})
    rows = draw(project)
    assert {name: fields["word"] for name, fields in rows.items()} == WORDS
    claimed = {name: fields["as claimed"] for name, fields in rows.items() if fields["as claimed"]}
    assert claimed == AS_CLAIMED
    expected = paired(dict(enumerate(ERRORS["vq + l2"])), dict(enumerate(ERRORS["vq"])), "ratio")
    # desk has three seeds, gpu only one
    first = rows["reproduced"]
    assert first["effect [95%]"] == effect_text(expected, "ratio")
    assert [first[name] for name in ("seeds", "scale", "kind")] == ["3", "desk", "run"]
    effect, p = "effect [95%]", "p (Holm)"
    assert [rows["toy-exact"][name] for name in (effect, p)] == ["+1e-09 (exact)", ""]
    assert {rows["absent"][name] for name in (effect, "seeds", "scale", p)} == {""}
    places = [rows[name]["claim"].split("<br>")[1] for name in ("no-worse", "reproduced")]
    assert places == ["p (our question) · [no-worse](#no-worse)", "p · [reproduced](#reproduced)"]
    assert {name for name, row in rows.items() if f"text of {name}<" not in row["claim"]} == set()
    drawn = {path.name: path.read_bytes() for path in (project / "figures").glob("ledger.*")}
    assert set(drawn) == {"ledger.md", "ledger.svg"}
    text = drawn["ledger.md"].decode()
    assert set(COUNTS.splitlines()) <= set(text.splitlines())
    assert "8 claims in 2 tables were tested" in text and "Not read" not in text
    draw(project)
    for name, content in drawn.items():
        assert (project / "figures" / name).read_bytes() == content


def test_ledger_gives_no_word_on_smoke(project):
    run("smoke")
    words = {name: fields["word"] for name, fields in draw(project, "smoke").items()}
    assert words["reproduced"] == "smoke decides nothing"
    assert words["failed"] == "smoke decides nothing (1 pair failed)"
    assert words["absent"] == words["toy-exact"] == "not measured"
    assert not (project / "figures" / "ledger.md").exists()


def lengthen(project, late):
    "Give the rows of the constructed table two lengths; at the longer one vq + l2 is `late` of vq."
    path = project / "data/results/walks.csv"
    rows = pd.read_csv(path)
    other = rows.assign(updates=800)
    vq = rows[rows.method == "vq"].set_index("seed").mse
    l2 = other.method == "vq + l2"
    other.loc[l2, "mse"] = other.seed[l2].map(vq * late + 0.001 * pd.Series([0, 1, -1]))
    pd.concat([rows.assign(updates=200), other]).to_csv(path, index=False)


def settle(project, **keys):
    "The constructed claims with other keys for all of those on runs."
    path = project / "data/claims.toml"
    lines = "".join(f"{key} = {toml(value)}\n" for key, value in keys.items())
    text = path.read_text().replace('about = "mechanism"\n', lines)
    records.write(path, text)


SHORT = "cannot decide at desk, 800 of the document's 10,000 updates"
LATE = [(0.4, "same direction at desk, 800 updates")]
LATE += [(0.8, f"{SHORT} (same direction at this length)")]


@pytest.mark.parametrize("late, word", LATE)
def test_a_final_error_is_decided_at_desk_where_it_carries_on(project, late, word):
    run("desk")
    settle(project, about="final", document_updates=10_000)
    lengthen(project, late)
    fields = draw(project)["reproduced"]
    assert fields["word"] == word and fields["updates"] == "800"
    shown = re.match(r"×([\d.]+) \[", fields["effect [95%]"])
    assert abs(float(shown[1]) - late) < 5e-4 and bool(fields["p (Holm)"]) == (late < 0.5)


def test_rows_measured_before_the_rule_say_so_and_those_after_do_not(project):
    run("desk")
    path, notes = project / "data/claims.toml", project / "data/results/walks.json"
    change = '[[change]]\ncommit = "a"\ndate = "2026-05-01T00:00:00+00:00"\nwhat = "w"\n'
    records.write(path, path.read_text() + change)
    for month, mark in (("04", " (measured before the rule)"), ("06", "")):
        found = json.loads(notes.read_text())
        for cell in found["cells"]["desk"].values():
            cell["started"] = f"2026-{month}-01T00:00:00+00:00"
        notes.write_text(json.dumps(found))
        assert draw(project)["reproduced"]["word"] == f"same direction at desk{mark}"


def test_rows_that_are_no_longer_planned_are_counted_and_not_read(project):
    run("desk")
    path = project / "data/results/walks.csv"
    rows = pd.read_csv(path)
    strange = rows[rows.method == "vq + l2"].assign(cell=["walk-0", "walk-1", "walk-2"], mse=9.0)
    pd.concat([rows, strange]).to_csv(path, index=False)
    assert draw(project)["reproduced"]["word"] == "same direction at desk"
    told = "Not read: 3 rows of cells that their sweep no longer plans (walks at desk 3)."
    assert told in (project / "figures/ledger.md").read_text(encoding="utf-8")


def test_evidence_of_older_code_is_marked_and_of_a_stranger_refused(project):
    run("desk")
    notebook(project / "nbs/runs/walk.ipynb", WALK, "x = 2")  # the same parameters, other code
    records.evidence("toy", {"toy-exact": 1e-9})
    toy = project / "nbs/figs/toy.ipynb"
    notebook(toy, "x = 2")
    rows = draw(project)
    assert rows["reproduced"]["word"] == "same direction at desk (evidence by older code)"
    assert rows["toy-exact"]["word"] == "no effect in a toy (evidence by older code)"
    records.evidence("toy", {"reproduced": 1e-9})
    stranger = "toy gives evidence on reproduced, which claims.toml leaves to nobody"
    with pytest.raises(papermill.PapermillExecutionError, match=stranger):
        draw(project)


def test_evidence_wants_its_notebook_and_a_claim_of_its_own(project):
    records.evidence("toy", {"reproduced": 1e-9})
    toy, toys = project / "nbs/figs/toy.ipynb", project / "nbs/figs/toys.ipynb"
    os.rename(toy, toys)
    with pytest.raises(FileNotFoundError, match="toy"):
        records.gathered()
    shutil.copy(toys, toy)
    records.evidence("toys", {"reproduced": 1e-9})
    with pytest.raises(ValueError, match="claim reproduced: toy and toys both give evidence"):
        records.gathered()
