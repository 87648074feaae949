"""What settings are refused, and how that is said."""

from typing import Any

import pytest

from pipeline.simulator import Options, parse_fault


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        pytest.param({"rpm": 0}, "rpm is 0", id="no requests at all"),
        pytest.param({"input_tpm": -1}, "input_tpm is -1", id="negative limit"),
        pytest.param({"burst": 5}, "give rpm too", id="burst without rpm"),
        pytest.param({"latency": -0.1}, "latency is -0.1", id="negative latency"),
        pytest.param({"cache_ratio": 1.5}, "cache_ratio is 1.5", id="share above 1"),
        pytest.param({"faults": {"418": 0.1}}, "unknown kind of fault '418'", id="unknown fault"),
        pytest.param({"faults": {"500": 2.0}}, "give a share from 0 to 1", id="rate above 1"),
        pytest.param({"faults": {"500": 0.6, "529": 0.6}}, "add up to 1.2", id="rates above 1 together"),
        pytest.param({"batch_seconds": -1.0}, "batch_seconds is -1.0", id="batches that end before they begin"),
        pytest.param({"batch_cancel_seconds": -1.0}, "batch_cancel_seconds is -1.0", id="negative cancelling"),
        pytest.param({"batch_window": 0.0}, "batch_window is 0.0", id="no window"),
        pytest.param({"batch_enqueued_tokens": 0}, "batch_enqueued_tokens is 0", id="no tokens"),
        pytest.param({"batch_max_requests": 0}, "batch_max_requests is 0", id="batches without requests"),
        pytest.param({"batch_max_bytes": -1}, "batch_max_bytes is -1", id="batches without bytes"),
        pytest.param({"batch_faults": {"delete": ["500"]}}, "unknown operation 'delete'", id="unknown operation"),
        pytest.param({"batch_faults": {"poll": ["418"]}}, "unknown kind of fault '418'", id="unknown batch fault"),
        pytest.param({"batch_faults": {"poll": ["500:0.3"]}}, "unknown kind of fault '500:0.3'", id="share of 500"),
        pytest.param({"batch_faults": {"poll": ["cut:0.3"]}}, "only 'results' can be cut", id="cut of a poll"),
        pytest.param({"batch_faults": {"results": ["cut"]}}, "write cut:SHARE", id="cut without share"),
        pytest.param({"batch_faults": {"results": ["cut:1"]}}, "write cut:SHARE", id="cut after the end"),
        pytest.param({"batch_faults": {"results": ["cut:x"]}}, "write cut:SHARE", id="cut at no number"),
        pytest.param({"batch_faults": {"poll": "500"}}, "give a list of kinds", id="kind without list"),
    ],
)
def test_refused(settings: dict[str, Any], reason: str) -> None:
    """A setting that cannot be meant is refused with its name, its value and the way out."""
    with pytest.raises(ValueError, match=reason):
        Options(**settings)


def test_keys_are_not_shown() -> None:
    """The accepted keys do not appear in the options' `repr`."""
    assert "secret" not in repr(Options(keys=frozenset({"secret"})))


def test_parse_fault() -> None:
    """A fault is written KIND=RATE."""
    assert parse_fault("429-no-hint=0.05") == ("429-no-hint", 0.05)


@pytest.mark.parametrize("text", ["429", "429=", "429=often", "=0.1", "429=1.5"])
def test_parse_fault_refused(text: str) -> None:
    """Anything but a known kind with a rate from 0 to 1 is refused."""
    with pytest.raises(ValueError, match="fault"):
        parse_fault(text)


def test_unknown_fault_lists_known() -> None:
    """The error of an unknown kind lists the known ones."""
    with pytest.raises(ValueError, match="429-no-hint, 500, 502-html"):
        parse_fault("teapot=0.1")
