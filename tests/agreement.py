"""Ours beside the authors' public code: every row; a table shows them and a test asserts them."""

from agreement_codes import GRIDS, REST, SOFT
from agreement_package import PACKAGE
from agreement_tables import ALTERNATION, AVERAGES, GRADIENTS, LOSSES

ROWS = [*LOSSES, *ALTERNATION, *AVERAGES, *GRADIENTS, *SOFT, *GRIDS, *REST, *PACKAGE]
# what the rows are made of, in this folder
FILES = (
    "oracles_authors.py",
    "beside.py",
    "agreement_tables.py",
    "agreement_codes.py",
    "agreement_package.py",
)
