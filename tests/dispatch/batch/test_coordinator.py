"""The batch lane as a whole, before a simulator whose clock is virtual and whose own count is the judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import httpx
import orjson
import pytest

import pipeline
from pipeline.accounting.pricing import Prices
from pipeline.accounting.verify import verify
from pipeline.core import config, http
from pipeline.core.config import Config
from pipeline.core.errors import StorageError, UsageError
from pipeline.core.types import Usage
from pipeline.runner.options import Options
from pipeline.runner.summary import Summary
from pipeline.simulator import Options as Simulation
from pipeline.simulator import build_app
from tests.virtual import virtual_time

MODELS = {"anthropic": "claude-haiku-5-5", "openai": "gpt-6-luna"}
DAY = 86_400.0
both_providers = pytest.mark.parametrize("provider", list(MODELS))
pytestmark = [*virtual_time, pytest.mark.usefixtures("no_threads")]


class World:
    """A simulator in this event loop, and runs before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, **simulation: Any) -> None:
        self.app = build_app(Simulation(**simulation))
        self.directory = directory
        self.settings = config.simulated(Config(), "http://127.0.0.1:1").with_(
            "sending", timeout=30.0, share_limits=False
        )
        self.said: list[str] = []
        client = http.Client
        monkeypatch.setattr(http, "Client", lambda sending: client(sending, httpx.ASGITransport(app=self.app)))

    @property
    def truth(self) -> dict[str, Any]:
        """Return what the simulator counted."""
        counted: dict[str, Any] = self.app.state.simulator.statistics.snapshot()
        return counted

    def change(self, **options: Any) -> None:
        """Make other batches from now on."""
        state = self.app.state.simulator
        state.options = replace(state.options, **options)

    def write(self, lines: Iterable[Mapping[str, Any]]) -> Path:
        path = self.directory / "in.jsonl"
        path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
        return path

    async def run(
        self, *, lane: str = "batch", no_wait: bool = False, options: Options | None = None, **batches: Any
    ) -> Summary:
        return await pipeline.run_batch(
            [self.directory / "in.jsonl"],
            output=self.directory / "out.jsonl",
            config=self.settings.with_("batches", **batches).replace(lane=lane),
            options=options or Options(no_wait=no_wait),
            say=self.said.append,
        )

    async def cancel_after(self, seconds: float) -> None:
        """Be somebody who cancels the first Anthropic batch."""
        await anyio.sleep(seconds)
        headers = {"x-api-key": "simulated", "anthropic-version": "2023-06-01"}
        fake = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=fake, base_url="http://simulator", headers=headers) as client:
            (batch,) = (await client.get("/v1/messages/batches")).json()["data"]
            assert (await client.post(f"/v1/messages/batches/{batch['id']}/cancel")).status_code == 200

    def damage(self, content: bytes | None) -> None:
        """Put something else in the place of the requests of chunks, or delete them."""
        for path in (self.directory / "out.batches").glob("?" * 12 + ".jsonl"):
            path.unlink() if content is None else path.write_bytes(content)

    def results(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in (self.directory / "out.jsonl").read_bytes().splitlines()]


def line(number: int, provider: str, text: str = "") -> dict[str, Any]:
    message = {"role": "user", "content": f"question {number} {text}"}
    return {"custom_id": f"q {number}", "model": MODELS[provider], "max_tokens": 30, "messages": [message]}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "count", [pytest.param(12_000, marks=pytest.mark.slow), pytest.param(120_000, marks=pytest.mark.long)]
)
async def test_very_many_requests_of_both_providers(
    count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every id stands once, tokens are the simulator's own count, and the cost is half of what it were live."""
    world = World(monkeypatch, tmp_path, batch_seconds=3_600.0)
    world.write(line(number, "openai" if number % 2 else "anthropic") for number in range(count))

    summary = await world.run(max_requests=count // 5)

    results = world.results()
    assert summary.exit_code == 0
    assert sorted(result["custom_id"] for result in results) == sorted(f"q {number}" for number in range(count))
    assert {(result["lane"], result["success"]) for result in results} == {("batch", True)}
    truth = world.truth
    assert (truth["batches"]["created"], truth["batches"]["requests"], truth["duplicates_paid"]) == (6, count, 0)
    models = truth["by_model"].values()
    assert summary.run.tokens.input == sum(model["input_tokens"] for model in models)
    assert summary.run.tokens.output == sum(model["output_tokens"] for model in models)
    assert 2 * summary.run.spending.nanos == live_price(world.settings, results)
    assert not [path for path in (tmp_path / "out.batches").iterdir() if path.name != "journal.jsonl"]


def live_price(settings: Config, results: Sequence[Mapping[str, Any]]) -> int:
    """Return what the same answers cost live, in nano-dollars."""
    prices = Prices(settings)
    at = datetime(2026, 11, 26, tzinfo=UTC)
    rates = {name: prices.rates(provider=name, model=MODELS[name], lane="live", at=at) for name in MODELS}
    total = 0
    for result in results:
        rate, usage = rates[result["provider"]], result["usage"]
        assert rate
        total += rate.cost(Usage(input_tokens=usage["input_tokens"], output_tokens=usage["output_tokens"])) or 0
    return total


@both_providers
async def test_what_expired_goes_with_the_next_batch(
    provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A batch that expires keeps what it answered; the rest is sent again, and nothing is paid twice."""
    world = World(monkeypatch, tmp_path, batch_seconds=1.5 * DAY, batch_window=DAY)
    world.write(line(number, provider) for number in range(90))
    await world.run(no_wait=True)
    await anyio.sleep(DAY)
    world.change(batch_seconds=60.0)

    summary = await world.run()

    assert (summary.exit_code, summary.run.succeeded) == (0, 90)
    assert (world.truth["answered"], world.truth["duplicates_paid"], world.truth["batches"]["created"]) == (90, 0, 2)
    again = [result for result in world.results() if result["attempts"] == 2]
    assert len(again) == world.truth["batches"]["expired"] > 20
    assert {attempt["type"] for result in again for attempt in result["failed_attempts"]} == {"batch_expired"}


@pytest.mark.slow
@both_providers
async def test_what_expired_goes_live_in_the_lane_auto(
    provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The lane `auto` sends live what a batch did not answer; each part has the price of its lane."""
    world = World(monkeypatch, tmp_path, batch_seconds=1.5 * DAY, batch_window=DAY)
    world.write(line(number, provider) for number in range(90))

    summary = await world.run(lane="auto")

    assert (summary.exit_code, summary.run.succeeded, world.truth["duplicates_paid"]) == (0, 90, 0)
    rows = {row["lane"]: row for row in summary.run.by_model()}
    assert (rows["batch"]["requests"], rows["live"]["requests"]) == (60, 30)
    assert rows["batch"]["cost"] / 60 < 0.7 * rows["live"]["cost"] / 30


@both_providers
async def test_a_batch_that_never_ends_is_live_before_the_deadline(
    provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is cancelled in time, what it answered is kept, the rest goes live, and nothing is paid or counted twice."""
    world = World(monkeypatch, tmp_path, batch_seconds=DAY, batch_window=2 * DAY, batch_cancel_seconds=300.0)
    world.write(line(number, provider) for number in range(500))

    summary = await world.run(lane="auto", deadline=4 * 3_600.0)

    assert (summary.exit_code, summary.run.succeeded) == (0, 500)
    assert summary.wall_seconds < 4 * 3_600
    assert (world.truth["answered"], world.truth["duplicates_paid"]) == (500, 0)
    lanes = Counter(result["lane"] for result in world.results())
    assert lanes["batch"] == world.truth["batches"]["answered"] > 0
    assert (lanes["live"], summary.attempts.unknown) == (500 - lanes["batch"], 0)
    assert world.truth["batches"]["calls"]["cancel"] == 1


async def test_a_batch_that_does_not_heed_its_cancelling_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After 15 minutes all goes live; what may be paid twice is counted and told with each result."""
    world = World(monkeypatch, tmp_path, batch_seconds=10 * DAY, batch_window=30 * DAY, batch_cancel_seconds=DAY)
    world.write(line(number, "openai") for number in range(50))

    summary = await world.run(lane="auto", deadline=3 * 3_600.0)

    assert (summary.exit_code, summary.run.succeeded, summary.attempts.unknown) == (0, 50, 50)
    assert summary.wall_seconds < 3 * 3_600
    attempts = [attempt for result in world.results() for attempt in result["failed_attempts"]]
    assert {(attempt["type"], attempt["may_be_billed"]) for attempt in attempts} == {("batch_abandoned", True)}


@both_providers
async def test_without_waiting_the_same_command_collects_later(
    provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Runs end with 75 until the batches have ended, and each batch is made once."""
    world = World(monkeypatch, tmp_path, batch_seconds=3_600.0)
    world.write(line(number, provider) for number in range(30))

    first = await world.run(no_wait=True, max_requests=10)
    second = await world.run(no_wait=True, max_requests=10)
    await anyio.sleep(3_700)
    third = await world.run(no_wait=True, max_requests=10)

    assert [each.exit_code for each in (first, second, third)] == [75, 75, 0]
    assert [each.pending for each in (first, second, third)] == [30, 30, 0]
    assert "30 requests are in batches that are still running" in str(first.stop_reason)
    assert (world.truth["batches"]["created"], world.truth["duplicates_paid"]) == (3, 0)
    assert len(world.results()) == 30


async def test_a_batch_that_somebody_cancelled_is_not_made_again_unasked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What it answered is kept, the run ends with 75, and the command repeated sends the rest."""
    world = World(monkeypatch, tmp_path, batch_seconds=3_600.0)
    world.write(line(number, "anthropic") for number in range(100))

    async with anyio.create_task_group() as beside:
        beside.start_soon(world.cancel_after, 1_800.0)
        first = await world.run()
    second = await world.run()

    assert (first.exit_code, first.status) == (75, "stopped")
    assert "was cancelled" in str(first.stop_reason)
    assert 40 < first.run.succeeded < 60
    assert (second.exit_code, second.run.succeeded) == (0, 100 - first.run.succeeded)
    assert (world.truth["batches"]["created"], world.truth["duplicates_paid"]) == (2, 0)


async def test_a_model_that_is_gone_ends_its_batch_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A batch that fails validation as a whole leaves its requests pending, with the provider's words; others go on."""
    world = World(monkeypatch, tmp_path)
    world.write([line(number, "openai") for number in range(5)] + [line(9, "openai") | {"model": "gpt-4-unknown"}])

    summary = await world.run()

    assert (summary.exit_code, summary.run.succeeded, summary.pending) == (3, 5, 1)
    assert "gpt-4-unknown" in str(summary.stop_reason)


async def test_a_full_queue_is_waited_for_and_never_overfilled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Batches for which the provider has no room are made when others have ended, too large ones in parts."""
    world = World(monkeypatch, tmp_path, batch_seconds=600.0, batch_enqueued_tokens=700)
    world.write(line(number, "openai") for number in range(200))

    summary = await world.run(max_requests=100)

    assert (summary.exit_code, summary.run.succeeded) == (0, 200)
    assert world.truth["duplicates_paid"] == 0


async def test_the_budget_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing goes into a batch whose worst case the cap does not cover; the rest is pending, exit 4."""
    world = World(monkeypatch, tmp_path, batch_seconds=60.0)
    world.settings = world.settings.with_("budget", per_run=Decimal("0.002"))
    world.write(line(number, "openai") for number in range(500))

    summary = await world.run()

    assert (summary.exit_code, summary.status) == (4, "stopped")
    assert 0 < summary.run.succeeded < 500
    assert summary.run.spending.nanos <= 2_000_000
    assert summary.cap_used <= 2_000_000
    assert world.truth["batches"]["created"] > 1  # what comes back below its worst case makes room


async def test_what_a_batch_answers_for_a_line_that_is_gone_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Lines may be taken out, put in and moved while a batch goes on; nothing is sent twice, and the counts fit."""
    world = World(monkeypatch, tmp_path, batch_seconds=3_600.0)
    world.write(line(number, "anthropic", "[[expire]]" if number in (3, 4) else "") for number in range(20))
    await world.run(no_wait=True)
    await anyio.sleep(3_700)
    kept = [number for number in reversed(range(20)) if number not in (4, 5)]
    world.write(line(number, "anthropic", "[[expire]]" if number == 3 else "") for number in [*kept, 20])

    summary = await world.run(lane="auto")

    assert (summary.total, summary.run.succeeded, summary.pending, summary.exit_code) == (19, 20, 0, 0)
    assert sorted(result["custom_id"] for result in world.results()) == sorted(f"q {n}" for n in [*kept, 5, 20])
    assert world.truth["duplicates_paid"] == 0


async def test_live_leaves_to_batches_what_is_in_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run in the lane `live` sends what is new, pays nothing twice, and tells what is still in batches."""
    world = World(monkeypatch, tmp_path, batch_seconds=3_600.0)
    world.write(line(number, "openai") for number in range(10))
    await world.run(no_wait=True)
    world.write(line(number, "openai") for number in range(15))

    first = await world.run(lane="live")
    await anyio.sleep(3_700)
    second = await world.run(lane="live")

    assert (first.exit_code, first.run.succeeded, first.pending) == (75, 5, 10)
    assert (second.exit_code, second.run.succeeded, second.reused) == (0, 10, 5)
    assert world.truth["duplicates_paid"] == 0


async def test_fresh_refuses_to_pay_again_for_what_is_in_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Results are not set aside while batches of them go on."""
    world = World(monkeypatch, tmp_path, batch_seconds=3_600.0)
    world.write(line(number, "openai") for number in range(3))
    await world.run(no_wait=True)

    with pytest.raises(UsageError, match="not collected"):
        await world.run(options=Options(fresh=True))


@both_providers
async def test_every_request_of_a_batch_is_accounted_for(
    provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Results that fail, are missing, come twice or belong to nobody: one result for each request in the end."""
    world = World(monkeypatch, tmp_path, batch_unknown_results=True, batch_empty_file_ids=True)
    world.settings = world.settings.with_("sending", max_attempts=2)
    marks = {1: "[[status:400]]", 2: "[[status:500]]", 3: "[[missing]]", 4: "[[twice]]"}
    world.write(line(number, provider, marks.get(number, "")) for number in range(10))

    summary = await world.run()

    results = {result["custom_id"]: result for result in world.results()}
    assert len(world.results()) == len(results) == 10
    assert {id for id, result in results.items() if not result["success"]} == {"q 1", "q 2", "q 3"}
    assert [results[f"q {number}"]["attempts"] for number in (0, 1, 2, 3, 4)] == [1, 1, 2, 2, 1]
    assert results["q 3"]["error"]["type"] == "batch_missing"
    assert (summary.exit_code, summary.attempts.unknown, world.truth["duplicates_paid"] > 0) == (1, 2, True)
    assert any("requests that were not sent" in said for said in world.said)


async def test_results_name_their_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A result line says which batch it came from, the totals which batches there were, and what each cost."""
    world = World(monkeypatch, tmp_path)
    world.write(line(number, "anthropic") for number in range(4))

    summary = await world.run()

    (batch,) = summary.as_dict()["batches"]
    assert {result["batch_id"] for result in world.results()} == {batch["id"]}
    assert (batch["requests"], batch["succeeded"], batch["collected"]) == (4, 4, True)
    assert batch["cost"] == pytest.approx(sum(result["cost_usd"] for result in world.results()))


async def test_wrong_keys_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key that the provider refuses is a stop with exit 3; all is pending, and no chunk is left behind."""
    world = World(monkeypatch, tmp_path, keys=frozenset({"another"}))
    world.write(line(number, "openai") for number in range(4))

    summary = await world.run()

    assert (summary.exit_code, summary.pending, world.truth["batches"]["created"]) == (3, 4, 0)
    assert "API key" in str(summary.stop_reason)
    assert not [path for path in (tmp_path / "out.batches").iterdir() if path.name != "journal.jsonl"]


async def test_a_budget_that_nobody_can_settle_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a batch holds that cannot be asked after is not waited for: the run ends, and tells both reasons."""
    world = World(monkeypatch, tmp_path, batch_faults={"poll": ["500"] * 1_000})
    world.settings = world.settings.with_("budget", per_run=Decimal("0.001"))
    world.write(line(number, "openai") for number in range(100))

    summary = await world.run()

    assert (summary.exit_code, summary.run.succeeded, summary.pending) == (4, 0, 100)
    assert summary.cap_used <= 1_000_000
    assert "out of reach" in str(summary.stop_reason)


async def test_the_rest_of_many_batches_finds_room_to_go_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All that wait until the sender has room are told when it has."""
    world = World(monkeypatch, tmp_path, batch_seconds=600.0)
    world.settings = world.settings.with_("input", read_ahead_bytes=3_000)
    world.write(line(number, "openai", "[[expire]]") for number in range(60))

    summary = await world.run(lane="auto", max_requests=12)

    assert (summary.exit_code, summary.run.succeeded) == (0, 60)


async def test_equal_requests_of_a_batch_are_not_sent_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With `dedupe` a request that is in a batch stands for its equals, also for those that come before it now."""
    world = World(monkeypatch, tmp_path, batch_seconds=600.0)
    one, other = line(1, "openai"), line(1, "openai") | {"custom_id": "other"}
    world.write([one])
    await world.run(no_wait=True)
    world.write([other, one])

    summary = await world.run(options=Options(dedupe=True))

    assert (summary.exit_code, world.truth["answered"]) == (0, 1)
    assert {result["custom_id"] for result in world.results()} == {"q 1", "other"}


@both_providers
async def test_results_are_collected_before_an_error_in_them_ends_the_run(
    provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A result that tells of a spent account or a wrong key does not cost the answers behind it."""
    world = World(monkeypatch, tmp_path)
    world.write(line(number, provider, "[[status:401]]" if number == 5 else "") for number in range(600))

    summary = await world.run()

    assert (summary.exit_code, summary.run.succeeded, summary.pending) == (3, 599, 1)
    assert [batch["collected"] for batch in summary.as_dict()["batches"]] == [True]


@pytest.mark.parametrize("damage", [b"", b"{}\n{}\n", None], ids=["emptied", "changed", "deleted"])
async def test_damaged_requests_are_not_sent(
    damage: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A chunk that is not what was written is planned anew if no batch was made of it, else the run says what to do."""
    world = World(monkeypatch, tmp_path, batch_faults={"upload": ["hang"]})
    world.write(line(number, "openai") for number in range(3))
    with anyio.move_on_after(5):
        await world.run()
    world.damage(damage)

    summary = await world.run(no_wait=True)
    assert (summary.exit_code, world.truth["batches"]["created"]) == (75, 1)
    assert any("is damaged, but no batch was made of it" in said for said in world.said)

    world.damage(damage)
    with pytest.raises(StorageError, match="is damaged or gone, and batch") as caught:
        await world.run()
    assert "--forget" in str(caught.value.hint)


async def test_a_directory_of_somebody_else_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files beside the results that are not ours are neither deleted nor mixed with ours."""
    world = World(monkeypatch, tmp_path)
    (tmp_path / "out.batches").mkdir()
    (tmp_path / "out.batches" / "part-1.jsonl").write_text("mine")
    world.write(line(number, "openai") for number in range(3))

    assert (await world.run(lane="live")).exit_code == 0
    world.write(line(number, "openai") for number in range(4))
    with pytest.raises(UsageError, match="is not ours"):
        await world.run()

    assert [path.name for path in (tmp_path / "out.batches").iterdir()] == ["part-1.jsonl"]


async def test_a_line_changed_meanwhile_has_its_new_result_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The answer to the line as it was is set aside when the run ends: it was paid for, and is not the line's."""
    world = World(monkeypatch, tmp_path, batch_seconds=600.0)
    world.write(line(number, "openai") for number in range(5))
    await world.run(no_wait=True)
    world.write(line(number, "openai", "changed" if number == 2 else "") for number in range(5))

    summary = await world.run()

    assert (summary.exit_code, summary.extra, summary.pending) == (0, 1, 0)
    assert sorted(result["custom_id"] for result in world.results()) == [f"q {number}" for number in range(5)]
    assert verify(tmp_path / "out.jsonl", [str(tmp_path / "in.jsonl")], world.settings).exit_code == 0


@both_providers
async def test_without_a_batch_api_auto_goes_live(
    provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where an endpoint has no batch API, `auto` answers all live and ends with 0; `batch` says what to do, exit 3."""
    world = World(monkeypatch, tmp_path)
    live = ("/v1/messages", "/v1/chat/completions")
    world.app.router.routes[:] = [route for route in world.app.routes if getattr(route, "path", "") in live]
    world.write(line(number, provider) for number in range(5))

    batch = await world.run()
    auto = await world.run(lane="auto")

    assert (batch.exit_code, batch.pending) == (3, 5)
    assert "has this endpoint a batch API?" in str(batch.stop_reason)
    assert (auto.exit_code, auto.run.succeeded) == (0, 5)


async def test_a_stop_amid_everything_leaves_all_to_a_later_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whenever a run is cancelled, the next ones finish the job: nothing lost, nothing paid or made twice."""
    world = World(monkeypatch, tmp_path, batch_seconds=30.0)
    world.write(line(number, "openai" if number % 2 else "anthropic") for number in range(40))

    for tenths in range(1, 60, 3):
        with anyio.move_on_after(tenths / 10):
            await world.run(max_requests=5)
    summary = await world.run(max_requests=5)

    assert (summary.exit_code, summary.reused + summary.run.succeeded) == (0, 40)
    assert (world.truth["answered"], world.truth["duplicates_paid"], world.truth["batches"]["created"]) == (40, 0, 8)
