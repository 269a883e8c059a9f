"""Every commit that a result names is in the history: from each row a reader gets to the code."""

import json
import subprocess
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "data/results").rglob("*.json"))


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.split()


HISTORY = set(git("rev-list", "HEAD"))
needs_history = pytest.mark.skipif(
    git("rev-parse", "--is-shallow-repository") != ["false"], reason="the history is not here"
)


def commits(value):
    "Whatever stands under `commit`, at any depth."
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return set()
    named = {value["commit"]} if isinstance(value.get("commit"), str) else set()
    return named.union(*map(commits, value.values()))


def lost(text):
    return sorted(commits(json.loads(text)) - HISTORY)


@needs_history
@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_commits_of_results_are_in_the_history(path):
    assert lost(path.read_text()) == []


@needs_history
def test_a_commit_that_is_not_there_is_found():
    path = ROOT / "data/results/huh_tab03_tune.json"
    text = path.read_text()
    known = sorted(commits(json.loads(text)))
    assert len(known) > 10
    assert lost(text.replace(known[3], "0" * 40)) == ["0" * 40]
