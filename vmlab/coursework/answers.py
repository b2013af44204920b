"""What is right, found by running, pricing or judging; and whether an answer is.

An exercise's ``answer`` says in data what is right. Its ``kind`` is one of

``number``    a ``count`` or a ``price`` of the exercise's cells as a claim's check writes it (:mod:`vmlab.claims.checks`), ``over`` another;
              or the value at which a claim ``flips``. Right ``within`` a share of it.
``word``      a ``field`` of a cell's record; the name of the ``cheapest`` of several cells on a profile; the ``first`` profile on which
              one cell is cheaper than another; the ``provenance`` of a cost.
``profile``   a CPU generation on which a claim has the ``verdict``.
``cost``      a value of one cost, within its range, that turns a claim's verdict.
``strategy``  FILE.py:CLASS of a technique under which the workloads end as on the bare machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmlab.errors import ConfigError
from vmlab.parameters import nearest

if TYPE_CHECKING:
    from vmlab.claims.evidence import Evidence
    from vmlab.coursework.course import Exercise

_JOBS = 2


@dataclass(frozen=True)
class Truth:
    """What is right: a number or a word where there is only one, and a sentence for a teacher."""

    value: float | str | None
    words: str


@dataclass(frozen=True)
class Reply:
    """``right`` is None where nothing was answered. Shown as its words, in a notebook and on a terminal."""

    right: bool | None
    words: str

    def __repr__(self) -> str:
        return self.words


def check(exercise: Exercise, answer: object) -> Reply:
    """Whether an answer is right. :raises ConfigError: it is not of the form that is asked for."""
    if answer is None:
        return Reply(None, f"Not answered yet. {exercise.ask}\nThe answer is {_FORMS[exercise.answer['kind']](exercise.answer)}.")
    right, words = KINDS[exercise.answer["kind"]](exercise, answer)
    return Reply(right, f"Right. {words}" if right else f"Not yet. {words}\nHint: {exercise.hint}")


def truth(exercise: Exercise) -> Truth:
    """What is right, found now."""
    return _TRUTHS[exercise.answer["kind"]](exercise)


# --- numbers -----------------------------------------------------------------------------------------------


def _number(exercise: Exercise, answer: object) -> tuple[bool, str]:
    given = _as_number(answer)
    right = float(truth(exercise).value or 0.0)
    if math.isclose(given, right, rel_tol=float(exercise.answer.get("within", 0.01)), abs_tol=1e-9):
        return True, f"It is {right:,.6g} {exercise.answer['unit']}."
    return False, f"{given:,.6g} {exercise.answer['unit']} is too {'many' if given > right else 'few'}."


def _number_truth(exercise: Exercise) -> Truth:
    from vmlab import costs
    from vmlab.claims import checks

    answer = exercise.answer
    if "flips" in answer:
        of = answer["flips"]
        decided = _verdict(of["claim"])["decided_by"][of["profile"]]
        return Truth(decided["flips_at"], f"{decided['cost']} = {decided['flips_at']:,.6g} {answer['unit']} turns {of['claim']} on {of['profile']}")
    profile = str(answer.get("profile", ""))
    evidence = _evidence(exercise, [name for name in (profile, answer.get("over_profile")) if name])

    def value(reference: Mapping[str, Any], on: str) -> float:
        if "count" in answer:
            return checks.counted(evidence, reference)
        return checks.cycles(evidence, reference, on).value(costs.load(on))

    found = value(answer["count"] if "count" in answer else answer["price"], profile)
    if "over" in answer:
        found /= value(answer["over"], str(answer.get("over_profile", profile)))
    return Truth(found, f"{found:,.6g} {answer['unit']}{f' on {profile}' if profile else ''}")


def _as_number(answer: object) -> float:
    try:
        if isinstance(answer, bool):
            raise ValueError
        found = float(str(answer).replace(",", "").replace("_", ""))
        if not math.isfinite(found):
            raise ValueError
        return found
    except ValueError:
        raise ConfigError(f"a number is asked for, not {answer!r}") from None


# --- words -------------------------------------------------------------------------------------------------


def _word(exercise: Exercise, answer: object) -> tuple[bool, str]:
    right = truth(exercise)
    if _bare(str(answer)) == _bare(str(right.value)):
        return True, f"{right.words[:1].upper()}{right.words[1:]}."
    return False, f"It is not {answer}."


def _bare(word: str) -> str:
    """In small letters; ``iretd``, ``pushfd`` and ``popfd`` are the 32-bit spellings of what manuals call IRET, PUSHF and POPF."""
    word = word.strip().lower()
    return word[:-1] if word in ("iretd", "pushfd", "popfd") else word


def _word_truth(exercise: Exercise) -> Truth:
    from vmlab import costs

    answer = exercise.answer
    if "provenance" in answer:
        of = answer["provenance"]
        figure = costs.load(of["profile"]).figure(of["cost"])
        if figure is None:
            raise ConfigError(f"{of['profile']} has no cost {of['cost']}")
        return Truth(figure.provenance, f"{of['cost']} is {figure.provenance}")
    if "field" in answer:
        found: Any = _evidence(exercise, []).cell(answer["field"]["cell"])
        for key in answer["field"]["path"]:
            found = found[key]
        return Truth(str(found), f"it is {found}")
    if "cheapest" in answer:
        profile = answer["cheapest"]["profile"]
        prices = _prices(exercise, profile, answer["cheapest"]["cells"])
        best = min(prices, key=lambda name: prices[name])
        told = ", ".join(f"{name} {value:,.0f}" for name, value in prices.items())
        return Truth(best, f"it is {best} (cycles on {profile}: {told})")
    return _first(exercise, answer["first"])


def _first(exercise: Exercise, of: Mapping[str, Any]) -> Truth:
    """The oldest profile on which one cell is cheaper than another. A CPU that cannot run one of them has no say."""
    from vmlab import costs
    from vmlab.claims.evidence import Missing

    for name in sorted(of.get("among", costs.names()), key=lambda name: (costs.load(name).year, name)):
        try:
            prices = _prices(exercise, name, [of["cheaper"], of["than"]])
        except Missing:
            continue
        if prices[of["cheaper"]] < prices[of["than"]]:
            return Truth(name, f"it is {name}: {prices[of['cheaper']]:,.0f} against {prices[of['than']]:,.0f} cycles an iteration")
    return Truth("none", "it is so on none of them")


def _prices(exercise: Exercise, profile: str, cells: Sequence[str]) -> dict[str, float]:
    from vmlab import costs
    from vmlab.claims import checks

    evidence = _evidence(exercise, [profile])
    return {name: checks.cycles(evidence, {"cell": name, "per": "iteration"}, profile).value(costs.load(profile)) for name in cells}


# --- judgements --------------------------------------------------------------------------------------------


def _profile(exercise: Exercise, answer: object) -> tuple[bool, str]:
    of = exercise.answer
    by_profile = _verdict(of["claim"])["by_profile"]
    name = str(answer).strip()
    if name not in by_profile:
        raise ConfigError(f"no profile {name!r}{nearest(name, by_profile)}")
    return by_profile[name] == of["verdict"], f"On {name}, {of['claim']} {_says(by_profile[name])}."


def _profile_truth(exercise: Exercise) -> Truth:
    of = exercise.answer
    found = [name for name, verdict in _verdict(of["claim"])["by_profile"].items() if verdict == of["verdict"]]
    return Truth(found[0] if found else None, f"{of['claim']} {_says(of['verdict'])} on {', '.join(found) or 'none'}")


def _cost(exercise: Exercise, answer: object) -> tuple[bool, str]:
    from vmlab import costs

    of, value = exercise.answer, _as_number(answer)
    profile = costs.load(of["profile"])
    figure = profile.figure(of["cost"])
    if figure is None:
        raise ConfigError(f"{of['profile']} has no cost {of['cost']}")
    if not figure.low <= value <= figure.high:
        return False, f"{of['cost']} is given as {figure.low:g} to {figure.high:g}, so {value:g} is out of its range."
    before = _verdict(of["claim"])["verdict"]
    after = _verdict(of["claim"], {of["profile"]: profile.with_values({of["cost"]: value})})["verdict"]
    return after != before, f"With {of['cost']} = {value:g} {of['claim']} {_says(after)}; with {figure.value:g} it {_says(before)}."


def _cost_truth(exercise: Exercise) -> Truth:
    of = exercise.answer
    decided = _verdict(of["claim"])["decided_by"][of["profile"]]
    if decided["cost"] != of["cost"] or not decided["within_range"]:
        return Truth(None, f"{of['cost']} does not turn {of['claim']} within its range; {decided['cost']} decides")
    return Truth(decided["flips_at"], f"{of['claim']} turns where {of['cost']} passes {decided['flips_at']:.6g}, and "
                                      f"{decided['low']:g} to {decided['high']:g} is its range")


def _says(verdict: str) -> str:
    return "is undecided" if verdict == "undecided" else verdict


def _verdict(claim: str, costbook: Mapping[str, Any] | None = None) -> dict[str, Any]:
    from vmlab import claims, costs
    from vmlab.claims.running import judge
    from vmlab.experiment.lab import Lab

    return judge([claims.load(claim)], Lab(), costs.names(), jobs=_JOBS, starting=_silent, costbook=costbook).verdicts[0]


def _strategy(exercise: Exercise, answer: object) -> tuple[bool, str]:
    from vmlab.experiment.gather import Gatherer
    from vmlab.experiment.lab import Lab

    technique = str(answer).strip()
    if ".py:" not in technique:
        raise ConfigError(f"FILE.py:CLASS is asked for, not {technique!r}")
    gatherer = Gatherer(Lab([technique]), "coursework")
    cells = [cell for workload in exercise.answer["workloads"]
             for cell in gatherer.expand({"technique": technique, "workload": workload, "iterations": exercise.answer["iterations"]})]
    wrong = []
    for cell in gatherer.gather(cells, _JOBS, _silent).cells:
        if cell["technique"] == technique and not cell["fidelity"].get("matches_native"):
            wrong.append(f"{cell['parameters']['workload']} ({cell['error'] or 'ends otherwise than on the bare machine'})")
    if wrong:
        return False, f"Not faithful yet: {'; '.join(wrong)}."
    return True, f"It is faithful on {', '.join(exercise.answer['workloads'])}."


def _strategy_truth(exercise: Exercise) -> Truth:
    return Truth(None, f"any strategy that is faithful on {', '.join(exercise.answer['workloads'])}")


# --- what the kinds have in common ---------------------------------------------------------------------------


def _evidence(exercise: Exercise, profiles: Sequence[str]) -> Evidence:
    """The exercise's cells, run where no earlier run has them, kept below ``results/coursework``."""
    from vmlab import costs
    from vmlab.claims.evidence import Evidence
    from vmlab.experiment.gather import Gatherer
    from vmlab.experiment.lab import Lab

    gatherer = Gatherer(Lab(), "coursework")
    cells = [cell for block in exercise.cells.values() for cell in gatherer.expand(block)]
    gathered = gatherer.gather(cells, _JOBS, _silent)
    return Evidence(gathered.cells, tuple(profiles), {name: costs.load(name) for name in profiles}, blocks=exercise.cells)


def _silent(_todo: int, _found: int) -> Callable[[str, str, float], None]:
    return lambda _name, _status, _seconds: None


#: Kind of answer -> what says whether one is right, and why.
KINDS: Mapping[str, Callable[[Exercise, object], tuple[bool, str]]] = {
    "number": _number, "word": _word, "profile": _profile, "cost": _cost, "strategy": _strategy,
}
_TRUTHS: Mapping[str, Callable[[Exercise], Truth]] = {
    "number": _number_truth, "word": _word_truth, "profile": _profile_truth, "cost": _cost_truth, "strategy": _strategy_truth,
}
_FORMS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "number": lambda answer: f"a number ({answer['unit']})",
    "word": lambda answer: "a word" + (f": {', '.join(answer['cheapest']['cells'])}" if "cheapest" in answer else ""),
    "profile": lambda answer: "the name of a profile",
    "cost": lambda answer: f"a value of {answer['cost']} on {answer['profile']}",
    "strategy": lambda answer: "FILE.py:CLASS",
}
