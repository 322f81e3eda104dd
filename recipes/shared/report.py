"""Before and after: what an adapter has learnt and what it has cost, judged in a sentence and shown on one page.

rows(before, after, names, general)   lm-eval's results twice -> a row a score, with the error of its change
judge(rows, max_drift)                the verdict, and whether it is within the budget
page(report)                          HTML that needs no other file, from what results.json holds
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any


HEADLINES = ("acc", "exact_match", "word_perplexity")  # the score of a task that is judged: the first that it has
PREFIX = "peft_mora_"


def rows(before: dict[str, Any], after: dict[str, Any], names: Iterable[str], general: Iterable[str]) -> list[Any]:
    """A row for each score that lm-eval gives the tasks `names`, those of one task one after the other.

    Args:
        before, after: what simple_evaluate returned of the same tasks and samples, "samples" included where it was
            asked to log them.
        names: tasks and groups. Of a group without a score of its own, its members.
        general: those of them that are to be kept; the others are to be learnt.

    Returns:
        Of each: task, metric, general, judged (is it the task's headline?), samples, before and after with their
        standard errors (None where lm-eval gives none), relative, change, change_error, and loss, the change for the
        worse. The change is after - before of an accuracy, after / before - 1 of anything else (relative). Its error
        is that of paired answers where they were logged, otherwise that of two independent samples.
    """
    found = []
    for name in names:
        for leaf in _leaves(before, name):
            scores = before["results"][leaf]
            mine = [key for key, value in scores.items() if _is_score(key, value)]
            headline = min(mine, key=_place)
            for key in mine:
                what = {"general": name in general, "judged": key == headline}
                found.append(_row(before, after, leaf, key) | what)
    return found


def _place(key: str) -> int:
    """How far behind a score's metric comes in HEADLINES."""
    metric = key.partition(",")[0]
    return (*HEADLINES, metric).index(metric)


def _is_score(key: str, value: Any) -> bool:
    return isinstance(value, float) and not key.partition(",")[0].endswith("_stderr")


def _is_accuracy(metric: str) -> bool:
    return metric.startswith("acc") or metric == "exact_match"


def _leaves(found: dict[str, Any], name: str) -> Iterator[str]:
    if any(_is_score(*item) for item in found["results"].get(name, {}).items()):
        yield name
    else:
        for child in found.get("group_subtasks", {}).get(name, ()):
            yield from _leaves(found, child)


def _row(before: dict[str, Any], after: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    metric, _, kind = key.partition(",")
    old, new = before["results"][name], after["results"][name]
    relative = not _is_accuracy(metric)
    # plain floats: lm-eval's are numpy's in parts
    change = float(new[key] / old[key] - 1 if relative and old[key] else new[key] - old[key])
    better = before.get("higher_is_better", {}).get(name, {}).get(metric)
    error, new_error = (
        float(value) if isinstance(value := one.get(f"{metric}_stderr,{kind}"), float) else None for one in (old, new)
    )
    answers = [
        {s["doc_id"]: s[metric] for s in one.get("samples", {}).get(name, ()) if s["filter"] == kind and metric in s}
        for one in (before, after)
    ]
    change_error = _paired_error(metric, *answers)
    if change_error is None and error is not None and new_error is not None:
        change_error = math.hypot(error, new_error) / (abs(old[key]) if relative and old[key] else 1)
    return {
        "task": name.removeprefix(PREFIX),
        "metric": metric,
        "samples": before.get("n-samples", {}).get(name, {}).get("effective"),
        "before": float(old[key]),
        "before_error": error,
        "after": float(new[key]),
        "after_error": new_error,
        "relative": relative,
        "change": change,
        "change_error": change_error,
        "loss": change if better is False else -change,
    }


def _paired_error(metric: str, before: dict[Any, Any], after: dict[Any, Any]) -> float | None:
    """Standard error of the change, from each sample's own: of means, or of a perplexity's ratio.

    A perplexity's sample is (log-likelihood, words); the log of the ratio is Σ (old - new) / Σ words.
    """
    if len(before) < 2 or before.keys() != after.keys():
        return None
    pairs = [(before[i], after[i]) for i in before]
    if metric in ("word_perplexity", "byte_perplexity"):
        samples = [(old - new, words) for (old, words), (new, _) in pairs]
    elif _is_accuracy(metric):
        samples = [(float(new) - float(old), 1) for old, new in pairs]
    else:
        return None
    n, total = len(samples), sum(weight for _, weight in samples)
    mean = sum(change for change, _ in samples) / total
    error = math.sqrt(n / (n - 1) * sum((change - mean * weight) ** 2 for change, weight in samples)) / total
    return error if _is_accuracy(metric) else math.exp(mean) * error


def drifted(row: dict[str, Any], max_drift: float) -> bool:
    """Whether a score that is to be kept has lost more than `max_drift`: a perplexity by its growth on these passages,
    any other score by its loss less one standard error. NaN has."""
    error = 0.0 if row["metric"].endswith("perplexity") else row["change_error"] or 0.0
    return not row["loss"] - error <= max_drift


def judge(found: list[dict[str, Any]], max_drift: float | None) -> dict[str, Any]:
    """{"verdict": one sentence, "within": whether what is to be kept is within `max_drift`; None without a budget}.

    A task counts as learnt, or as worse, where its headline score has changed by more than twice the standard error
    of the change.
    """
    tasks = [row for row in found if row["judged"] and not row["general"]]
    kept = [row for row in found if row["judged"] and row["general"]]
    learnt = [row for row in tasks if -row["loss"] > 2 * (row["change_error"] or 0)]
    worse = [row for row in tasks if row["loss"] > 2 * (row["change_error"] or 0)]
    rest = [row for row in tasks if row not in learnt and row not in worse]
    said = [
        f"{verb} {_listed(map(_said, group))}"
        for verb, group in (("learnt", learnt), ("did not clearly change", rest), ("got worse at", worse))
        if group
    ]
    sentence = f"The adapter {_listed(said)}" if said else "No task was asked of the adapter"
    within = None
    if not kept:
        sentence += "; what it does to general ability was not measured"
    elif max_drift is None:
        sentence += f"; general ability, for which no budget was set: {_listed(map(_said, kept))}"
    else:
        lost = [row for row in kept if drifted(row, max_drift)]
        within, budget = not lost, f"the budget of {100 * max_drift:.3g} %"
        if lost:
            sentence += f"; it lost general ability beyond {budget}: {_listed(map(_said, lost))}"
            if len(lost) < len(kept):
                sentence += f", and kept {_listed(row['task'] for row in kept if row not in lost)} within it"
        else:
            sentence += f"; it kept general ability within {budget}: {_listed(map(_said, kept))}"
    return {"verdict": f"{sentence}.", "within": within, "max_drift": max_drift}


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _said(row: dict[str, Any]) -> str:
    """helpdesk (acc 0.290 → 0.980)"""
    change = f", {_change(row)}" if row["relative"] else ""
    values = f"{_number(row['before'])} → {_number(row['after'])}"
    return f"{row['task'].replace('_', ' ')} ({row['metric'].replace('_', ' ')} {values}{change})"


def _number(value: float) -> str:
    if abs(value) < 2:
        return f"{value:.3f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _change(row: dict[str, Any]) -> str:
    if not row["relative"]:
        return f"{100 * row['change']:+.1f} points".replace("-", "\N{MINUS SIGN}")
    return f"×{1 + row['change']:.3f}" if row["change"] < 1 else f"×{_number(1 + row['change'])}"


STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5a6577; --line: #dfe3ea;
  --before: #9aa5b5; --learnt: #2b66d9; --kept: #0f8a75; --lost: #c43232; --neutral: #5a6577; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #12161d; --card: #1b212b; --ink: #e8ecf2;
  --soft: #a0abbb; --line: #313a48; --before: #6b778a; --learnt: #76a5ff; --kept: #3ec9ae; --lost: #ff7b72;
  --neutral: #a0abbb; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2rem 1rem 3rem; }
section, header { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.25rem 1.5rem;
  margin-bottom: 1rem; }
header { border-left: 6px solid var(--state); }
.good { --state: var(--kept); } .bad { --state: var(--lost); } .open { --state: var(--neutral); }
.label { color: var(--state); font-weight: 700; margin: 0 0 .35rem; }
h1 { font-size: 1.35rem; line-height: 1.4; margin: 0; font-weight: 600; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .75rem; }
p, dd, dt { margin: 0; } p.note { color: var(--soft); font-size: .9rem; margin-top: .75rem; }
.pair { display: grid; grid-template-columns: minmax(8rem, 15rem) 1fr; gap: .2rem 1rem; align-items: center;
  padding: .55rem 0; border-top: 1px solid var(--line); break-inside: avoid; }
.pair:first-of-type { border-top: 0; }
.pair small, th small { color: var(--soft); font-weight: 400; display: block; }
.bar { display: grid; grid-template-columns: 1fr 5.5rem; gap: .6rem; align-items: center; }
.bar svg { width: 100%; height: 13px; display: block; } .bar span { font-size: .85rem; white-space: nowrap; }
.track { fill: var(--line); opacity: .55; } .before { fill: var(--before); } .learnt { fill: var(--learnt); }
.kept { fill: var(--kept); } .lost { fill: var(--lost); }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .35em 0 0; vertical-align: -1px; }
.keys span { margin-right: 1.1em; white-space: nowrap; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
td, .bar span, dd { font-variant-numeric: tabular-nums; } td, .bar span { white-space: nowrap; }
th, td { text-align: right; padding: .45rem .5rem; border-top: 1px solid var(--line); vertical-align: top; }
th:first-child { text-align: left; font-weight: 600; overflow-wrap: anywhere; }
thead th { border-top: 0; color: var(--soft); font-weight: 400; font-size: .85rem; }
tbody th[colspan] { color: var(--soft); font-size: .85rem; padding-top: 1rem; border: 0; } .pm { color: var(--soft); }
.over { color: var(--lost); font-weight: 700; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem; margin: 0; }
dt { color: var(--soft); }
dd { overflow-wrap: anywhere; }
pre { margin: .9rem 0 0; padding: .75rem 1rem; background: var(--page); border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .85rem; }
@media (max-width: 40rem) { main { padding: 1rem .6rem 2rem; } section, header { padding: 1rem; }
  h1 { font-size: 1.15rem; } .pair { grid-template-columns: 1fr; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; } table, tbody { display: block; } thead { display: none; }
  tr { display: grid; grid-template-columns: 1fr 1fr; border-top: 1px solid var(--line); padding: .4rem 0; }
  tbody tr:first-child { border: 0; padding-bottom: 0; } th, td { border: 0; padding: .1rem 0; text-align: left; }
  th { grid-column: 1 / -1; } td { font-weight: 400; }
  td::before { content: attr(data-name); display: block; color: var(--soft); font-size: .8rem; font-weight: 400; } }
@media print { body { background: none; font-size: 11pt; } main { max-width: none; padding: 0; }
  section, header { border-radius: 0; padding: .6rem .8rem; }
  h2 { break-after: avoid; } tr { break-inside: avoid; } }
"""


def page(report: dict[str, Any]) -> str:
    """The page of a report: rows, verdict, within, max_drift, drift (or None) and conditions, as results.json has
    them. Each measured number stands in a <data> element, whose value has all of its digits."""
    state, label = {
        True: ("good", "✓ Within the budget"),
        False: ("bad", "✗ Beyond the budget"),
        None: ("open", "Before and after"),
    }[report["within"]]
    conditions = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in report["conditions"].items()
        if name != "command"
    )
    colours = {_colour(row, report["max_drift"]) for row in report["rows"] if row["judged"]}
    keys = [("before", "before")]
    keys += [key for key in (("learnt", "after"), ("kept", "kept"), ("lost", "lost too much")) if key[0] in colours]
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(label)}: {escape(str(report["conditions"]["adapter"]))}</title>
<style>{STYLE}</style>
<main>
<header class="{state}"><p class="label">{label}</p><h1>{escape(report["verdict"])}</h1></header>
<section><h2>Before and after</h2>
<p class="note keys">{"".join(_key(*key) for key in keys)}</p>
{"".join(_bars(row, report["max_drift"]) for row in report["rows"] if row["judged"])}
<p class="note">An accuracy fills its bar at 1; a perplexity at the larger of its two, and shorter is better.</p>
</section>
<section><h2>All scores</h2>
<table><thead><tr><th>task<th>before<th>after<th>change<th>samples</thead>
{_table(report)}</table>
<p class="note">± is one standard error, of a change that of the same samples asked twice.{_rule(report)}</p></section>
{_general(report["drift"])}
<section><h2>Conditions</h2><dl>{conditions}</dl>
<pre>{escape(report["conditions"]["command"])}</pre></section>
</main>
</html>
"""


def _key(colour: str, text: str) -> str:
    return f'<span><svg class="key"><rect class="{colour}" width="100%" height="100%"/></svg>{text}</span>'


def _data(value: float, text: str | None = None, error: float | None = None) -> str:
    return f'<data value="{value!r}">{text or _number(value)}</data>' + _error(error)


def _error(error: float | None, plain: bool = True) -> str:
    shown = "" if error is None else _number(error) if plain else f"{100 * error:.1f}"
    return shown and f' <span class="pm">± {shown}</span>'


def _colour(row: dict[str, Any], max_drift: float | None) -> str:
    if not row["general"]:
        return "learnt"
    return "lost" if max_drift is not None and drifted(row, max_drift) else "kept"


def _bars(row: dict[str, Any], max_drift: float | None) -> str:
    full = max(row["before"], row["after"]) if row["relative"] else 1.0
    bars = ""
    for when, colour in (("before", "before"), ("after", _colour(row, max_drift))):
        share = min(1.0, max(0.0, row[when] / full)) if full and math.isfinite(row[when] / full) else 1.0
        bars += (
            f'<div class="bar"><svg role="img" aria-label="{when} {_number(row[when])}" preserveAspectRatio="none" '
            f'viewBox="0 0 100 10"><rect class="track" width="100" height="10"/>'
            f'<rect class="{colour}" width="{100 * share:.2f}" height="10"/></svg>'
            f"<span>{_number(row[when])}</span></div>"
        )
    return (
        f'<div class="pair"><div>{escape(row["task"])}<small>{escape(row["metric"])}, '
        f"{'to be kept' if row['general'] else 'to be learnt'}</small></div><div>{bars}</div></div>\n"
    )


def _table(report: dict[str, Any]) -> str:
    lines = []
    for general, title in ((False, "To be learnt"), (True, "To be kept")):
        group = [row for row in report["rows"] if row["general"] is general]
        if group:
            lines.append(f'<tbody><tr><th colspan="5">{title}')
        for row in group:
            over = row["judged"] and _colour(row, report["max_drift"]) == "lost"
            change = 1 + row["change"] if row["relative"] else row["change"]
            lines.append(
                f"<tr><th>{escape(row['task']).replace('_', '_<wbr>')} <small>{escape(row['metric'])}</small>"
                f'<td data-name="before">{_data(row["before"], error=row["before_error"])}'
                f'<td data-name="after">{_data(row["after"], error=row["after_error"])}'
                f'<td data-name="change"{" class=over" if over else ""}>{_data(change, _change(row))}'
                f"{_error(row['change_error'], row['relative'])}"
                f'<td data-name="samples">{"" if row["samples"] is None else row["samples"]}'
            )
    return "\n".join(lines)


def _rule(report: dict[str, Any]) -> str:
    if report["max_drift"] is None:
        return ""
    share = f"{100 * report['max_drift']:.3g}"
    return (
        f" The budget for what is to be kept: a perplexity may grow by {share} %; an accuracy may fall by {share} "
        "points, any other score by that share of what it was, plus one standard error of the change."
    )


def _general(drift: dict[str, float] | None) -> str:
    if drift is None:
        return ""
    ratio = drift["perplexity"] / drift["base_perplexity"]
    return f"""<section><h2>General text, token by token</h2><dl>
<dt>perplexity before</dt><dd>{_data(drift["base_perplexity"])}</dd>
<dt>perplexity after</dt><dd>{_data(drift["perplexity"])}</dd>
<dt>ratio</dt><dd>{_data(ratio, f"×{_number(ratio)}")}</dd>
<dt>KL(base ‖ adapted)</dt><dd>{_data(drift["kl"], f"{drift['kl']:.4f}")} nats a token</dd></dl>
<p class="note">Over {drift["tokens"]} next tokens of {drift["passages"]} passages, the first 256 tokens of each.
KL is 0 where both predict the same; it shows a difference that perplexity happens not to.</p></section>"""
