"""Fail when what is committed is not what the notebooks say, or not in the form that we agreed on.

What is committed: cleaning, exporting and writing README.md change no file; no file names a path
of this machine; no notebook shows an error, a warning or such a path. The form: see form.py.
"""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
import nbformat
import form

BIN = Path(sys.executable).parent


def files(*patterns: str) -> list[Path]:
    "The files of this checkout that match, without the copies that Jupyter keeps."
    found = sorted({path for pattern in patterns for path in Path().glob(pattern)})
    return [path for path in found if ".ipynb_checkpoints" not in path.parts]


def committed() -> list[Path]:
    "Every notebook, every exported module, and the README."
    return files("nbs/**/*.ipynb", "vqstudy/*.py", "README.md")


def formed() -> list[Path]:
    "What the rules of form hold for."
    code = files("vqstudy/*.py", "tests/*.py", ".ci/*.py", "setup.py")
    written = [path for path in code if path.name != "_modidx.py"]
    return files("nbs/lib/*.ipynb", "nbs/runs/*.ipynb") + written


def hashes() -> dict[str, str]:
    "Each committed file with the hash of its bytes."
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in committed()}


def tool(name: str) -> None:
    "Run one of nbdev's commands, from this environment where it has one."
    installed = BIN / name
    subprocess.run([str(installed) if installed.exists() else name], check=True)


def changed_files() -> Iterator[str]:
    "Files that cleaning, exporting or writing the README changes."
    before = hashes()
    tool("nbdev_clean")
    tool("nbdev_export")
    subprocess.run([sys.executable, ".ci/readme.py"], check=True)
    after = hashes()
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield f"{name}: was not clean, not exported or not written; commit the difference"


def named_machine() -> Iterator[str]:
    "Files that name this checkout's folder."
    for path in committed():
        if str(Path.cwd()) in path.read_text(encoding="utf-8"):
            yield f"{path}: names this machine's path {Path.cwd()}"


def shown_faults() -> Iterator[str]:
    "What no notebook may show."
    for path in files("nbs/**/*.ipynb"):
        yield from form.output_faults(str(path), nbformat.read(path, as_version=4))


def main() -> None:
    found = [*changed_files(), *named_machine(), *shown_faults(), *form.faults(formed())]
    if found:
        sys.exit("\n".join(found) + f"\n{len(found)} faults")
    print(f"{len(committed())} files are clean and exported, {len(formed())} have the agreed form")


if __name__ == "__main__":
    main()
