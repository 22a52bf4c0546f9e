"""What a stage's results come to, in one line, and all stages' page. Knows results and no stage."""

from typing import Any

Content = dict[str, Any]  # a stage's JSON
SHOWN = 3  # of what is wrong


def settled(result: dict[str, Any] | None) -> bool:
    """Whether a part has its result: what was left out or is unfinished is tried again."""
    return result is not None and result.get("passed") is not None


def finished(content: Content) -> bool:
    wanted = content.get("wanted", [])
    return bool(wanted) and all(settled(content["parts"].get(name)) for name in wanted)


def judge(content: Content) -> tuple[bool | None, str]:
    """Whether a stage has passed (None: not all of it could run, or has run yet), and why, in a line."""
    parts, wanted = content["parts"], content.get("wanted", [])
    failed, missed, left_out, unfinished = [], [], [], []
    for name in dict.fromkeys([*wanted, *parts]):
        result = parts.get(name, {})
        if result.get("passed") is False:
            claims = [c for c in result.get("claims", []) if not c["met"]]
            missed += [f"{name}: {c['what']} {c['value']:.3g}, wanted {c['wanted']}" for c in claims]
            if not claims:
                failed.append(f"{name} ({_why(result)})")
        elif "skipped" in result:
            left_out.append(f"{name} ({result['skipped']})")
        elif not settled(result):
            unfinished.append(f"{name} ({result['unfinished']})" if "unfinished" in result else name)
    done = sum(bool(parts.get(name, {}).get("passed")) for name in wanted)
    said = [f"{done} of {len(wanted)} passed"]
    for word, names in (("FAILED", failed), ("MISSED", missed), ("left out", left_out), ("to be done", unfinished)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            said.append(f"{word}: {'; '.join(names[:SHOWN])}{more}")
    passed = False if failed or missed else None if left_out or unfinished or not wanted else True
    return passed, ". ".join(said)


def _why(result: dict[str, Any]) -> str:
    lines = str(result.get("error") or result.get("output") or "no reason given").strip().splitlines()
    return lines[-1][:160]


def page(contents: dict[str, Content]) -> str:
    """All stages on a page."""
    first = next(iter(contents.values()))
    machine = first["machine"]
    title = "Rehearsal: figures mean nothing" if first["rehearsal"] else machine["processor"]
    lines = [
        f"# {title}",
        "",
        ", ".join(f"{k} {v}" for k, v in machine.items()),
        "",
        "| stage | verdict | s |",
        "| --- | --- | ---: |",
    ]
    for name, content in contents.items():
        word = {True: "passed", False: "NOT PASSED", None: "incomplete"}[content["passed"]]
        lines.append(f"| {name} | **{word}**: {_cell(content['verdict'])} | {content['seconds']:.0f} |")
    for name, content in contents.items():
        lines += ["", f"## {name} ({content['date']})", "", *_table(content)]
    return "\n".join(lines) + "\n"


def _table(content: Content) -> list[str]:
    """A line for each part, or for each of its rows; columns are what any of them has."""
    rows: list[tuple[str, str, dict[str, str]]] = []
    for name, result in content["parts"].items():
        state = (
            ("passed" if result["passed"] else "NOT PASSED")
            if settled(result)
            else "left out"
            if "skipped" in result
            else "unfinished"
        )
        for label, cells in result.get("rows", {"": {}}).items():
            rows.append((": ".join(filter(None, [name, label])), state, cells))
    columns = list(dict.fromkeys(column for *_, cells in rows for column in cells))
    lines = ["| " + " | ".join(["", "", *columns]) + " |", "| --- | --- |" + " ---: |" * len(columns)]
    for name, state, cells in rows:
        lines.append("| " + " | ".join([_cell(name), state, *(_cell(cells.get(c, "")) for c in columns)]) + " |")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
