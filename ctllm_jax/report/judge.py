"""Results of a judge: tables for a page, Markdown and the console, bars, and the full texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ctllm_jax.report.charts import Scale
from ctllm_jax.report.page import frame
from ctllm_jax.report.readable import as_markdown, percent, visible
from ctllm_jax.report.tables import cards, section, shown, table

_LOWEST, _HIGHEST = 1, 10
_NAME_WIDTH, _BAR, _GAP = 215, 13, 12
_LONGEST_NAME = 32  # letters; a Chinese character is as wide as two
_LONGEST_SUMMARY = 64
_COUNTS = (("failures", "without a rating"), ("missing", "of them still to be asked"), ("empty", "empty answers"),
           ("cut", "cut by max_tokens"))


def score_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table of ratings: a name, the number of questions, and mean [interval] of each answerer."""
    first = records[0]
    rows = [[_category(each["names"]), f"{each['count']}",
             *(score(record["scores"]["categories"].get(name)) for record in records)]
            for name, each in first["questions"]["categories"].items()]
    count = f"{first['questions']['count']}"
    rows += [["mean of categories", "", *(score(record["scores"]["macro"]) for record in records)],
             ["mean of all", count, *(score(record["scores"]["micro"]) for record in records)]]
    rows += [[f"  turn {turn}", "", *(score(record["scores"]["turns"].get(turn)) for record in records)]
             for turn in first["scores"]["turns"]]
    return rows


def count_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows with details of the means: answers without a rating, empty or cut ones, and the lower bound."""
    micro = [record["scores"]["micro"] for record in records]
    rows = [[words, *(f"{each[key]:,}" for each in micro)] for key, words in _COUNTS
            if any(each[key] for each in micro)]
    if any(each["failures"] for each in micro):
        rows.append(["mean of all, if those were rated 1", *(_mean(each["mean_if_failures_are_1"]) for each in micro)])
    return rows


def comparison_rows(comparisons: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table of comparisons: the two, wins, ties and losses of the first, its win rate, and consistency."""
    return [[each["first"], each["second"], f"{each['wins']}", f"{each['ties']}", f"{each['losses']}",
             _share(each["win_rate"], each["interval"]), f"{each['inconsistent']}", _share(each["consistency"]),
             f"{each['failures']}"] for each in comparisons]


COMPARISON_HEAD = ("first", "second", "wins", "ties", "losses", "win rate", "inconsistent", "consistency", "failures")


def score(found: Mapping[str, Any] | None) -> str:
    """A mean and its 95 % interval as 6.42 [5.90, 6.93]; a dash if there is none."""
    if found is None or found["mean"] is None:
        return "–"
    bounds = found["interval"]
    return _mean(found["mean"]) + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")


def names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The answering models, in the order of the columns."""
    return [record["answerer"]["name"] for record in records]


def notes(record: Mapping[str, Any]) -> list[str]:
    """A description of the figures, in sentences."""
    judge, questions = record["judge"], record["questions"]
    served = [name for name in judge["served"] if name != judge["model"]]
    called = f"{judge['model']}{f' (served as {chr(44).join(served)})' if served else ''}"
    prompts = ", ".join(f"{name} {each['sha256']}" for name, each in judge["prompts"].items())
    part = ", a part of the set" if record["kind"] == "judge-part" else ""
    return [f"{record['name']}: {questions['count']} questions{part} (hash {questions['sha256']}), judged by {called} "
            f"at temperature {_plain(judge['temperature'])}, {record['date']}.",
            "Ratings from 1 to 10; in brackets the 95 % bootstrap interval over questions. An empty answer is rated 1. "
            "Ratings of different judges, or of different prompts, are not comparable.",
            f"Prompts, and hashes of their text: {prompts or 'none was needed'}."]


def markdown(records: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None) -> str:
    """The tables as Markdown."""
    head = records[0]
    rows = [["", "questions", *names(records)], *score_rows(records)]
    rows += [[first, "", *rest] for first, *rest in count_rows(records)]
    parts = [f"# {as_markdown(head['name'])}", _markdown_table(rows)]
    if comparison:
        parts.append(_markdown_table([list(COMPARISON_HEAD), *comparison_rows(comparison["comparisons"])]))
        parts.append(CONSISTENT)
    return "\n\n".join([*parts, *map(as_markdown, notes(head))]) + "\n"


CONSISTENT = ("Each pair was shown in both orders, and counts where both choices agree; the win rate is wins and half "
              "of the ties over these. Inconsistent: the choice depended on the order.")


def page(records: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None) -> str:
    """The whole page as HTML text."""
    head, who = records[0], names(records)
    body = [f"<header><h1>{shown(head['name'])}</h1>"
            + "".join(f'<p class="command">{shown(note)}</p>' for note in notes(head)[:2]) + "</header>"]
    body.append(cards([(name, _mean(record["scores"]["macro"]["mean"]), _card_note(record))
                       for name, record in zip(who, records, strict=True)]))
    body.append(section("Ratings", bars(records) + table(
        ["", "questions", *_heads(who)], [_emphasized(row) for row in score_rows(records)]
        + [[shown(first), "", *map(shown, rest)] for first, *rest in count_rows(records)], "figures scores"),
        "mean, 95 % interval over questions"))
    if comparison:
        body.append(_matrix(comparison["comparisons"], who))
    body.append(_questions(records, comparison, who))
    body.append(section("The judge", _settings(head)))
    return frame(f"{head['name']} · {' · '.join(who)}", body)


def bars(records: Sequence[Mapping[str, Any]]) -> str:
    """Bars with intervals: a group for each category and for their mean, a bar for each answerer."""
    categories = records[0]["questions"]["categories"]
    groups = [("mean of categories", [record["scores"]["macro"] for record in records])]
    groups += [(_category(each["names"]), [record["scores"]["categories"].get(name) for record in records])
               for name, each in categories.items()]
    width, top = 720, 8
    height = top + sum(len(found) * _BAR + _GAP for _, found in groups) + 24
    x = Scale(_LOWEST, _HIGHEST, _NAME_WIDTH, width - 46)
    floor = height - 22
    parts = [f'<path class="gridline" d="M{x(at)} {top - 4}V{floor}"/><text class="tick" x="{x(at)}" y="{floor + 15}" '
             f'text-anchor="middle">{at}</text>' for at in range(_LOWEST, _HIGHEST + 1)]
    y = top
    for name, found in groups:
        middle = y + len(found) * _BAR / 2
        parts.append(f'<text class="tick name" x="{_NAME_WIDTH - 10}" y="{middle + 4}" text-anchor="end">'
                     f"{escape(_fitting(visible(name)))}</text>")
        for index, each in enumerate(found):
            if each and each["mean"] is not None:
                parts.append(_bar(each, x, y, index))
            y += _BAR
        y += _GAP
    legend = "".join(f'<li class="c{index % 8}"><i></i>{shown(name)}</li>' for index, name in enumerate(names(records)))
    return (f'<figure class="chart judged-bars"><figcaption><b>Mean rating</b><small>1 lowest, 10 highest; whiskers: '
            f'95 % interval</small></figcaption><ul class="legend">{legend if len(records) > 1 else ""}</ul>'
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Mean rating by category">{"".join(parts)}'
            "</svg></figure>")


def _fitting(name: str) -> str:
    wide = 0
    for place, letter in enumerate(name):
        wide += 2 if letter >= "\u2e80" else 1
        if wide > _LONGEST_NAME:
            return name[:place] + "…"
    return name


def _bar(found: Mapping[str, Any], x: Scale, y: float, index: int) -> str:
    start, end, middle = x(_LOWEST), x(found["mean"]), y + _BAR / 2
    drawn = (f'<g class="c{index % 8}"><rect class="judged-bar" x="{start}" y="{y + 1.5}" '
             f'width="{max(end - start, 1):.1f}" height="{_BAR - 3}" rx="2"/></g>')
    reach = end
    if found["interval"]:
        low, high = map(x, found["interval"])
        reach = high
        drawn += f'<path class="whisker" d="M{low} {middle}H{high}M{low} {middle - 3}v6M{high} {middle - 3}v6"/>'
    return drawn + f'<text class="tick" x="{reach + 6}" y="{middle + 4}">{found["mean"]:.2f}</text>'


def _matrix(comparisons: Sequence[Mapping[str, Any]], who: Sequence[str]) -> str:
    rates: dict[tuple[str, str], str] = {}
    for each in comparisons:
        counts = f"{each['wins']} – {each['ties']} – {each['losses']}"
        back = f"{each['losses']} – {each['ties']} – {each['wins']}"
        rate = each["win_rate"]
        rates[each["first"], each["second"]] = f"<b>{_share(rate)}</b><br><small>{counts}</small>"
        rates[each["second"], each["first"]] = (
            f"<b>{_share(None if rate is None else 1 - rate)}</b><br><small>{back}</small>")
    rows = [[_swatch(index) + shown(name), *(rates.get((name, other), "·") for other in who)]
            for index, name in enumerate(who)]
    matrix = table(["", *_heads(who)], rows, "figures")
    listed = table(list(COMPARISON_HEAD), [[shown(cell) for cell in row] for row in comparison_rows(comparisons)],
                   "figures")
    return section("Compared", f'<p class="command">{shown(CONSISTENT)}</p>{matrix}<h3>By pair</h3>{listed}',
                   "win rate of the row against the column; wins – ties – losses")


def _questions(records: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None, who: Sequence[str]) -> str:
    """Every question, collapsed, with its answers and judgments."""
    choices: dict[tuple[str, int], list[str]] = {}
    for each in comparison["comparisons"] if comparison else ():
        for row in each["rows"]:
            choices.setdefault((row["question_id"], row["turn"]), []).append(_choice(each, row))
    by_category: dict[str, list[str]] = {}
    for rows in zip(*(record["answers"] for record in records), strict=True):
        by_category.setdefault(rows[0]["category"], []).append(_question(rows, who, choices))
    categories = records[0]["questions"]["categories"]
    content = "".join(f"<h3>{shown(_category(categories[name]['names']))}</h3>{''.join(found)}"
                      for name, found in by_category.items())
    return section("Questions", f'<div class="judged">{content}</div>',
                   "each opens to the answers and the judge's words")


def _question(rows: Sequence[Mapping[str, Any]], who: Sequence[str],
              choices: Mapping[tuple[str, int], list[str]]) -> str:
    text = " ".join(rows[0]["turns"][0]["question"].split())
    text = text if len(text) <= _LONGEST_SUMMARY else text[:_LONGEST_SUMMARY] + "…"
    chips = "".join(f'<b class="chip c{index % 8}">{" · ".join(_rating(turn) for turn in row["turns"])}</b>'
                    for index, row in enumerate(rows))
    turns = []
    for number, asked in enumerate(rows[0]["turns"]):
        reference = (f"<details><summary>reference</summary><p>{shown(asked['reference'])}</p></details>"
                     if asked["reference"] else "")
        answers = "".join(_answer(row["turns"][number], name if len(who) > 1 else "", index)
                          for index, (row, name) in enumerate(zip(rows, who, strict=True)))
        compared = "".join(choices.get((rows[0]["question_id"], number + 1), ()))
        turns.append(f'<p class="asked">{shown(asked["question"])}</p>{reference}<div class="texts">{answers}</div>'
                     f"{compared}")
    return (f"<details><summary>{chips}<small>{shown(rows[0]['question_id'])}</small> {shown(text)}</summary>"
            f"{''.join(turns)}</details>")


def _answer(turn: Mapping[str, Any], name: str, index: int) -> str:
    text = turn["answer"]
    if text is None:
        body = '<p class="none">not answered yet</p>'
    elif text.strip():
        body = f"<p>{shown(text)}</p>" + ('<p class="none">cut by max_tokens</p>' if turn["is_cut"] else "")
    else:
        body = f'<p class="none">empty{": " + shown(turn["note"]) if turn["note"] else ""}</p>'
    words = ""
    if turn["judgment"]:
        again = (f'<p class="none">asked for the rating alone:</p><p>{shown(turn["again"])}</p>'
                 if turn["again"] is not None else "")
        words = (f"<details><summary>the judge's words <small>{shown(turn['prompt'])}</small></summary>"
                 f"<p>{shown(turn['judgment'])}</p>{again}</details>")
    header = f"<header><span>{shown(name)}</span> <b>{_rating(turn)}</b></header>"
    return f'<div class="answer c{index % 8}">{header}{body}{words}</div>'


def _choice(compared: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    outcome = {"win": f"{compared['first']} is better", "loss": f"{compared['second']} is better", "tie": "a tie",
               "inconsistent": "depends on the order", None: "no choice"}[row["outcome"]]
    both = (compared["first"], compared["second"])
    words = "".join(
        f"<div class=\"answer\"><header><span>A: {shown(first)}, B: {shown(second)}</span>"
        f"<b>{shown(choice['result'] or '–')}</b></header><p>{shown(choice['text'] or 'not asked: equal or empty')}</p>"
        + (f"<p>{shown(choice['again'])}</p>" if choice["again"] is not None else "") + "</div>"
        for choice, (first, second) in zip(row["choices"], (both, both[::-1]), strict=True))
    return (f"<details><summary>{shown(both[0])} or {shown(both[1])}: <b>{shown(outcome)}</b></summary>"
            f'<div class="texts">{words}</div></details>')


def _settings(head: Mapping[str, Any]) -> str:
    judge = head["judge"]
    facts = [[shown(name), shown(_plain(value))] for name, value in judge.items() if name != "prompts"]
    prompts = "".join(f"<details><summary>prompt {shown(name)} <small>{shown(each['sha256'])}</small></summary><pre>"
                      f"{shown(each['system'])}\n\n{shown(each['template'])}\n\n{shown(each['again'])}</pre></details>"
                      for name, each in judge["prompts"].items())
    return table(["", ""], facts, "config") + prompts


def _card_note(record: Mapping[str, Any]) -> str:
    macro = record["scores"]["macro"]
    bounds = f"95 %: {macro['interval'][0]:.2f} – {macro['interval'][1]:.2f}" if macro["interval"] else ""
    failed = f"{macro['failures']} without a rating" if macro["failures"] else ""
    return "; ".join(part for part in (bounds, failed) if part)


def _rating(turn: Mapping[str, Any]) -> str:
    return "–" if turn["rating"] is None else f"{turn['rating']:g}"


def _mean(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _emphasized(row: Sequence[str]) -> list[str]:
    return [f"<b>{shown(cell)}</b>" if row[0].startswith("mean") else shown(cell) for cell in row]


def _share(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "–"
    return percent(value) + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def _category(spelled: Sequence[str]) -> str:
    return " ".join(word for word in spelled if word)


def _heads(who: Sequence[str]) -> list[str]:
    return [(_swatch(index) if len(who) > 1 else "") + shown(name) for index, name in enumerate(who)]


def _swatch(index: int) -> str:
    return f'<i class="swatch c{index % 8}"></i>'


def _plain(value: Any) -> str:
    if value is None:
        return "the server's own"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(as_markdown, cells))} |"

    return "\n".join([line(rows[0]), "|" + "---|" * len(rows[0]), *map(line, rows[1:])])
