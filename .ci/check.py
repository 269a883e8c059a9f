"""Fail when cleaning or exporting the notebooks would change a file: what is committed is what the notebooks say."""

import hashlib, subprocess, sys
from pathlib import Path

BIN = Path(sys.executable).parent


def contents() -> dict[str, str]:
    "Every notebook and exported module, with the hash of its bytes."
    files = [*Path("nbs").rglob("*.ipynb"), *Path("vqstudy").glob("*.py"), Path("README.md")]
    return {
        str(f): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in files
        if ".ipynb_checkpoints" not in f.parts
    }


def tool(name: str) -> None:
    "Run one of nbdev's commands, from this environment where it has one."
    here = BIN / name
    subprocess.run([str(here) if here.exists() else name], check=True)


before = contents()
tool("nbdev_clean")
tool("nbdev_export")
subprocess.run([sys.executable, ".ci/readme.py"], check=True)
after = contents()
changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
if changed:
    sys.exit(
        "not clean, not exported or README not written; look at the difference and commit it:\n  "
        + "\n  ".join(changed)
    )
named = sorted(
    f for f in after if str(Path.cwd()) in Path(f).read_text(encoding="utf-8")
)  # a warning's place, say
if named:
    sys.exit("this machine's path stands in:\n  " + "\n  ".join(named))
print(f"{len(after)} files are clean and exported")
