"""A claim that no document makes, for the tests of what decides claims."""

from vqstudy.stats import Claim

CLAIM = Claim(
    id="demo",
    source="huh2023",
    place="Table 3",
    text="text",
    metric="mse",
    says="lower",
    smallest=0.05,
    scales=["desk"],
    kind="run",
    about="final",
    document_updates=10_000,
    better="lower",
    unit="ratio",
    sweep="s",
    a=dict(method="a"),
    b=dict(method="b"),
    published=0.5,
)
