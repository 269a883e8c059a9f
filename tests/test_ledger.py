"""The file of claims holds together, and the ledger gives each the verdict that its runs allow."""

import json, math, os, shutil
from pathlib import Path
import pandas as pd, pytest
from vqstudy import cells, records
from vqstudy.quantizers import recipes
from vqstudy.stats import PLACES, SOURCES, Contrast, holds, interval, load_claims, paired, verdict

ROOT = Path(__file__).parents[1]
CLAIMS = load_claims(ROOT / "data" / "claims.toml")
PLANNED = """huh_fig01_covariate_shift huh_tab01_collapse_prevention huh_fig02_divergence huh_fig03_toy_dynamics huh_tab02_classification huh_tab03_reconstruction huh_fig04_maskgit_curves huh_tab09_maskgit_fid
huh_fig11_maskgit_samples huh_fig05_warmup huh_fig06_gradient_gap huh_fig07_activation huh_a05_p_active huh_fig08_initialisation huh_fig09_early_collapse huh_fig10_affine_toy huh_tab10_alternation huh_a02_ema_is_commitment
huh_a10_bounds huh_ablations huh_errata fifty_fig_gradient_field fifty_fig_himmelblau fifty_tab01_vqvae fifty_tab02_05_paradigms fifty_fig_ablations kalomaze_router kalomaze_fig_router_toy kalomaze_flow_decoder
vqvae_collapse_remedies vqvae_posterior_collapse vqvae_prior_samples bench_search bench_router bench_overhead""".split()  # the figures of the study, there or to come


def test_every_document_is_heard():
    count = {
        source: sum(claim.source == source and not claim.ours for claim in CLAIMS)
        for source in SOURCES
    }
    assert len(CLAIMS) >= 60 and count["huh2023"] >= 40 and min(count.values()) >= 5, count
    assert len({claim.text + claim.compared for claim in CLAIMS}) == len(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_a_claim_names_what_there_is(claim):
    for table in (claim.where, claim.a, claim.b):
        if isinstance(table, dict) and "method" in table:
            assert table["method"] in recipes()
    if claim.figure:
        assert claim.figure in PLANNED
    else:
        assert claim.sweep in cells.sweeps() or any(
            stem == claim.sweep or stem.startswith(claim.sweep + "_") for stem in PLANNED
        )
        assert (
            claim.a != claim.b
            and "toy" not in claim.scales
            and (claim.scales == [place for place in PLACES if place in claim.scales])
        )
    if claim.sweep in cells.sweeps():
        known = cells.parameters(cells.sweep(claim.sweep)["notebook"])
        for table in (claim.where, claim.a, claim.b):
            assert not isinstance(table, dict) or table.keys() <= known.keys()


@pytest.mark.parametrize(
    "claim",
    [claim for claim in CLAIMS if claim.sweep in cells.sweeps()],
    ids=lambda claim: claim.id,
)
def test_a_claim_finds_one_row_a_seed_in_the_planned_grid(claim):
    both = 0
    for place in (place for place in claim.scales if place in cells.sweep(claim.sweep)["scales"]):
        rows = pd.DataFrame([cell.parameters for cell in cells.plan(claim.sweep, place)])
        rows = rows[holds(rows, claim.where)]
        sides = [
            rows[holds(rows, table)] for table in (claim.a, claim.b) if isinstance(table, dict)
        ]
        for side in sides:
            assert not side.seed.duplicated().any(), (
                f"{place}: {len(side)} rows for {side.seed.nunique()} seeds"
            )
        both += all(len(side) for side in sides)
    assert both, "no scale that can decide it plans its rows"


@pytest.mark.parametrize(
    "claim", [claim for claim in CLAIMS if claim.published is not None], ids=lambda claim: claim.id
)
def test_the_published_effect_would_reproduce_the_claim(claim):
    effect = math.log(claim.published) if claim.unit == "ratio" else claim.published
    assert verdict(Contrast(*[effect] * 3), claim.says, claim.limit) == "reproduced"


def test_large_claims_are_not_decided_by_small_runs():
    for claim in CLAIMS:
        if "65,536" in claim.text:
            assert not {"toy", "desk"} & set(claim.scales)
        if claim.sweep.startswith("fifty_tab") or claim.where.get("dataset") == "celeba":
            assert "desk" not in claim.scales


def test_committed_ledger_has_every_claim():
    text = (ROOT / "figures" / "ledger.md").read_text(encoding="utf-8")
    for claim in CLAIMS:
        assert claim.text in text, f"{claim.id} is not in figures/ledger.md: run `make figures`"


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
HEAD = '[metrics]\nmse = "lower"\n'


def notebook(path, source, tag="parameters"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            dict(
                cells=[
                    dict(
                        cell_type="code",
                        id="c",
                        metadata=dict(tags=[tag]),
                        source=source,
                        outputs=[],
                        execution_count=None,
                    )
                ],
                metadata={},
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )


def claim(name, source, **keys):
    keys = (
        dict(
            id=name,
            source=source,
            place="p",
            text=f"text of {name}",
            metric="mse",
            says="lower",
            smallest=0.1,
        )
        | keys
    )
    show = lambda x: (
        "{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in x.items()) + "}"
        if isinstance(x, dict)
        else json.dumps(x)
    )
    return "[[claim]]\n" + "".join(f"{key} = {show(value)}\n" for key, value in keys.items())


def contrast(name, method, **keys):
    return claim(
        name,
        "huh2023",
        sweep="walks",
        where=dict(dataset="street"),
        a=dict(method=method),
        unit="ratio",
        scales=["desk", "gpu"],
        **dict(b=dict(method="vq")) | keys,
    )


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = vqstudy\n")
    notebook(tmp_path / "nbs/runs/walk.ipynb", WALK)
    notebook(tmp_path / "nbs/figs/toy.ipynb", "x = 1")
    (tmp_path / "nbs/sweeps").mkdir()
    (tmp_path / "nbs/sweeps/walks.yaml").write_text(
        f"{{notebook: walk, grid: {{method: {json.dumps(list(ERRORS))}}}, seeds: [0, 1, 2], scales: {{smoke: {{fixed: {{dataset: photos}}}}, desk: {{}}, gpu: {{seeds: [0]}}}}}}"
    )
    (tmp_path / "figures").mkdir()
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/claims.toml").write_text(
        HEAD
        + "".join(
            [
                contrast("reproduced", "vq + l2"),
                contrast("contradicted", "vq + replace"),
                contrast("undecided", "vq + ema"),
                contrast("failed", "gumbel"),
                contrast("diverged", "sq"),
                contrast("absent", "router"),
                contrast("no-worse", "vq + l2", says="not higher", ours=True),
                contrast("stated", "vq + l2", b=0.9, says="higher"),
                claim(
                    "toy-exact",
                    "fifty2024",
                    figure="toy",
                    contrast="one against two",
                    scales=["toy"],
                    says="equal",
                ),
                claim(
                    "toy-seeds",
                    "router-post",
                    figure="toy",
                    contrast="three against four",
                    scales=["toy"],
                ),
                claim(
                    "toy-unheard",
                    "vqvae-primer",
                    figure="toy",
                    contrast="five against six",
                    scales=["toy"],
                ),
            ]
        )
    )
    return tmp_path


def leave(scale):
    for cell in cells.plan("walks", scale):
        error = ERRORS[cell.parameters["method"]][cell.parameters["seed"]]
        status = "failed" if error is None else "diverged" if error == math.inf else "done"
        record = records.make_record(
            cell.id,
            cell.parameters,
            dict(fingerprint=cell.fingerprint),
            status,
            {} if status == "failed" else dict(mse=error),
            {},
            "ValueError: no" if status == "failed" else "",
        )
        if status == "failed":
            records.write(cell.work / "failed.json", json.dumps(record))
        else:
            records.save_record(cell.folder, record, [dict(epoch=1, loss=1.0)])
    records.collect("walks", scale)


def draw(project, scale=""):
    "Run the ledger in the project; its claims' rows, by the name in the text, each a list of fields."
    import papermill

    papermill.execute_notebook(
        ROOT / "nbs/figs/ledger.ipynb",
        project / "out.ipynb",
        dict(scale=scale),
        cwd=project,
        progress_bar=False,
        kernel_name="python3",
    )
    lines = (
        (project / "figures" / ("smoke" if scale == "smoke" else "") / "ledger.md")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    split = [
        [field.strip() for field in line.strip("|").split("|")]
        for line in lines
        if "| text of " in line
    ]
    return {fields[2].removeprefix("text of "): fields for fields in split}


def test_ledger_from_results_to_verdicts(project):
    leave("desk"), leave("gpu")
    records.evidence("toy", {"toy-exact": 1e-9, "toy-seeds": interval([-0.5, -0.6, -0.4])})
    rows = draw(project)
    assert {name: fields[-1] for name, fields in rows.items()} == {
        "reproduced": "reproduced at desk",
        "contradicted": "contradicted at desk (short of the smallest effect)",
        "undecided": "undecided at desk",
        "failed": "undecided at desk (1 pair failed; 2 whole pairs, too few)",
        "diverged": "undecided at desk (1 pair diverged; 2 whole pairs, too few)",
        "absent": "not measured",
        "no-worse": "reproduced at desk",
        "stated": "contradicted at desk (below the stated value)",
        "toy-exact": "reproduced in a toy",
        "toy-seeds": "reproduced in a toy",
        "toy-unheard": "not measured",
    }
    expected = paired(dict(enumerate(ERRORS["vq + l2"])), dict(enumerate(ERRORS["vq"])), "ratio")
    mean, low, high = (f"×{math.exp(x):.3g}" for x in expected[:3])
    assert rows["reproduced"][-4:-1] == [
        f"{mean} [{low}, {high}]",
        "3",
        "desk",
    ]  # desk has three seeds, gpu only one
    assert rows["toy-exact"][-4:-1] == ["+1e-09 (exact)", "", "toy"] and rows["absent"][-4:-1] == [
        "",
        "",
        "",
    ]
    drawn = {path.name: path.read_bytes() for path in (project / "figures").glob("ledger.*")}
    assert (
        set(drawn) == {"ledger.md", "ledger.svg"}
        and "| all | 4 | 2 | 3 | 2 |" in drawn["ledger.md"].decode()
        and "6 contrasts have an interval over at least 3 seeds" in drawn["ledger.md"].decode()
    )
    assert {
        "| huh2023 | 1 | 2 | 3 | 1 |",
        "| our questions | 1 | 0 | 0 | 0 |",
        "| toy | 2 | 0 | 0 |",
        "| desk | 1 | 2 | 3 |",
        "| gpu | 0 | 0 | 0 |",
    } <= set(drawn["ledger.md"].decode().splitlines())
    assert rows["no-worse"][1] == "p (our question)" and rows["reproduced"][1] == "p"
    draw(project)
    assert drawn == {
        path.name: path.read_bytes() for path in (project / "figures").glob("ledger.*")
    }


def test_ledger_gives_no_verdict_on_smoke(project):
    leave("smoke")
    verdicts = {name: fields[-1] for name, fields in draw(project, "smoke").items()}
    assert (
        verdicts["reproduced"] == "smoke decides nothing"
        and verdicts["failed"] == "smoke decides nothing (1 pair failed)"
        and verdicts["absent"] == verdicts["toy-exact"] == "not measured"
    )
    assert not (project / "figures" / "ledger.md").exists()


def test_evidence_of_older_code_is_marked_and_of_a_stranger_refused(project):
    leave("desk")
    notebook(project / "nbs/runs/walk.ipynb", WALK + "  # the same parameters, other code")
    records.evidence("toy", {"toy-exact": 1e-9})
    notebook(project / "nbs/figs/toy.ipynb", "x = 2")
    rows = draw(project)
    assert (
        rows["reproduced"][-1] == "reproduced at desk (evidence by older code)"
        and rows["toy-exact"][-1] == "reproduced in a toy (evidence by older code)"
    )
    records.evidence("toy", {"reproduced": 1e-9})
    with pytest.raises(
        Exception, match="toy gives evidence on reproduced, which claims.toml leaves to nobody"
    ):
        draw(project)
    os.rename(project / "nbs/figs/toy.ipynb", project / "nbs/figs/toys.ipynb")
    with pytest.raises(FileNotFoundError, match="toy"):
        records.gathered()
    shutil.copy(project / "nbs/figs/toys.ipynb", project / "nbs/figs/toy.ipynb")
    records.evidence("toys", {"reproduced": 1e-9})
    with pytest.raises(ValueError, match="claim reproduced: toy and toys both give evidence"):
        records.gathered()
