"""``vmlab explain``: a term, an event, a cost or a claim in two sentences, with its source."""

from __future__ import annotations

import argparse
from typing import Any

from vmlab.cli.output import print_json

EXAMPLE = """\
examples:
  vmlab explain "hidden fault"                  a term
  vmlab explain trap.gp                         an event of the ledger, and how it is priced on each profile
  vmlab explain insn.cli --profile prescott-2005    a cost, with its source
  vmlab explain cli-bt-beats-native             a claim
  vmlab explain                                 everything that has a text of its own
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.epilog = EXAMPLE
    parser.add_argument("name", nargs="*", metavar="TERM|EVENT|COST|CLAIM", help="what to explain; nothing lists the terms")
    parser.add_argument("--profile", dest="profiles", metavar="NAME", action="append", help="costs on this profile (default: on all)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Explain one thing, or list the terms."""
    from vmlab.report import glossary

    name = " ".join(arguments.name)
    if not name:
        entries = [{"term": e.term, "text": e.text, "synonyms": list(e.synonyms), "source": e.source} for e in glossary.entries().values()]
        if arguments.json:
            print_json({"terms": entries})
        else:
            print("\n".join(f"{e['term']}\n    {e['text']}" for e in entries))
        return 0
    found = explain(name, arguments.profiles)
    if arguments.json:
        print_json(found)
    else:
        print(words(found))
    return 0


def explain(name: str, profiles: list[str] | None = None) -> dict[str, Any]:
    """What is known of ``name``: kind, term, text, other names, source, and its costs by profile.

    :raises ConfigError: nothing is known of it, or a profile is not.
    """
    from vmlab import claims, costs
    from vmlab.ledger import EVENTS
    from vmlab.report import glossary

    chosen = [costs.load(profile) for profile in profiles or costs.names()]
    if name in EVENTS:
        kind = EVENTS[name]
        return {"kind": "event", "term": name, "text": glossary.event_text(name), "unit": kind.unit, "provenance": kind.provenance,
                "costs": {profile.name: costs.explain_event(profile, name) for profile in chosen}}
    if name in claims.names():
        claim = claims.load(name)
        return {"kind": f"claim, {claim.kind}", "term": name, "text": claim.statement, "source": claim.source}
    keys = {key for profile in chosen for key in profile.costs} | set(costs.path_table().paths) | set(costs.path_table().shared)
    if name in keys or "." in name:  # a key without a figure of its own falls back to its family's default
        said = {profile.name: costs.explain_cost(profile, name) for profile in chosen if profile.figure(name) is not None}
        if said:
            return {"kind": "cost", "term": name, "text": glossary.cost_text(name), "costs": said}
    entry = glossary.find(name, [*claims.names(), *keys])
    return {"kind": "term", "term": entry.term, "text": entry.text, "synonyms": list(entry.synonyms), "source": entry.source}


def words(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{found['term']} ({found['kind']})", found["text"]]
    if found.get("unit"):
        by = "by the machine, below every monitor" if found["provenance"] == "machine" else "by the monitor"
        lines.append(f"Counted in {found['unit']}s, {by}.")
    if found.get("synonyms"):
        lines.append("Also: " + ", ".join(found["synonyms"]) + ".")
    if found.get("source"):
        lines.append(f"Source: {found['source']}.")
    said = list(dict.fromkeys(found.get("costs", {}).values()))
    return "\n".join([*lines, *(f"\n{text}" for text in said)])
