"""The log of changes in data/claims.toml is complete, and what was measured before one says so."""

import hashlib
import json
import math
import subprocess
import tomllib
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from unittest.mock import patch
import pandas as pd
import pytest
from demo import CLAIM
from vqstudy.rule import Margin, find, judge, last_change, load_changes, margin_of, word_of
from vqstudy.stats import SAYS, Claim, Contrast, load_claims

ROOT = Path(__file__).parents[1]
FILE = ROOT / "data/claims.toml"
CLAIMS, CHANGES = load_claims(FILE), load_changes(FILE)
# what decides a claim; its text, place and source do not
JUDGED = """metric says smallest unit scales kind about document_updates published stand_in
sweep where a b figure contrast ours""".split()


def git(*words, repository=ROOT):
    run = subprocess.run(["git", *words], cwd=repository, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def is_ancestor(old, new, repository=ROOT):
    return git("merge-base", "--is-ancestor", old, new, repository=repository) is not None


needs_history = pytest.mark.skipif(
    git("rev-parse", "--is-shallow-repository") != "false", reason="the history is not here"
)


# ---- margins and contrasts ----


def judged(text):
    "What decides each claim of a file, by id."
    whole = tomllib.loads(text)
    lengths, better = whole.get("document_updates", {}), whole["metrics"]
    tables = {}
    for claim in whole["claim"]:
        trained = lengths.get(claim.get("sweep") or claim.get("figure"))
        claim = {"document_updates": trained, **claim}
        tables[claim["id"]] = [claim.get(key) for key in JUDGED] + [better[claim["metric"]]]
    return tables


@cache
def file_at(commit):
    return judged(git("show", f"{commit}:data/claims.toml"))


def unlogged(text, changes=CHANGES):
    "The claims of a file that differ from what they were at the last change in its log."
    now = judged(text)
    last = {name: [c for c in changes if not c.claims or name in c.claims][-1] for name in now}
    return [name for name, table in now.items() if file_at(last[name].commit).get(name) != table]


@needs_history
def test_every_change_of_a_claim_is_in_the_log():
    assert unlogged(FILE.read_text()) == []


PLANTED = {
    "smallest = 0.05": "smallest = 0.04",
    'says = "equal"': 'says = "higher"',
    "huh_tab03 = 35156": "huh_tab03 = 3515",
    'mse = "lower"': 'mse = "higher"',
    'about = "final"': 'about = "mechanism"',
    'scales = ["gpu", "paper"]': 'scales = ["desk", "gpu", "paper"]',
}


@needs_history
@pytest.mark.parametrize("old", PLANTED)
def test_a_change_that_is_not_in_the_log_is_found(old):
    assert unlogged(FILE.read_text().replace(old, PLANTED[old], 1))


@needs_history
def test_each_commit_of_the_log_is_there_and_changed_the_claims():
    for change in CHANGES:
        command = ("show", "-s", "--date=format-local:%Y-%m-%dT%H:%M:%S+00:00", "--format=%cd")
        run = subprocess.run(
            ["git", *command, change.commit],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={"TZ": "UTC", "PATH": "/usr/bin:/bin:/usr/local/bin"},
        )
        assert run.stdout.strip() == change.date, change.commit
        files = git("show", "--name-only", "--format=", "-m", change.commit).split()
        assert "data/claims.toml" in files, change.commit
        assert is_ancestor(change.commit, "HEAD")


def test_a_change_names_claims_that_there_are_or_were():
    gone = {"router-toy-keeps-codes", "router-toy-error"}  # withdrawn, as the log says
    known = {claim.id for claim in CLAIMS} | gone
    assert all(set(change.claims) <= known for change in CHANGES)
    assert not CHANGES[0].claims and all(last_change(claim, CHANGES) for claim in CLAIMS)


# ---- the rule ----

def words_of_contrasts():
    "The word of many intervals, at two margins, with and without lost runs."
    margins = (Margin(-1.0, 1.0), Margin(-0.5, 2.0))
    lost = ({}, dict(up=1), dict(down=1), dict(unknown=1))
    cases = product(range(-3, 4), (0.1, 0.9), (0, 2, 3), SAYS, margins, lost)
    for effect, half, n, says, margin, pairs in cases:
        effect = 0.73 * effect
        c = Contrast(effect, effect - half, effect + half, n=n, **pairs)
        yield word_of(c, says, margin).word


def words_of_rows():
    "The word, alone and in a table of four, of rows at one and two lengths."
    firsts, lasts, spreads = (None, 0.8, 1.0), (0.5, 0.97, 1.1), (0.001, 0.02)
    ends = ((400, 4.0), (400, 3.9), (800, 4.0), (1_000, 4.0))
    for first, last, spread, (updates, factor) in product(firsts, lasts, spreads, ends):
        lengths = {} if first is None else {int(updates / factor): first}
        lengths |= {updates: last}
        rows = []
        for (u, ratio), seed in product(lengths.items(), range(3)):
            rows.append(("a", seed, u, ratio * (1 + spread * (seed - 1)), "done"))
            rows.append(("b", seed, u, 1.0, "done"))
        table = pd.DataFrame(rows, columns=["method", "seed", "updates", "mse", "status"])
        says = ("lower", "equal", "higher", "not higher")
        several = [Claim(**CLAIM.__dict__ | dict(id=word, says=word)) for word in says]
        found = dict.fromkeys(says, find(CLAIM, table, "desk"))
        yield from (verdict.word for verdict in judge(several, found).values())


def words_of_stand_ins():
    "The word of a metric and of one that it stands in for, in one table, at each ratio."
    own = replace(CLAIM, about="mechanism")
    suggested = replace(own, id="suggested", metric="lpips", stand_in="mse")
    for ratio, scale in product((0.5, 0.99, 1.2), ("desk", "gpu")):
        rows = [("a", seed, ratio * (1 + 0.01 * seed), "done") for seed in range(3)]
        rows += [("b", seed, 1.0, "done") for seed in range(3)]
        table = pd.DataFrame(rows, columns=["method", "seed", "mse", "status"])
        claims = [own, suggested]
        verdicts = judge(claims, {c.id: find(c, table, scale) for c in claims})
        yield from (verdict.word for verdict in verdicts.values())


def rule_digest():
    "A hash of what the rule says in many cases; the bootstrap has no part in it, and is slow."
    with patch("vqstudy.stats.bootstrap", return_value=(math.nan, math.nan)):
        return digest_of_words()


def digest_of_words():
    usage = Claim(**CLAIM.__dict__ | dict(metric="usage", unit="difference"))
    margins = [f"{x:.6g}" for base in (0.02, 0.5, 0.97) for x in margin_of(usage, base)]
    words = [*words_of_contrasts(), *words_of_rows(), *words_of_stand_ins(), *margins]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def test_a_change_of_the_rule_is_in_the_log():
    logged = [change.rule for change in CHANGES if change.rule]
    advice = "log the change: a [[change]] without claims, its commit, and this as rule"
    assert rule_digest() == logged[-1], advice


@pytest.mark.parametrize("name, value", [("SHARE", 0.05), ("FACTOR", 3), ("LEVEL", 0.9)])
def test_another_rule_has_another_hash(monkeypatch, name, value):
    before = rule_digest()
    monkeypatch.setattr(f"vqstudy.rule.{name}", value)
    assert rule_digest() != before


# ---- rows ----


def rows_without_the_rule(cells, changes, repository=ROOT):
    "Of the cells begun after each change, those whose commit does not hold it."
    for change in changes:
        for cell, made in cells.items():
            late = made["started"] >= change.date
            if late and not is_ancestor(change.commit, made["commit"], repository):
                yield cell


# the provenance of rows stands beside their table
PAIRS = sorted((ROOT / "data/results").glob("*.json"))
TABLES = [path for path in PAIRS if path.with_suffix(".csv").is_file()]


@needs_history
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_rows_that_count_as_measured_by_the_rule_come_from_a_commit_that_holds_it(path):
    claims = [claim for claim in CLAIMS if claim.sweep == path.stem]
    changes = {last_change(claim, CHANGES) for claim in claims}
    for cells in json.loads(path.read_text())["cells"].values():
        assert not list(rows_without_the_rule(cells, changes))


def test_a_row_of_a_commit_without_the_rule_is_found(tmp_path):
    def commit(name):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        git(*who, "commit", "-q", "--allow-empty", "-m", name, repository=tmp_path)
        return git("rev-parse", "HEAD", repository=tmp_path)

    git("init", "-q", repository=tmp_path)
    old = commit("before")
    rule = commit("the rule")
    new = commit("after")
    change = CHANGES[0]._replace(commit=rule, date="2026-05-01T00:00:00+00:00")
    cells = {
        "before": dict(commit=old, started="2026-04-01T00:00:00+00:00"),
        "stale": dict(commit=old, started="2026-06-01T00:00:00+00:00"),
        "right": dict(commit=new, started="2026-06-01T00:00:00+00:00"),
    }
    assert list(rows_without_the_rule(cells, [change], tmp_path)) == ["stale"]
