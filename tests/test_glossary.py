"""The glossary: a text for everything that has a name, short enough to be read, and safe to put in a page."""

from __future__ import annotations

import re
from typing import Any

import pytest

from vmlab import claims, costs
from vmlab.cli import explain as verb
from vmlab.cli.main import main
from vmlab.errors import ConfigError
from vmlab.ledger import EVENTS
from vmlab.report import glossary
from vmlab.report.style import CAUSES, LOOKS


@pytest.mark.parametrize("kind", EVENTS)
def test_every_event_has_a_text(kind: str) -> None:
    text = glossary.event_text(kind)
    assert text.endswith(".") and "{" not in text


def test_every_cost_of_every_profile_has_a_text() -> None:
    keys = {key for name in costs.names() for key in costs.load(name).costs} | set(costs.path_table().paths) | set(costs.path_table().shared)
    assert all(glossary.cost_text(key).endswith(".") for key in keys) and len(keys) > 50


def test_techniques_causes_and_kinds_of_claims_are_explained() -> None:
    for name in [*LOOKS, *CAUSES, "counted", "priced", "cited", "fidelity", "safety", "efficiency"]:
        assert glossary.find(name).text, name


#: The field's words, which the lab's texts use.
FIELD = ("VMM", "vCPU", "VM exit", "VM entry", "exit reason", "world switch", "VMCB", "VMCS", "intercept", "event injection", "gva", "gpa", "hpa",
         "pfn", "mfn", "p2m", "sensitive", "privileged", "deprivileging", "ring compression", "ring aliasing",
         "shadow page table", "memory tracing", "trace fault",
         "hidden fault", "true fault", "nested paging", "2-D walk", "translation unit", "translation cache", "ident", "callout", "in-cache emulation",
         "chaining", "direct execution", "adaptive translation", "hypercall", "hypercall page", "multicall", "start_info", "shared_info",
         "event channel", "upcall", "lazy MMU", "virtual cycles", "slowdown", "overhead", "cycles per exit", "direct-execution ratio",
         "hidden-fault rate", "region of interest", "nanobenchmark", "microbenchmark", "macrobenchmark", "fidelity", "safety", "efficiency")


@pytest.mark.parametrize("word", FIELD)
def test_the_fields_words_are_explained(word: str) -> None:
    assert glossary.find(word).text


@pytest.mark.parametrize("entry", glossary.entries().values(), ids=lambda entry: entry.term)
def test_a_text_is_two_sentences_at_most(entry: glossary.Entry) -> None:
    assert entry.text.endswith(".") and len(re.findall(r"[.;] +[A-Z]", entry.text)) <= 1
    assert entry.term == entry.term.lower()


def test_synonyms_lead_to_the_same_entry_however_they_are_written() -> None:
    assert glossary.find("VM exits") is glossary.find("vm exit") is glossary.find("#VMEXIT")
    assert glossary.find("binary-translation") is glossary.find("binary translation")


def test_an_unknown_word_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="hidden fault"):
        glossary.find("hiden fault")
    assert main(["explain", "insn.cly"]) == 2
    assert "insn.cli" in capsys.readouterr().err


def test_marking_escapes_and_links_each_word_once() -> None:
    html = glossary.mark('<b>"A hypercall</b> & another hypercall of trap-and-emulate')
    assert html.count("<a ") == 2 and html.count("</a>") == 2
    assert html.startswith("&lt;b&gt;&quot;A <a class=\"term\" href=\"#term-hypercall\">hypercall</a>&lt;/b&gt; &amp; another hypercall of ")


@pytest.mark.parametrize(("name", "kind"), [("trap.gp", "event"), ("insn.cli", "cost"), ("insn.lgdt", "cost"), ("Fidelity", "term"),
                                            (claims.names()[0], "claim")])
def test_everything_can_be_explained(name: str, kind: str) -> None:
    found: dict[str, Any] = verb.explain(name, ["prescott-2005"])
    assert found["kind"].startswith(kind) and verb.words(found)
