"""A training that is stopped and taken up again is the one that ran through."""

import itertools
from collections.abc import Callable
from pathlib import Path
import torch
from vqstudy.train import Fitted, OutOfTime


def in_parts(train: Callable[..., Fitted], path: Path, least: int = 3) -> Fitted:
    "Call `train(path=, deadline=)` with no time left, again and again, until it comes through."
    for stops in itertools.count():
        try:
            parts = train(path=path, deadline=0.0)  # one step at a time
        except OutOfTime:
            assert path.is_file() and stops < 100
        else:
            assert stops >= least
            return parts


def assert_same_training(whole: Fitted, parts: Fitted) -> None:
    "Weights, history and lengths, bit for bit."
    states = whole.model.state_dict(), parts.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))
    assert whole.history == parts.history and whole.lengths == parts.lengths
