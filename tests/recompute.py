"""Every word of the ledger a second time, from the tables and claims alone.

It reads data/claims.toml, data/results/*.csv and the evidence of figures in data/results/toys, and
imports nothing of vqstudy: what it shares with the ledger are the files and the rule in words.

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


def read_rows(folder, sweep, scale, unplanned):
    "The planned rows of a sweep at a scale; of two that differ in their cell alone, the later."
    path = folder / f"{sweep}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [{k: as_value(v) for k, v in row.items()} for row in csv.DictReader(file)]
    made = finished(folder, sweep, scale)
    left_out = set(unplanned.get(sweep, ()))
    rows = [row for row in rows if row["scale"] == scale and row["cell"] not in left_out]
    return sorted(rows, key=lambda row: made.get(row["cell"], ""))


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


def by_sweep(claim, folder, better, unplanned):
    "What a sweep says: the largest scale with three pairs, else the largest with any."
    found = []
    for scale in SCALES:
        if scale in claim["scales"]:
            rows = read_rows(folder, claim["sweep"], scale, unplanned)
            each, updates = longest(claim, rows, better)
            if each:
                found.append((scale, each, updates))
    three = [one for one in found if len(one[1][one[2]][0]) >= 3]
    return (three or found or [None])[0]


def evidence(folder):
    "What figures have handed over, by claim."
    found = {}
    for path in sorted((folder / "toys").glob("*.json")):
        whole = json.loads(path.read_text())
        for name, values in whole["claims"].items():
            values = {k: math.nan if v is None else v for k, v in values.items()}
            told = whole.get("updates")
            updates = told.get(name) if isinstance(told, dict) else told
            found[name] = (whole["scale"], values, updates)
    return found


def measure(claim, folder, handed, better, trained, unplanned):
    "The finding on a claim: word alone, p, whether it may be decided, and what the ledger shows."
    if "figure" in claim:
        scale, found, updates = handed.get(claim["id"], ("", None, None))
        if found is None or scale not in claim["scales"]:
            return None
        unit, base, each = claim.get("unit", "difference"), None, {}
    else:
        one = by_sweep(claim, folder, better, unplanned)
        if one is None:
            return None
        scale, each, updates = one
        effects, _, unit, base = each[updates]
        found = summary(effects)
    at_margin = margins(claim, base)
    word, p = decide(found, claim["says"], *at_margin)
    allowed = scale != "desk" or claim.get("about") != "final"
    if not allowed:
        allowed = desk_decides(claim, trained, each, updates, word, at_margin)
    ends = [found[name] for name in ("effect", "low", "high")]
    if unit == "ratio":
        ends = [math.exp(x) for x in ends]
    elif base is not None:
        ends = [1 / (1 + math.exp(-log_odds(base) - x)) - base for x in ends]
    whole = dict(alone=word, p=p, allowed=allowed, n=found["n"], scale=scale, ends=ends)
    return whole | dict(updates=updates, table=claim.get("sweep") or claim["figure"])


def words(root, unplanned=None):
    """Every claim with its word and what the ledger shows beside it.

    unplanned: by sweep the cells that no plan has any more, whose rows decide nothing.
    """
    whole = tomllib.loads((root / "data/claims.toml").read_text(encoding="utf-8"))
    folder = root / "data/results"
    handed, lengths = evidence(folder), whole.get("document_updates", {})
    found = {}
    for claim in whole["claim"]:
        trained = claim.get("document_updates", lengths.get(claim.get("sweep") or claim["figure"]))
        better = whole["metrics"][claim["metric"]]
        found[claim["id"]] = measure(claim, folder, handed, better, trained, unplanned or {})
    for name, one in found.items():
        if one is None:
            found[name] = dict(word="not measured")
        else:
            one["word"] = one["alone"] if one["allowed"] else "cannot decide"
    tested = [one for one in found.values() if one.get("allowed") and one["n"]]
    for table in {one["table"] for one in tested}:
        ordered = sorted((one for one in tested if one["table"] == table), key=lambda one: one["p"])
        least = 0.0
        for rank, one in enumerate(ordered):  # Holm, from the smallest p on
            least = max(least, min(1.0, (len(ordered) - rank) * one["p"]))
            one["adjusted"] = least
            if least >= 0.05:
                one["word"] = "undecided"
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
        if one["word"] == "not measured":
            continue
        beside = dict(scale=one["scale"], seeds=one["n"] or "", updates=one["updates"] or "")
        for column, value in beside.items():
            value = f"{value:g}" if isinstance(value, float) else str(value)
            if row[column] != value:
                yield f"{name}: {column} {value}, the ledger says {row[column]!r}"
        numbers = shown_numbers(row["effect [95%]"])
        for value, (shown, half) in zip(one["ends"], numbers):
            if abs(value - shown) > 1.001 * half + 1e-12:
                yield f"{name}: {value:.4g}, the ledger says {row['effect [95%]']!r}"
        if "adjusted" in one:
            p = [float(x) for x in re.findall(r"[\d.]+(?:e-?\d+)?", row["p (Holm)"])]
            near = [abs(x - y) <= 0.06 * y + 1e-300 for x, y in zip(p, (one["p"], one["adjusted"]))]
            if len(p) != 2 or not all(near):
                both = f"{one['p']:.2g} ({one['adjusted']:.2g})"
                yield f"{name}: p {both}, the ledger says {row['p (Holm)']!r}"


def main(arguments):
    root = Path(arguments[0]) if arguments else Path(__file__).parents[1]
    unplanned = json.loads(arguments[1]) if arguments[1:] else {}
    text = (root / "figures/ledger.md").read_text(encoding="utf-8")
    found = sorted(differences(words(root, unplanned), text))
    print("\n".join(found) or "the ledger agrees")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
