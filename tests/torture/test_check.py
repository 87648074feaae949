"""The judge itself: it passes an honest run and sees every kind of wrong one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.torture import truth
from tests.torture.check import Verdict, check

Objects = list[dict[str, Any]]
Sabotage = Callable[[Objects, Objects], None]
IDS = ["a", "b", "c"]


def honest() -> tuple[Objects, Objects]:
    """Return the results and the journal of a run: `a` answered, `b` at the second call, `c` failed."""
    flagged = {"type": "timeout", "may_be_billed": True}
    results = [
        result("a"),
        {**result("b"), "attempts": 2, "failed_attempts": [flagged]},
        {"custom_id": "c", "success": False, "attempts": 1, "error": {"type": "timeout", "attempts": [flagged]}},
    ]
    journal = [*call(1, "a"), *call(2, "b", is_answer=False), *call(3, "b"), *call(4, "c", is_answer=False)]
    return results, journal


def result(id: str) -> dict[str, Any]:
    input, output = truth.tokens(id)
    usage = {"input_tokens": input, "output_tokens": output}
    return {"custom_id": id, "success": True, "attempts": 1, "content": truth.content(id), "usage": usage}


def call(number: int, id: str, *, is_answer: bool = True) -> Objects:
    used = dict(zip(("input", "output"), truth.tokens(id), strict=True))
    books = {"billed": used, "is_answer": is_answer, "told": used if is_answer else None, "suffix": ""}
    return [
        {"event": "call", "call": number, "id": id, "at": 0.0, **books},
        {"event": "end", "call": number, "bytes": 9, "accepted": True, "at": 1.0},
    ]


def judged(results: Objects, journal: Objects, **more: Any) -> Verdict:
    return check(IDS, [json.dumps(result).encode() for result in results], journal, **more)


def test_an_honest_run_holds() -> None:
    """A run in which books and results agree is passed, and what was paid twice is counted."""
    verdict = judged(*honest())

    assert verdict.faults == {}
    assert (verdict.answered, verdict.failed, verdict.calls) == (2, 1, 4)
    assert (verdict.paid_calls, verdict.repeated_paid_calls) == (4, 2)
    assert verdict.sentence().startswith("holds: 3 inputs, 2 answered, 1 failed")


def _swap(results: Objects, journal: Objects) -> None:
    results[0]["content"], results[1]["content"] = results[1]["content"], results[0]["content"]


def _lose(results: Objects, journal: Objects) -> None:
    del results[2]


def _repeat(results: Objects, journal: Objects) -> None:
    results.append(results[0])


def _invent(results: Objects, journal: Objects) -> None:
    results.append({**results[2], "custom_id": "z"})


def _succeed_falsely(results: Objects, journal: Objects) -> None:
    journal[:2] = call(1, "a", is_answer=False)


def _take_what_was_cut(results: Objects, journal: Objects) -> None:
    journal[1]["accepted"] = False


def _miscount(results: Objects, journal: Objects) -> None:
    results[0]["usage"]["output_tokens"] += 1


def _forget_usage(results: Objects, journal: Objects) -> None:
    results[0]["usage"] = None


def _hide_a_bill(results: Objects, journal: Objects) -> None:
    results[2]["error"]["attempts"][0]["may_be_billed"] = False


def _call_in_secret(results: Objects, journal: Objects) -> None:
    journal += call(5, "a", is_answer=False)


@pytest.mark.parametrize(
    ("sabotage", "seen"),
    [
        pytest.param(_swap, {"swapped"}, id="answers exchanged"),
        pytest.param(_lose, {"missing"}, id="a line lost"),
        pytest.param(_repeat, {"twice", "tokens"}, id="a line twice"),
        pytest.param(_invent, {"extra"}, id="a line too many"),
        pytest.param(_succeed_falsely, {"false_successes", "tokens"}, id="an answer that never was"),
        pytest.param(_take_what_was_cut, {"false_successes", "tokens"}, id="an answer that was cut"),
        pytest.param(_miscount, {"wrong_usage", "tokens"}, id="a token too many"),
        pytest.param(_forget_usage, {"wrong_usage", "tokens"}, id="no usage"),
        pytest.param(_hide_a_bill, {"unflagged"}, id="a bill hidden"),
        pytest.param(_call_in_secret, {"unflagged", "unknown_calls"}, id="a call in secret"),
    ],
)
def test_every_sabotage_is_seen(sabotage: Sabotage, seen: set[str]) -> None:
    """What breaks a rule is told, under the name of that rule and no other."""
    results, journal = honest()
    sabotage(results, journal)

    assert judged(results, journal).faults.keys() == seen


def test_a_torn_line_is_seen() -> None:
    """Half a line is no result, and what it was of is missing."""
    results, journal = honest()
    lines = [json.dumps(result).encode() for result in results]

    verdict = check(IDS, [lines[0], lines[1], lines[2][:20]], journal)

    assert verdict.faults == {"torn_lines": 1, "missing": 1}


def test_wrong_totals_are_seen() -> None:
    """The totals of the results file are compared with its lines."""
    input, output = (sum(both) for both in zip(truth.tokens("a"), truth.tokens("b"), strict=True))
    totals = {"results": {"tokens": {"input": input, "output": output + 1}, "requests": {"succeeded": 2}}}

    assert judged(*honest(), usage=totals).faults == {"wrong_totals": 1}


def test_a_run_that_ended_early_may_miss_lines() -> None:
    """Lines that are pending are missing, and that is no fault of a run that was stopped."""
    results, journal = honest()

    assert judged(results[:1], journal, is_partial=True).faults == {}
