"""Planted defects, and the test that catches each: whoever breaks a promise by mistake is told by name.

    python -m tests.torture.saboteurs [--json FILE] [NAME...]

Each defect is a small change of the program in a copy of it; there the named test must fail, as it must pass in an
unchanged copy. A defect that nobody catches is a test that is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.torture.jobs import ROOT

_AT_ONCE = 2
_HANG_SECONDS = 300
_COPIED = ("pipeline", "tests", "samples", "config.yaml", "pyproject.toml", "README.md")
_ORDER = "tests/torture/test_kill.py::test_what_must_be_safe_is_synced_before_it_counts"
_POWER = "tests/torture/test_kill.py::test_a_power_cut_undoes_nothing_that_was_reported_as_done"
_DISK = "tests/torture/test_disk_faults.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Saboteur:
    """A defect: what in a file is replaced by what, and the test that must fail then."""

    name: str
    file: str
    old: str
    new: str
    test: str

    def strike(self, root: Path) -> None:
        """Plant the defect in a copy of the program."""
        path = root / "pipeline" / self.file
        text = path.read_text()
        assert text.count(self.old) == 1, f"{self.name}: the text to replace must stand once in {self.file}"
        harmed = text.replace(self.old, self.new)
        compile(harmed, path, "exec")  # what cannot even be read is caught by everybody and proves nothing
        path.write_text(harmed)


SABOTEURS = (
    Saboteur(
        name="results are not synced",
        file="core/files.py",
        old="_sync_data(self.fd)",
        new="pass",
        test=_ORDER,
    ),
    Saboteur(
        name="results are not synced, and the power fails",
        file="core/files.py",
        old="_sync_data(self.fd)",
        new="pass",
        test=_POWER,
    ),
    Saboteur(
        name="a result is reported before it is written",
        file="results/writer.py",
        old="        with anyio.CancelScope(shield=True):\n            group = (",
        new="        for result in done:\n            self._on_done(result)\n"
        "        self._on_done = lambda result: None\n"
        "        with anyio.CancelScope(shield=True):\n            group = (",
        test="tests/results/test_writer.py::test_a_result_is_told_only_when_it_is_on_the_disk",
    ),
    Saboteur(
        name="an intent is not waited for",
        file="results/writer.py",
        old="            await self._wait_written(1)\n",
        new="            self._waiting += 1\n            self._arrival.set()\n",
        test=_ORDER,
    ),
    Saboteur(
        name="intents are not synced",
        file="results/attempt_log.py",
        old="files.Appender(fd, self._path, sync=self._sync)",
        new="files.Appender(fd, self._path, sync=False)",
        test=_ORDER,
    ),
    Saboteur(
        name="no intent is written",
        file="results/attempt_log.py",
        old="        self._lines.append(line)\n\n    def log_not_billed",
        new="\n    def log_not_billed",
        test="tests/runner/test_local.py::test_a_killed_run_tells_what_it_may_have_paid_for",
    ),
    Saboteur(
        name="the names of new files are not synced",
        file="core/files.py",
        old="    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)\n    try:\n        os.fsync(fd)\n",
        new="    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)\n    try:\n        pass\n",
        test=_ORDER,
    ),
    Saboteur(
        name="a new file takes its place before it is synced",
        file="core/files.py",
        old="        os.fsync(fd)\n        os.rename(temporary, path)\n",
        new="        os.rename(temporary, path)\n",
        test=_ORDER,
    ),
    Saboteur(
        name="a failed sync is tried again",
        file="core/files.py",
        old="            self.has_failed = True\n",
        new="            _sync_data(self.fd)\n",
        test=_DISK,
    ),
    Saboteur(
        name="half a line stays when the disk is full",
        file="core/files.py",
        old="                os.ftruncate(self.fd, size)\n",
        new="                pass\n",
        test="tests/results/test_writer.py::test_a_file_that_may_not_grow_stops_on_a_line_boundary",
    ),
    Saboteur(
        name="short writes are taken for whole ones",
        file="core/files.py",
        old="        view = view[os.write(fd, view) :]\n",
        new="        os.write(fd, view)\n        return\n",
        test="tests/results/test_writer.py::test_a_file_that_may_not_grow_stops_on_a_line_boundary",
    ),
    Saboteur(
        name="the disk is read with str.splitlines",
        file="results/writer.py",
        old="            for _, line, record in codec.read(file):\n                request = 0\n",
        new="            for text in file.read().decode(errors='replace').splitlines():\n"
        "                line, record, request = text.encode(), codec.decode_or_none(text.encode()), 0\n",
        test="tests/torture/test_damage.py::test_separators_inside_an_answer_end_no_line",
    ),
    Saboteur(
        name="a torn tail is not repaired",
        file="results/writer.py",
        old='            _repair_tail(self._file.fd, self.beside(".torn"))\n',
        new="",
        test="tests/torture/test_damage.py::test_a_torn_tail_costs_its_own_line_only",
    ),
    Saboteur(
        name="lines that were replaced are deleted",
        file="results/writer.py",
        old="files.append_lines(superseded, (line_at(old, offset) for offset in leaving))",
        new="pass",
        test="tests/torture/test_damage.py::test_damage_in_the_middle_costs_its_own_line_only",
    ),
    Saboteur(
        name="damage is not told",
        file="results/codec.py",
        old='        raise LineError(f"not a result line: {exc}") from exc\n',
        new="        return Record(custom_id='', digest='', success=False)\n",
        test="tests/torture/test_damage.py::test_damage_in_the_middle_costs_its_own_line_only",
    ),
    Saboteur(
        name="a request is known by its id only",
        file="results/writer.py",
        old="    return fingerprint(custom_id, digest)\n",
        new="    return fingerprint(custom_id)\n",
        test="tests/runner/test_local.py::test_only_what_differs_is_sent",
    ),
    Saboteur(
        name="the results are not locked",
        file="core/files.py",
        old="            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n        except",
        new="            pass\n        except",
        test="tests/torture/test_surroundings.py::test_a_second_run_leaves_and_touches_nothing",
    ),
    Saboteur(
        name="rewritten results are not locked",
        file="core/files.py",
        old="        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n        for line in lines:\n",
        new="        for line in lines:\n",
        test="tests/results/test_writer.py::test_the_lock_goes_to_the_new_file",
    ),
    Saboteur(
        name="files are readable by everybody",
        file="core/files.py",
        old="MODE = 0o600\n",
        new="MODE = 0o644\n",
        test="tests/torture/test_surroundings.py::test_cron_gets_a_finished_job_and_a_readable_log",
    ),
    Saboteur(
        name="a place is given away before the result is recorded",
        file="dispatch/live/sender.py",
        old="        await self._results.append(\n",
        new="        assert self._tasks\n        self._tasks.start_soon(\n            self._results.append,\n",
        test="tests/dispatch/live/test_sender.py::test_a_request_keeps_its_place_until_its_result_is_recorded",
    ),
    Saboteur(
        name="timeouts count as not billed",
        file="dispatch/live/sender.py",
        old="        if not error.may_be_billed:\n            self._results.log_not_billed(",
        new="        if True:\n            self._results.log_not_billed(",
        test="tests/torture/test_signals.py::test_timeouts_before_a_kill_are_listed",
    ),
    Saboteur(
        name="a grown journal forgets what is open",
        file="results/attempt_log.py",
        old="        return [header, *left, *chain.from_iterable(self._open.values())]\n",
        new="        return [header, *left]\n",
        test="tests/results/test_attempt_log.py::test_the_journal_does_not_grow_with_the_input",
    ),
    Saboteur(
        name="old result lines settle new calls",
        file="results/attempt_log.py",
        old="        if run is not None and run == self._last_run:\n",
        new="        for run in {name[0] for name in self._left}:\n",
        test="tests/results/test_attempt_log.py::test_a_result_line_of_an_earlier_run_settles_nothing",
    ),
    Saboteur(
        name="calls are listed again and again",
        file="results/attempt_log.py",
        old="        told = [replace(sent, told=True) for sent in self.unknown()]\n",
        new="        told = list(self.unknown())\n",
        test="tests/runner/test_local.py::test_a_killed_run_tells_what_it_may_have_paid_for",
    ),
    Saboteur(
        name="the first signal drops what is in flight",
        file="runner/executor.py",
        old="        return self._stop()\n",
        new="        self._scope.cancel()\n        return self._stop()\n",
        test="tests/torture/test_signals.py::test_one_signal_finishes_what_is_in_flight",
    ),
    Saboteur(
        name="a cancelled writer writes no more",
        file="results/writer.py",
        old="                if not self._has_failed:\n                    await self._write_group()\n",
        new="                pass\n",
        test="tests/results/test_writer.py::test_cancelled_writing_still_writes_what_came",
    ),
    Saboteur(
        name="a wrong key fails line by line",
        file="dispatch/live/sender.py",
        old="        if error.scope is ErrorScope.RUN:\n",
        new="        if False:\n",
        test="tests/runner/test_local.py::test_a_wrong_key_stops_the_run_and_leaves_lines_pending",
    ),
    Saboteur(
        name="retry-after is ignored",
        file="providers/rate_limit_headers.py",
        old='    text = headers.get("retry-after", "").strip()\n',
        new='    text = ""\n',
        test="tests/dispatch/live/test_sender.py::test_a_retry_waits_as_long_as_the_provider_says",
    ),
    Saboteur(
        name="a batch is made again without being looked for",
        file="dispatch/batch/lifecycle.py",
        old="            if record.step is Step.CREATING:\n",
        new="            if False:\n",
        test="tests/torture/test_batches.py::test_lost_answers_need_nobody_to_repeat_the_command",
    ),
    Saboteur(
        name="a poisoned request is tried for ever",
        file="dispatch/retry.py",
        old="        if is_capacity(error):\n            return self.wait_patiently",
        new="        if True:\n            return self.wait_patiently",
        test="tests/dispatch/test_retry.py::test_a_poisoned_request_ends_after_max_attempts",
    ),
    Saboteur(
        name="tokens are counted twice",
        file="results/totals.py",
        old="        self.input += usage.input_tokens\n",
        new="        self.input += 2 * usage.input_tokens\n",
        test="tests/runner/test_local.py::test_every_line_is_answered_with_its_own_answer",
    ),
    Saboteur(
        name="answers change places",
        file="results/writer.py",
        old="        for result in results:\n            line = codec.encode(\n                result,",
        new="        import dataclasses\n        for result in results:\n"
        "            last, self._last = getattr(self, '_last', result), result\n"
        "            line = codec.encode(\n                dataclasses.replace(result, reply=last.reply),",
        test="tests/runner/test_local.py::test_every_line_is_answered_with_its_own_answer",
    ),
    Saboteur(
        name="a part of somebody else is taken for ours",
        file="results/object_store_writer.py",
        old="        if content != data:",
        new="        if False:",
        test="tests/results/test_object_store_writer.py::test_somebody_elses_part_stops_the_run",
    ),
    Saboteur(
        name="what no part holds is forgotten when the spool is made anew",
        file="results/object_store_writer.py",
        old="                yield from (line for line in _lines(old, gaps) if checksum(line) in missing)",
        new="                yield from ()",
        test="tests/results/test_object_store_writer.py::test_a_start_brings_spool_and_parts_together",
    ),
    Saboteur(
        name="a part that is there already is uploaded once more",
        file="results/object_store_writer.py",
        old="                    if missing:\n",
        new="                    if False:\n",
        test="tests/results/test_object_store_writer.py::test_a_start_brings_spool_and_parts_together",
    ),
    Saboteur(
        name="superseded lines leave their parts and are kept nowhere",
        file="results/object_store_writer.py",
        old='object_store.create(f"{self.url}superseded-{checksum(data).hex()}.jsonl", data)',
        new="pass",
        test="tests/results/test_object_store_writer.py::test_changed_lines_take_the_place_of_old_ones",
    ),
    Saboteur(
        name="an object is read on whatever was put in its place",
        file="core/object_store.py",
        old='options={"range": wanted, "if_match": self._etag}',
        new='options={"range": wanted}',
        test="tests/core/test_object_store.py::test_an_object_that_is_replaced_while_it_is_read_is_an_error",
    ),
    Saboteur(
        name="calls of a lost worker are forgotten",
        file="runner/cluster/driver.py",
        old="                await self._context.writer.import_attempts(unknown)\n",
        new="                pass\n",
        test="tests/runner/cluster/test_driver.py::test_a_lost_worker_costs_what_it_had_in_flight",
    ),
    Saboteur(
        name="a lost part is sent again from its beginning",
        file="runner/cluster/scheduler.py",
        old="        shard.known += collected\n",
        new="",
        test="tests/runner/cluster/test_driver.py::test_a_lost_worker_costs_what_it_had_in_flight",
    ),
    Saboteur(
        name="parts know nothing of each other's ids",
        file="runner/cluster/id_registry.py",
        old="        if taken:\n",
        new="        if False:\n",
        test="tests/runner/cluster/test_id_registry.py::test_parts_are_planned_as_one",
    ),
    Saboteur(
        name="a new quota actor gives all to the first who asks",
        file="runner/cluster/quota.py",
        old="        is_new = now < self._began + LEASE_SECONDS\n",
        new="        is_new = False\n",
        test="tests/runner/cluster/test_quota.py::test_in_the_beginning_everyone_keeps_what_he_has",
    ),
    Saboteur(
        name="workers spend as if each had all the money",
        file="runner/cluster/worker.py",
        old="Budget(task.grant, is_final=False)",
        new="Budget(10**18)",
        test="tests/runner/cluster/test_driver.py::test_a_cap_is_one_of_all_workers",
    ),
    Saboteur(
        name="keys travel unsealed",
        file="runner/cluster/secrets.py",
        old="    return bytes(one ^ other for one, other in zip(content, pad, strict=True))\n",
        new="    return content\n",
        test="tests/runner/cluster/test_secrets.py::test_neither_half_tells_the_secret",
    ),
    Saboteur(
        name="an error may be changed by whoever catches it",
        file="core/errors.py",
        old='            raise AttributeError(f"errors are immutable: use replace({name}=…)")\n',
        new="            pass\n",
        test="tests/core/test_errors.py::test_a_field_cannot_be_assigned_or_deleted",
    ),
    Saboteur(
        name="a retired model is reported once for each line",
        file="inputs/retired_models.py",
        old="        self._seen.add(name)\n",
        new="",
        test="tests/inputs/test_retired_models.py::test_each_model_is_reported_once",
    ),
    Saboteur(
        name="batches are loaded past the budget",
        file="dispatch/batch/loader.py",
        old="        reserved = self._reservations.try_reserve(request)\n        if reserved is not None:\n",
        new="        reserved = self._reservations.try_reserve(request) or 0\n        if True:\n",
        test="tests/dispatch/batch/test_loader.py::test_what_never_fits_is_turned_away",
    ),
    Saboteur(
        name="a failed batch line counts as an answer",
        file="providers/openai_batch.py",
        old='line["error"] is not None or response.get("status_code") != 200 or "error" in body',
        new='line["error"] is not None',
        test="tests/results/test_codec.py::test_a_failure_is_never_read_back_as_a_success",
    ),
)


def is_caught(saboteur: Saboteur) -> bool:
    """Tell whether the test fails in a copy of the program with the defect."""
    return not _passes([saboteur.test], saboteur)


def passes_unharmed(saboteurs: Sequence[Saboteur]) -> bool:
    """Tell whether the tests of some saboteurs pass in a copy of the program as it is."""
    return _passes(sorted({saboteur.test for saboteur in saboteurs}))


def _passes(tests: Sequence[str], saboteur: Saboteur | None = None) -> bool:
    with tempfile.TemporaryDirectory(prefix="sabotaged-") as folder:
        root = Path(folder)
        for name in _COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, root / name)
        if saboteur:
            saboteur.strike(root)
        # A slow test may catch a defect too. One test needs one process.
        options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not long", "-n", "0"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        environ = os.environ | {"PYTHONPATH": str(root)}
        done = subprocess.run(
            command, cwd=root, env=environ, capture_output=True, text=True, timeout=_HANG_SECONDS, check=False
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr  # everything else is no verdict of a test
        assert " passed" in done.stdout or done.returncode, f"nothing was tested: {done.stdout}"
        return done.returncode == 0


def _main() -> int:
    parser = argparse.ArgumentParser(description="Plant defects and see which tests catch them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    options = parser.parse_args()
    chosen = [each for each in SABOTEURS if not options.names or each.name in options.names]
    if not passes_unharmed(chosen):
        print("a test fails without any defect: nothing can be told")
        return 2
    caught = 0
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as threads:
        for each, was_caught in zip(chosen, threads.map(is_caught, chosen), strict=True):
            caught += was_caught
            print(f"{'caught' if was_caught else 'MISSED':6}  {each.name:52}  {each.test}", flush=True)
    print(f"{caught} of {len(chosen)} caught")
    if options.json:
        numbers = {"name": "saboteurs", "is_good": caught == len(chosen), "planted": len(chosen), "caught": caught}
        options.json.write_text(json.dumps(numbers) + "\n")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(_main())
