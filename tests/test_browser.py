"""What committed figures and READMEs must keep, and each of their faults in a small stand-in."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / ".ci"))
import browser  # noqa: E402

TRACKED = subprocess.run(
    ["git", "ls-files", "figures/*.svg", *browser.READMES],
    cwd=ROOT,
    capture_output=True,
    text=True,
).stdout.split()
FIGURES = [name for name in TRACKED if name.endswith(".svg")]
READMES = [name for name in TRACKED if name.endswith(".md")]
INCHES = 7.0
PIXELS = browser.WIDTH / INCHES / 72  # of the screen in a point of these figures


# a module's fixture, not a session's: while it is open, no other test may run an event loop
@pytest.fixture(scope="module")
def look():
    "One browser for this file's tests."
    if browser.lacking():
        pytest.skip(f"figures were not looked at: {browser.lacking()}")
    with browser.opened() as opened:
        yield opened


# ---- what is committed ----


@pytest.mark.parametrize("name", FIGURES, ids=lambda name: Path(name).stem)
def test_a_committed_figure_can_be_read(name, look, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = browser.figure_faults(Path(name), look)
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize("name", READMES)
def test_a_readme_leads_somewhere(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = browser.readme_faults(name)
    if found:
        pytest.fail("\n".join(found), pytrace=False)


# ---- a figure's faults ----


@pytest.fixture
def faults(tmp_path, look):
    "A function: the faults of a figure that is drawn with these settings."

    def faults_of(draw, replace=("", ""), **settings):
        style = {"svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 8}
        path = tmp_path / "stand-in.svg"
        with mpl.rc_context(style | {key.replace("_", "."): x for key, x in settings.items()}):
            fig = Figure((INCHES, 3))
            draw(fig)
            fig.savefig(path)
        path.write_text(path.read_text().replace(*replace))
        return [x.removeprefix(f"{path}: ") for x in browser.figure_faults(path, look)]

    return faults_of


def plot(fig):
    "An axes with everything that a good one has."
    fig.set_layout_engine("constrained")
    ax = fig.subplots()
    ax.set(title="error\nby method", xlabel="step", ylabel=r"$\|z - q\|^2$ / tr cov $z_{ij}$")
    ax.set(xscale="log", xlim=(1, 1e3), ylim=(0, 1))
    ax.plot([1, 10, 1000], [0.2, 0.5, 0.8], marker="o", label="rotation")
    ax.text(3, 0.5, "framed", bbox={"boxstyle": "round"})
    ax.legend(title="method")


def test_a_good_figure_has_no_fault(faults):
    # exponents are .7 of the font size
    assert faults(plot, font_size=7.5) == []


def test_titles_over_column_heads(faults):
    def draw(fig):
        for ax, step in zip(fig.subplots(1, 3), (15, 45, 120)):
            ax.set_title(f"d = 2, step {step}")
        fig.text(0.2, 0.905, "a decoded codes: how many are in use")

    found = faults(draw)
    assert len(found) == 2
    for step, fault in zip((15, 45), found):
        words = f"'d = 2, step {step}' and 'a decoded codes: how many are in use' overlap by "
        assert fault.startswith(words)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.37, 0.6])
def test_how_much_two_lines_overlap(faults, share):
    size = 20
    capital = 0.729 * size  # of DejaVu Sans, which has no part below the baseline

    def draw(fig):
        for y in (0, (1 - share) * capital):
            fig.text(0.5, 0.5 + y / (72 * 3), "HH")

    found = faults(draw, font_size=size)
    if share < browser.OVERLAP_HEIGHT:
        assert found == []
    else:
        (fault,) = found
        width, height = map(int, re.search(r"overlap by (\d+) x (\d+) px", fault).groups())
        # two advances without the bearings at the ends
        assert width == pytest.approx((2 * 0.752 - 2 * 0.098) * size * PIXELS, abs=0.6)
        assert height == pytest.approx(share * capital * PIXELS, abs=0.6)


@pytest.mark.parametrize("rotation", [0, 45, 90])
def test_labels_one_under_the_other_with_air_between_are_no_fault(faults, rotation):
    size = 10

    def draw(fig, gap):
        # across the letters, from baseline to baseline
        x, y = (gap * f(math.radians(rotation)) / 72 for f in (math.sin, math.cos))
        for step in range(2):
            place = (0.5 + step * x / INCHES, 0.5 - step * y / 3)
            fig.text(*place, "Agdq", rotation=rotation, rotation_mode="anchor")

    # the ink has .996 of the font size, the em box of the font 1.164
    assert faults(lambda fig: draw(fig, 1.03 * size), font_size=size) == []
    assert len(faults(lambda fig: draw(fig, 0.6 * size), font_size=size)) == 1


@pytest.mark.parametrize("columns", [12, 60])
def test_slanted_labels(faults, columns):
    "Upright rectangles around labels at 45 degrees overlap long before the labels do."

    def draw(fig):
        ax = fig.subplots()
        fig.subplots_adjust(bottom=0.4)
        ax.set_yticks([])
        ax.set_xticks(range(columns), [f"vq + replace {i:02}" for i in range(columns)])
        ax.tick_params("x", rotation=45)

    found = faults(draw)
    assert all("overlap" in fault for fault in found)
    if columns == 12:
        assert found == []
    else:
        assert len(found) >= columns - 1


def test_a_label_below_the_canvas(faults):
    def draw(fig):
        fig.subplots().set(xlabel="effect / margin", yticks=[])
        fig.subplots_adjust(bottom=0.09)

    (found,) = faults(draw)
    assert found.startswith("'effect / margin' leaves the canvas by ")
    assert found.endswith(" px, bottom")


SIDES = {
    "left": (-0.01, 0.5, "left", "center"),
    "right": (1.01, 0.5, "right", "center"),
    "top": (0.5, 1.02, "center", "top"),
    "bottom": (0.5, -0.02, "center", "bottom"),
}


@pytest.mark.parametrize("side", SIDES)
def test_a_text_may_leave_the_canvas_on_no_side(faults, side):
    x, y, ha, va = SIDES[side]
    (found,) = faults(lambda fig: fig.text(x, y, "HHH", ha=ha, va=va))
    assert found.startswith("'HHH' leaves the canvas by ") and found.endswith(f" px, {side}")


def test_small_letters(faults):
    found = faults(lambda fig: fig.text(0.5, 0.5, "small"), font_size=4.8)
    assert found == [f"'small' has letters of {4.8 * PIXELS:.1f} px, at least 8"]
    assert faults(lambda fig: fig.text(0.5, 0.5, "large"), font_size=4.82) == []


def test_exponents_are_letters(faults):
    found = faults(lambda fig: fig.text(0.5, 0.5, "$10^{5}$"), font_size=6)
    assert found == [f"'105' has letters of {0.7 * 6 * PIXELS:.1f} px, at least 8"]


def test_letters_drawn_as_paths(faults):
    def draw(fig):
        fig.text(0.2, 0.5, "words", bbox={})
        fig.text(0.5, 0.5, "$z_q$")
        fig.text(0.7, 0.5, "not seen", alpha=0)

    found = [f"{words!r} is drawn as paths, not written as text" for words in ("words", "$z_q$")]
    assert faults(draw, svg_fonttype="path") == found


def test_formulas_in_another_typeface(faults):
    found = faults(plot, font_family="DejaVu Serif", mathtext_fontset="dejavusans")
    assert found == ["has texts in 2 typefaces: DejaVu Sans, DejaVu Serif"]


def test_a_typeface_that_is_not_installed(faults):
    found = faults(plot, replace=("DejaVu Sans", "Nobody-s Face"))
    (fault,) = [x for x in found if "installed" in x]
    assert fault.startswith("Nobody-s Face is not installed: texts are measured in ")


def test_what_nobody_sees_is_no_fault(faults):
    def draw(fig):
        fig.text(0.5, 0.5, "seen")
        fig.text(0.5, 0.5, "over it, and small", alpha=0, size=2)
        fig.text(2, 2, "  ")

    assert faults(draw) == []


def test_a_text_without_a_group_counts(faults):
    text = '<text x="-30" y="50" style="font: 9px \'DejaVu Sans\'">two  words</text></svg>'
    (found,) = faults(plot, replace=("</svg>", text))
    assert found.startswith("'two  words' leaves the canvas by 50 px, left")


@pytest.mark.parametrize(
    "replace, fault", [(("</svg>", "</sv>"), "is no XML: "), (("viewBox", "box"), "has no viewBox")]
)
def test_a_broken_file(faults, replace, fault):
    (found,) = faults(plot, replace=replace)
    assert found.startswith(fault)


# ---- geometry ----


def square(side=1.0, degrees=0.0, x=0.0, y=0.0):
    "A square around (x, y), turned."
    turn = math.radians(degrees)
    reach = side / math.sqrt(2)
    turns = [turn + math.radians(45 + 90 * i) for i in range(4)]
    return [(x + reach * math.cos(t), y + reach * math.sin(t)) for t in turns]


def area(polygon):
    pairs = zip(polygon, polygon[1:] + polygon[:1])
    return abs(sum(p[0] * q[1] - p[1] * q[0] for p, q in pairs)) / 2


@pytest.mark.parametrize("step", [1, -1])
def test_what_two_squares_share(step):
    octagon = browser.intersection(square(), square(degrees=45)[::step])
    assert len(octagon) == 8 and area(octagon) == pytest.approx(2 * (math.sqrt(2) - 1))
    assert area(browser.intersection(square(), square(0.5)[::step])) == pytest.approx(0.25)
    quarter = browser.intersection(square(), square(x=0.5, y=0.5)[::step])
    assert area(quarter) == pytest.approx(0.25)


def test_squares_apart_share_nothing():
    # their upright rectangles share a corner
    assert browser.intersection(square(degrees=45), square(degrees=45, x=0.8, y=0.8)) == []
    assert browser.overlap(square(), square(x=2)) == (0, 0)


def test_an_overlap_is_measured_along_the_lower_line():
    low = [(0.0, 0.0), (4.0, 0.0), (4.0, 1.0), (0.0, 1.0)]
    high = [(3.0, -5.0), (9.0, -5.0), (9.0, 0.5), (3.0, 0.5)]
    turned, other = ([(-y, x) for x, y in line] for line in (low, high))
    assert browser.overlap(low, high) == browser.overlap(high, low) == (1, 0.5)
    assert browser.overlap(turned, other) == (1, 0.5)


# ---- the README ----

README = """# Title of `x`

[a](a/b.md) [folder](a) [root](/a/b.md) [anchor](#title-of-x) [second](#title-of-x-1)
[there](a/b.md#so-what-2-ways) [web](https://example.org/none) <a href="a/b.md">tag</a> [r]
![A curve that falls](p%20q.svg?raw=true) <img src="p q.svg" alt="A curve that falls">

[r]: a/b.md
# Title of x
"""
LINKS = {
    "[a](none.md)": "'none.md' is no file that git tracks",
    "[a](new.md)": "'new.md' is no file that git tracks",
    "[a](../a/b.md)": "'../a/b.md' is no file that git tracks",
    "[a](/b.md)": "'/b.md' is no file that git tracks",
    "[a]()": "'' leads nowhere",
    "[a][r]\n\n[r]: none.md": "'none.md' is no file that git tracks",
    "| a |\n|---|\n| [b](none.md) |": "'none.md' is no file that git tracks",
    "<a href='none.md'>a</a>": "'none.md' is no file that git tracks",
    "[a](#none)": "'#none' is no heading",
    "[a](a/b.md#title)": "'a/b.md#title' is no heading",
    "![A curve that falls](none.svg)": "'none.svg' is no file that git tracks",
    "![A curve](a/b.md)": "'a/b.md' has an alternative text of 7 characters, at least 10",
    "<img src='a/b.md'>": "'a/b.md' has an alternative text of 0 characters, at least 10",
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    "A small one, in which we are, with a file that git does not track."
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.md").write_text("## So *what*: 2 [ways](b.md)?\n")
    (tmp_path / "p q.svg").write_text("<svg/>")
    (tmp_path / "README.md").write_text(README)
    monkeypatch.chdir(tmp_path)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], check=True)
    (tmp_path / "new.md").write_text("new")
    return tmp_path


def test_links_of_every_kind_are_followed(repository):
    assert browser.readme_faults("README.md") == []
    document = browser.Document(README)
    assert len(document.links) == 9 and len(document.images) == 2
    assert browser.readme_faults("a/b.md") == []


@pytest.mark.parametrize("text", LINKS)
def test_a_link_that_leads_nowhere(repository, text):
    (repository / "README.md").write_text(text + "\n\n`[a](code.md)`\n\n```\n[a](code.md)\n```\n")
    assert browser.readme_faults("README.md") == [f"README.md: {LINKS[text]}"]


# ---- the commands ----


def test_faults_are_printed_and_fail(repository, monkeypatch):
    monkeypatch.setattr(browser, "lacking", lambda: "no Chromium (make browser)")
    browser.main(["README.md"])
    (repository / "README.md").write_text("[a](none.md)")
    with pytest.raises(SystemExit) as failed:
        browser.main([])
    said = ["README.md: 'none.md' is no file that git tracks"]
    assert failed.value.code.split("\n") == said + ["1 faults"]
    subprocess.run(["git", "mv", "p q.svg", "figures.svg"], check=True)
    with pytest.raises(SystemExit, match="not looked at: no Chromium .make browser.\n1 faults"):
        browser.main(["figures.svg"])


@pytest.fixture
def machine(tmp_path):
    "A function: a machine with these commands, the tools that make needs, and a log of calls."
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "sh", "make", "env", "grep", "expr", "dirname", "touch", "chmod"):
        (folder / tool).symlink_to(shutil.which(tool))

    def run(command, **commands):
        for name, script in commands.items():
            path = folder / name.replace("_", "-")
            path.unlink(missing_ok=True)
            path.write_text(f'#!/bin/bash\necho "{path.name} $*" >> {tmp_path}/log\n{script}\n')
            path.chmod(0o755)
        environment = {"PATH": str(folder), "HOME": str(tmp_path)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        log = tmp_path / "log"
        return done, log.read_text().splitlines() if log.exists() else []

    return run


HERE = {"chromium": "", "fc_match": "", "fc_list": "echo DejaVuSans-Oblique.ttf"}


def test_make_browser_does_nothing_where_all_is_there(machine):
    done, log = machine(["make", "browser"], **HERE, apt_get="exit 1", id="echo 0")
    assert done.returncode == 0 and not [call for call in log if call.startswith("apt-get")]


@pytest.mark.parametrize("user", [0, 1000])
def test_make_browser_installs_what_is_missing(machine, user):
    # the lists of packages are missing: the first try fails
    apt = """
    here=${0%/*}
    [[ " $* " == *" update "* ]] && touch $here/updated
    [ -e $here/updated ] || exit 100
    [[ " $* " == *" install "* ]] && touch $here/chromium && chmod +x $here/chromium || true
    """
    fonts = {name: HERE[name] for name in ("fc_match", "fc_list")}
    sudo = '[ "$1" = -n ] && shift && exec "$@"'
    done, log = machine(["make", "browser"], **fonts, apt_get=apt, id=f"echo {user}", sudo=sudo)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = [call for call in log if call.startswith("apt-get")]
    assert len(calls) == 3 and all("chromium fontconfig" in calls[i] for i in (0, 2))
    assert any(call.startswith("sudo -n") for call in log) == (user != 0)


def test_make_browser_says_what_to_install_by_hand(machine):
    done, _ = machine(["make", "browser"], apt_get="exit 100", id="echo 0")
    assert done.returncode != 0 and "Install a browser and fonts by hand" in done.stdout
    assert "chromium fontconfig fonts-dejavu-core" in done.stdout


@pytest.mark.parametrize("status", [0, 2])
def test_ci_goes_on_without_a_browser(machine, status):
    done, log = machine(["bash", ".ci/run"], make=f'[ "$1" = test ] || exit {status}')
    assert done.returncode == 0 and log == ["make browser", "make test"]
    assert ("figures are not looked at" in done.stdout) == (status != 0)


def test_a_skip_says_that_figures_were_not_looked_at(tmp_path):
    "The reason stands in what `make test` prints."
    script = (ROOT / "Makefile").read_text()
    (line,) = [x for x in script.splitlines() if "-m pytest" in x]
    options = line.split("-m pytest", 1)[1].split()
    code = "import browser; browser.lacking = lambda: 'no Chromium (make browser)'"
    (tmp_path / "without.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-n", "0", "-p", "without", "-k", "small"]
        + ["-p", "no:cacheprovider", __file__],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / ".ci")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "figures were not looked at: no Chromium (make browser)" in done.stdout, done.stdout
