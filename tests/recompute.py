"""Every word of the ledger a second time, from the tables and claims alone.

It reads data/claims.toml, data/results/*.csv, data/results/unplanned.json and the evidence of toys
in data/results/toys, and imports nothing of vqstudy: what it shares with the ledger are the files
and the rule in words. What figures find in runs it finds again from their histories.

    python tests/recompute.py [ROOT]      prints what differs from figures/ledger.md, exit status 1
"""

import csv
import json
import math
import re
import sys
import tomllib
from pathlib import Path
from scipy.stats import norm, t

SCALES = ("paper", "gpu", "desk")  # the largest first


def mean(values):
    return sum(values) / len(values)


# ---- reading ----


def as_value(text):
    "A field of a table as a number where it is one."
    try:
        return float(text)
    except ValueError:
        return text


def equal(field, wanted):
    "Whether a field is a value of a claim, or one of a list."
    if isinstance(wanted, list):
        return any(equal(field, one) for one in wanted)
    if isinstance(wanted, bool):
        return field == str(wanted)
    return field == wanted


def select(rows, wanted):
    return [row for row in rows if all(equal(row.get(k), v) for k, v in wanted.items())]


def finished(folder, sweep, scale):
    "When each cell of a sweep was finished."
    path = folder / f"{sweep}.json"
    if not path.is_file():
        return {}
    cells = json.loads(path.read_text())["cells"].get(scale, {})
    return {cell: made.get("finished", "") for cell, made in cells.items()}


def read_table(path, scale):
    "The rows of a CSV at a scale; none without the file."
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["scale"] == scale]
    return [{k: as_value(v) for k, v in row.items()} for row in rows]


def unplanned_cells(folder):
    "By sweep and scale the cells that no plan has any more, as the ledger has left them."
    path = folder / "unplanned.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def read_rows(folder, sweep, scale):
    "The planned rows of a sweep at a scale; of two that differ in their cell alone, the later."
    made = finished(folder, sweep, scale)
    left_out = unplanned_cells(folder).get(sweep, {}).get(scale, [])
    rows = read_table(folder / f"{sweep}.csv", scale)
    planned = [row for row in rows if row["cell"] not in left_out]
    return sorted(planned, key=lambda row: made.get(row["cell"], ""))


# ---- effects ----


def log_odds(p):
    return math.log(p / (1 - p))


def side(rows, metric, worst, codes):
    "Value by seed; a later row takes an earlier one's place."
    values = {}
    for row in rows:
        x = row.get(metric, "")
        if row["status"] == "diverged":
            x = worst
        elif row["status"] == "failed" or x == "":
            x = math.nan
        elif codes:
            x = (x * row["num_codes"] + 0.5) / (row["num_codes"] + 1)
        values[row["seed"]] = x
    return values


def has(rows, metric):
    done = [row for row in rows if row["status"] == "done"]
    return bool(rows) and (not done or any(row.get(metric, "") != "" for row in done))


def transform(x, unit):
    if not math.isfinite(x) or unit == "difference":
        return x
    return math.log(x) if unit == "ratio" else log_odds(x)


def compare(claim, rows, better):
    "Effects by seed at one length, the metric, the unit, and the usage of the other side."
    rows = select(rows, claim.get("where", {}))
    a = select(rows, claim["a"])
    b = select(rows, claim["b"]) if isinstance(claim["b"], dict) else None
    odds = claim["metric"] == "usage" and claim.get("unit", "difference") == "difference"
    unit = "logit" if odds else claim.get("unit", "difference")
    worst = math.inf if better == "lower" else -math.inf
    for metric in (claim["metric"], claim.get("stand_in", "")):
        if not metric or not has(a, metric) or (b is not None and not has(b, metric)):
            continue
        codes = odds and metric == "usage"
        left = side(a, metric, worst, codes)
        right = side(b, metric, worst, codes) if b is not None else dict.fromkeys(left, claim["b"])
        both = sorted(left.keys() & right.keys())
        if not both:
            continue
        ends = {s: (transform(left[s], unit), transform(right[s], unit)) for s in both}
        effects = {s: x - y for s, (x, y) in ends.items()}
        others = [ends[s][1] for s, e in effects.items() if math.isfinite(e)]
        base = 1 / (1 + math.exp(-mean(others))) if odds and others else None
        return effects, metric, unit, base
    return None


def summary(effects):
    "Mean, low, high and the counts of pairs, as the evidence of a figure has them."
    x = [e for e in effects.values() if math.isfinite(e)]
    found = dict(n=len(x), up=0, down=0, unknown=0, effect=math.nan, low=math.nan, high=math.nan)
    for e in effects.values():
        found["up"] += e == math.inf
        found["down"] += e == -math.inf
        found["unknown"] += math.isnan(e)
    if x:
        found["effect"] = m = mean(x)
    if len(x) > 1:
        half = t.ppf(0.975, len(x) - 1) * math.sqrt(sum((e - m) ** 2 for e in x))
        half /= math.sqrt((len(x) - 1) * len(x))
        found |= dict(low=m - half, high=m + half)
    return found


# ---- what figures find in runs ----


def steps_of_runs(folder, sweep, scale):
    "The recorded steps of a sweep's planned and finished runs, each with the row of its run."
    done = [row for row in read_rows(folder, sweep, scale) if row["status"] == "done"]
    runs = {row["cell"]: row for row in done}
    lines = read_table(folder / f"{sweep}.history.csv", scale)
    return [runs[line["cell"]] | line for line in lines if line["cell"] in runs]


def late_gap(folder, scale):
    """Figure 6: the gap in the second half of the steps, alternated against joint, both normalised.

    By claim: the effects by seed, the share that they are against (none here), the updates.
    """
    names = ("huh_fig06", "huh_fig06_inner")
    steps = [line for name in names for line in steps_of_runs(folder, name, scale)]
    half = max((line["step"] for line in steps), default=0) / 2
    late = [line for line in steps if line["step"] >= half and line["inner"] == 1]

    def over_time(method, value):
        "The mean of a value over the second half, by seed."
        values = {}
        for line in late:
            if line["method"] == method:
                values.setdefault(line["seed"], []).append(value(line))
        return {seed: mean(each) for seed, each in values.items()}

    measures = {"gap": lambda line: math.log(line["gap"])}
    measures["relative-gap"] = lambda line: line["gap_relative"]
    found = {}
    for name, value in measures.items():
        a, b = over_time("vq + l2 + alt", value), over_time("vq + l2", value)
        effects = {seed: a[seed] - b[seed] for seed in a.keys() & b.keys()}
        updates = max((line["updates"] for line in steps), default=None)
        if effects:
            found[f"huh-fig06-alternation-narrows-{name}"] = effects, None, updates
    return found


def first_steps_of(run):
    "What the steps of a run, by number, say on the claims of Figure 9."

    def usage(step):
        return log_odds((run[step]["active_codes"] + 0.5) / (run[step]["num_codes"] + 1))

    def largest(name):
        "Of the first 15 steps, over the value before the first."
        return math.log(max(run[step][name] for step in run if 0 < step <= 15) / run[0][name])

    return {
        "half-idle-after-one-step": usage(1) - log_odds(0.5),
        "collapse-within-16-steps": usage(15) - log_odds(0.05),
        "divergence-grows": math.log(run[15]["nearest_cq"] / run[0]["nearest_cq"]),
        "error-jumps": largest("relative_error"),
        "gap-spikes": largest("gap"),
    }


def first_steps(folder, scale):
    "Figure 9: the first steps of the plain quantizer, on the probe. Returns as `late_gap` does."
    steps = steps_of_runs(folder, "huh_fig09", scale)
    runs = {line["seed"]: {} for line in steps if line["method"] == "vq"}
    for line in steps:
        if line["method"] == "vq":
            runs[line["seed"]][line["step"]] = line
    each = {seed: first_steps_of(run) for seed, run in runs.items()}
    against = {"half-idle-after-one-step": 0.5, "collapse-within-16-steps": 0.05}
    found = {}
    for name in next(iter(each.values()), ()):
        effects = {seed: one[name] for seed, one in each.items()}
        after = 1 if name == "half-idle-after-one-step" else 15
        found[f"huh-fig09-{name}"] = effects, against.get(name), after
    # a collapse is looked at only where every run has collapsed
    end = max((line["step"] for line in steps), default=0)
    idle = [run[end]["active_codes"] < 0.05 * run[end]["num_codes"] for run in runs.values()]
    if idle and all(idle):
        falls = {s: run[end]["gap_relative"] / run[1]["gap_relative"] for s, run in runs.items()}
        falls = {seed: math.log(ratio) for seed, ratio in falls.items()}
        found["huh-gap-falls-with-collapse"] = falls, None, end
    return found


# the figures whose claims runs decide: the sweep that they read first, and what they find
FIGURES = {
    "huh_fig06_gradient_gap": ("huh_fig06", late_gap),
    "huh_fig09_early_collapse": ("huh_fig09", first_steps),
}


def found_in_runs(folder, sweep, of_figure):
    "What a figure finds at the largest scale that its sweep has rows of; as `evidence`."
    scales = [scale for scale in SCALES if read_table(folder / f"{sweep}.csv", scale)]
    each = of_figure(folder, scales[0]) if scales else {}
    return {
        name: (scales[0], summary(effects), base, updates)
        for name, (effects, base, updates) in each.items()
    }


# ---- the rule ----


def margins(claim, base):
    "The largest effects that do not matter, down and up."
    if claim.get("unit") == "ratio":
        return -math.log(1 + claim["smallest"]), math.log(1 + claim["smallest"])
    if base is None:
        return -claim["smallest"], claim["smallest"]
    ends = []
    for shift in (-claim["smallest"], claim["smallest"]):
        inside = 0 < base + shift < 1
        ends.append(log_odds(base + shift) - log_odds(base) if inside else shift * math.inf)
    return tuple(ends)


def tail(distance, half, n):
    "Twice the chance that an effect on the border gives one this far beyond it."
    if half <= 0:
        return 0.0 if distance > 0 else 1.0
    if n == 0:
        return min(1.0, 2 * norm.sf(distance / half * norm.ppf(0.975)))
    return min(1.0, 2 * t.sf(distance / half * t.ppf(0.975, n - 1), n - 1))


def decide(found, says, down, up):
    "The word of an interval by itself, and its p (of the nearest word where it is undecided)."
    e, low, high = found["effect"], found["low"], found["high"]
    lost_up, lost_down, n = found.get("up", 0), found.get("down", 0), found["n"]
    if not (math.isfinite(low) and math.isfinite(high)):
        return "undecided", 1.0
    if found.get("unknown", 0) or n in (1, 2):
        return "undecided", 1.0
    if says in ("lower", "not higher"):
        e, low, high, down, up = -e, -high, -low, -up, -down
        lost_up, lost_down = lost_down, lost_up
    above, under = tail(e - up, e - low, n), tail(down - e, high - e, n)
    not_under, not_above = tail(e - down, e - low, n), tail(up - e, high - e, n)
    inside = max(not_under, not_above)
    if says == "equal":
        words = [("no effect", inside, lost_up + lost_down)]
        words.append(("opposite", min(above, under), lost_up + lost_down))
    elif says.startswith("not"):
        words = [("not opposite", not_under, lost_down), ("opposite", under, lost_up)]
    else:
        words = [("same direction", above, lost_down), ("opposite", under, lost_up)]
        words.append(("no effect", inside, lost_up + lost_down))
    word, p, against = min(words, key=lambda one: one[1])
    if against:
        return "undecided", 1.0
    if p >= 0.05:
        return "undecided", p
    if word == "no effect" and says != "equal" and low > 0:
        word = "no effect, same side"
    elif word == "no effect" and says != "equal" and high < 0:
        word = "no effect, other side"
    return word, p


def desk_decides(claim, trained, each, updates, says_now, at_margin):
    "Whether a final error at desk may decide: long enough, or carried on to the same word."
    if trained is None or updates is None:
        return False
    if updates * 10 >= trained:
        return True
    short = [u for u in each if u * 4 <= updates]
    if not short or says_now == "undecided":
        return False
    early, late = each[max(short)], each[updates]
    if early[1] != late[1]:
        return False
    steps = math.log(trained / updates) / math.log(updates / max(short))
    both = early[0].keys() & late[0].keys()
    there = {s: late[0][s] + (late[0][s] - early[0][s]) * steps for s in sorted(both)}
    then, _ = decide(summary(there), claim["says"], *at_margin)
    return then.split(",")[0] == says_now.split(",")[0]


def longest(claim, rows, better):
    "The comparison by length, and the longest length with three pairs (or the longest)."
    lengths = sorted({row["updates"] for row in rows if row.get("updates", "") != ""})
    each = {}
    for u in lengths or [None]:
        here = [row for row in rows if u is None or row.get("updates", "") in (u, "")]
        found = compare(claim, here, better)
        if found:
            each[u] = found
    enough = [u for u in each if len(each[u][0]) >= 3]
    return each, (enough or list(each) or [None])[-1]


# ---- all claims ----


def by_sweep(claim, folder, better):
    "What a sweep says: the largest scale with three pairs, else the largest with any."
    found = []
    for scale in SCALES:
        if scale in claim["scales"]:
            rows = read_rows(folder, claim["sweep"], scale)
            each, updates = longest(claim, rows, better)
            if each:
                found.append((scale, each, updates))
    three = [one for one in found if len(one[1][one[2]][0]) >= 3]
    return (three or found or [None])[0]


def evidence(folder):
    "By claim, what figures find: scale, finding, the share that it is against, updates."
    found = {}
    for path in sorted((folder / "toys").glob("*.json")):
        whole = json.loads(path.read_text())
        # what is found in runs is not taken from the figure
        claims = {} if path.stem in FIGURES else whole["claims"]
        for name, values in claims.items():
            values = {k: math.nan if v is None else v for k, v in values.items()}
            told = whole.get("updates")
            updates = told.get(name) if isinstance(told, dict) else told
            found[name] = (whole["scale"], values, values.pop("base", None), updates)
    for sweep, of_figure in FIGURES.values():
        found |= found_in_runs(folder, sweep, of_figure)
    return found


def measure(claim, folder, handed, better, trained):
    "The finding on a claim: word alone, p, whether it may be decided, and what the ledger shows."
    if "figure" in claim:
        scale, found, base, updates = handed.get(claim["id"], ("", None, None, None))
        if found is None or scale not in claim["scales"]:
            return None
        unit, metric, each = claim.get("unit", "difference"), claim["metric"], {}
    else:
        one = by_sweep(claim, folder, better)
        if one is None:
            return None
        scale, each, updates = one
        effects, metric, unit, base = each[updates]
        found = summary(effects)
    at_margin = margins(claim, base)
    word, p = decide(found, claim["says"], *at_margin)
    allowed = scale != "desk" or claim.get("about") != "final"
    if not allowed:
        allowed = desk_decides(claim, trained, each, updates, word, at_margin)
    if metric != claim["metric"]:  # a stand-in suggests
        allowed = False
    ends = [found[name] for name in ("effect", "low", "high")]
    if unit == "ratio":
        ends = [math.exp(x) for x in ends]
    elif base is not None:
        ends = [1 / (1 + math.exp(-log_odds(base) - x)) - base for x in ends]
    whole = dict(alone=word, p=p, allowed=allowed, n=found["n"], scale=scale, ends=ends)
    return whole | dict(updates=updates, table=claim.get("sweep") or claim["figure"])


def is_claimed(word, says):
    "Whether a word is what the claim says, as the ledger writes it; empty where none is decided."
    if word in ("undecided", "cannot decide", "not measured"):
        return ""
    wanted = {"equal": "no effect", "not lower": "not opposite", "not higher": "not opposite"}
    return "yes" if word == wanted.get(says, "same direction") else "no"


def is_inside(published, ends):
    "Whether the document's effect lies in our interval, as the ledger writes it."
    if published is None or not ends or not math.isfinite(ends[1]):
        return ""
    return "inside" if ends[1] <= published <= ends[2] else "outside"


def words(root):
    "Every claim with its word and what the ledger shows beside it."
    whole = tomllib.loads((root / "data/claims.toml").read_text(encoding="utf-8"))
    folder = root / "data/results"
    handed, lengths = evidence(folder), whole.get("document_updates", {})
    found = {}
    for claim in whole["claim"]:
        trained = claim.get("document_updates", lengths.get(claim.get("sweep") or claim["figure"]))
        better = whole["metrics"][claim["metric"]]
        one = measure(claim, folder, handed, better, trained) or dict(word="not measured")
        if "alone" in one:
            one["word"] = one["alone"] if one["allowed"] else "cannot decide"
        found[claim["id"]] = one
    tested = [one for one in found.values() if one.get("allowed") and one["n"]]
    for table in {one["table"] for one in tested}:
        ordered = sorted((one for one in tested if one["table"] == table), key=lambda one: one["p"])
        least = 0.0
        for rank, one in enumerate(ordered):  # Holm, from the smallest p on
            least = max(least, min(1.0, (len(ordered) - rank) * one["p"]))
            one["adjusted"] = least
            if least >= 0.05:
                one["word"] = "undecided"
    for claim in whole["claim"]:
        one, published = found[claim["id"]], claim.get("published")
        one["as claimed"] = is_claimed(one["word"], claim["says"])
        one |= {"document": published, "in size": is_inside(published, one.get("ends"))}
    return found


# ---- beside the ledger ----


KINDS = {"identities": "identity", "toys": "toy", "runs": "run"}


def read_row(kind, fields):
    "A row of the ledger: what its effect, its word and the lines below them say."
    effect, *_ = fields["effect"].split("<br>")
    word, *below = fields["word"].replace("**", "").split("<br>")
    seeds = re.search(r"<br>(\d+) seeds?\b", fields["effect"])
    place = re.search(r" (?:at (\w+)|in an? (?:toy|identity))", word)
    updates = re.search(r" at \w+, ([\d,]+)(?= updates?| of the document)", word)
    row = {"kind": kind, "word": word, "effect [95%]": "", "seeds": "", "scale": ""}
    row["updates"] = updates[1].replace(",", "") if updates else ""
    row["p (Holm)"] = "".join(line for line in below if line.startswith("p "))
    row["as claimed"] = {"as claimed": "yes", "not as claimed": "no"}.get("".join(below[:1]), "")
    published = re.search(r"(?:^|<br>)document ([^,<]+)(?:, (\w+))?", fields["effect"])
    row["document"], row["in size"] = published.groups("") if published else ("", "")
    if place:  # measured, so the first line of the effect is ours
        row |= {"effect [95%]": effect, "scale": place[1] or "toy"}
        row["seeds"] = seeds[1] if seeds else ""
    return row | {name: fields[name] for name in ("claim", "contrast", "from")}


def read_ledger(text):
    "The rows of the ledger's tables by claim."
    rows, kind, columns = {}, "", []
    for line in text.splitlines():
        if line.startswith("### "):
            kind = KINDS[line.rpartition(": ")[2]]
        fields = [field.strip() for field in re.split(r"(?<!\\)\|", line)[1:-1]]
        anchor = re.match(r'<a id="([a-z0-9-]+)"></a>', fields[0]) if fields else None
        if fields[:1] == ["claim"]:
            columns = fields
        elif anchor:
            rows[anchor[1]] = read_row(kind, dict(zip(columns, fields)))
    return rows


WORD = re.compile(
    r"(same direction|not opposite|no effect(, (same|other) side)?|opposite|undecided"
    r"|cannot decide|not measured)(?= at | in |$)"
)
NUMBER = r"[+×]?(-?(?:inf|[\d.]+(?:e[-+]?\d+)?))"


def half_a_unit(number, has_interval):
    "Of its last digit: an interval has so many decimals, a number alone three digits."
    digits, _, power = number.partition("e")
    if has_interval and not power:
        return 0.5 * 10.0 ** -len(digits.partition(".")[2])
    size = abs(float(number))
    return 0.5 * 10.0 ** (math.floor(math.log10(size)) - 2) if 0 < size < math.inf else 0.0


def shown_numbers(text):
    "The numbers of an effect, each with how far it may lie from what it stands for."
    numbers = re.findall(NUMBER, text.replace("[", " ").replace(",", " "))
    return [(float(x), half_a_unit(x, "[" in text)) for x in numbers]


def shown_ends(one):
    "What the ledger shows of an effect and its interval: all, or where it has none the effect."
    effect, low, high = one["ends"]
    if math.isnan(effect):
        return []
    is_exact = one["n"] == 0 and low == high
    return [effect] if is_exact or math.isnan(low) else [effect, low, high]


def is_shown(values, text):
    "Whether a text shows these numbers, all of them and no other."
    numbers = shown_numbers(text)
    if len(numbers) != len(values):
        return False
    pairs = zip(values, numbers, strict=True)
    return all(abs(x - shown) <= 1.001 * half + 1e-12 for x, (shown, half) in pairs)


def beside_the_word(one, row):
    "What a row shows otherwise than was found: what was found, and the row's own."
    published = [] if one["document"] is None else [one["document"]]
    if not is_shown(published, row["document"]):
        yield f"document {one['document']}", row["document"]
    for column in ("as claimed", "in size"):
        if row[column] != one[column]:
            yield f"{column} {one[column]!r}", row[column]
    if one["word"] == "not measured":
        return
    beside = dict(scale=one["scale"], seeds=one["n"] or "", updates=one["updates"] or "")
    for column, value in beside.items():
        value = f"{value:g}" if isinstance(value, float) else str(value)
        if row[column] != value:
            yield f"{column} {value}", row[column]
    if not is_shown(shown_ends(one), row["effect [95%]"]):
        yield " ".join(f"{x:.4g}" for x in shown_ends(one)), row["effect [95%]"]
    test = [one["p"], one["adjusted"]] if "adjusted" in one else []
    p = [float(x) for x in re.findall(r"[\d.]+(?:e-?\d+)?", row["p (Holm)"])]
    near = [abs(x - y) <= 0.06 * y + 1e-300 for x, y in zip(p, test)]
    if len(p) != len(test) or not all(near):
        yield "p " + " ".join(f"{x:.2g}" for x in test), row["p (Holm)"]


def differences(ours, text):
    "What the text of a ledger says otherwise than the words found here, one sentence each."
    theirs = read_ledger(text)
    for name in sorted(ours.keys() ^ theirs.keys()):
        yield f"{name}: only in {'claims.toml' if name in ours else 'the ledger'}"
    for name in ours.keys() & theirs.keys():
        one, row = ours[name], theirs[name]
        said = WORD.match(row["word"])
        if said is None or said[0] != one["word"]:
            yield f"{name}: {one['word']}, the ledger says {row['word']!r}"
        for found, shown in beside_the_word(one, row):
            yield f"{name}: {found}, the ledger says {shown!r}"


def main(arguments):
    root = Path(arguments[0]) if arguments else Path(__file__).parents[1]
    text = (root / "figures/ledger.md").read_text(encoding="utf-8")
    found = sorted(differences(words(root), text))
    print("\n".join(found) or "the ledger agrees")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
