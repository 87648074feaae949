"""Workers as actors of Ray: the only file that knows it.

Actors are told apart in Ray's dashboard by name: `pipeline worker 1 (run-…)`, `pipeline budget (run-…)`. Keys travel in
the runtime environment of the job, sealed (`sealing`), never as arguments.
https://docs.ray.io/en/latest/ray-core/actors.html
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any, TypeVar

import anyio

from pipeline.core import cpu_affinity, environment
from pipeline.core.config import Config
from pipeline.core.errors import PipelineError, TryLaterError, UsageError
from pipeline.core.types import IdRange
from pipeline.dispatch.live.rate_limiter import Demand
from pipeline.dispatch.live.shared_limits import Lease
from pipeline.inputs.sources import ByteRange
from pipeline.results.staging import Name
from pipeline.runner.cluster import secrets
from pipeline.runner.cluster.driver import WorkerLostError
from pipeline.runner.cluster.id_registry import Scan
from pipeline.runner.cluster.quota import Quota
from pipeline.runner.cluster.worker import Greeting, ShardOutcome, Snapshot, Task, Worker
from pipeline.runner.options import Options

T = TypeVar("T")
LOCAL = "local"
_NAMESPACE = "pipeline"
_CONNECT_SECONDS = 10.0
_ASK_AGAIN_SECONDS = 0.25
# Ray ends the program, with code 1, when the head was away for 60 s (gcs_rpc_server_reconnect_timeout_s).
_HEADLESS_SECONDS = 20.0
_CHECK_SECONDS = 2.0
_DEFAULT_PORTS = {"ray": 10_001, "": 6_379}
# The head's machine is the one that must not be lost anyway; Ray gives each node such a resource.
_ON_THE_HEAD = {"node:__internal_head__": 0.001}
_ADDRESS = re.compile(r"(?:(?P<scheme>ray)://)?(?P<host>\[[^]]+\]|[^:/]+)(?::(?P<port>\d+))?")


class Session:
    """A connection to a cluster, made when it is first needed; several runs may use it, one after the other.

    `address` is that of a cluster, or `local`: then one is started on this machine.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._ray: Any = None
        self._pad = b""

    @property
    def is_open(self) -> bool:
        """Return True if the cluster was joined already."""
        return self._ray is not None

    def pool(self, settings: Config, run_id: str) -> RayPool:
        """Return the workers of a run.

        Raises `UsageError` where Ray is not there or does not fit the cluster's, `TryLaterError` where the cluster
        cannot be reached.
        """
        if self._ray is None:
            self._ray = self._connected(settings)
        return RayPool(self._ray, settings, run_id, self._pad, self._head())

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None

    def _head(self) -> tuple[str, int]:
        """Return where the head, or the server that stands for it, answers as long as it lives."""
        is_client = self.address.startswith("ray://")
        place = place_of(self.address if is_client else self._ray.get_runtime_context().gcs_address)
        assert place is not None
        return place

    def _connected(self, settings: Config) -> Any:
        environment.default_variable("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody unasked
        environment.default_variable("RAY_CLIENT_RECONNECT_GRACE_PERIOD", "10")  # all stands still meanwhile
        environment.default_variable("RAY_ENABLE_AUTO_CONNECT", "0")  # what is lost is not replaced by a local one
        try:
            import ray
        except ImportError as exc:
            raise UsageError(
                f"--ray requires Ray, which is not installed here ({exc})", hint="pip install 'pipeline[ray]'"
            ) from exc
        if self.address != LOCAL:
            _require_reachable(self.address)
        sealed, self._pad = secrets.seal(environment.variables_of(settings))
        try:
            ray.init(
                address=self.address,
                namespace=_NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {secrets.VARIABLE: sealed}},
            )
        except (ConnectionError, TimeoutError) as exc:
            raise TryLaterError(
                f"the Ray cluster at {self.address!r} cannot be reached: {exc}", hint=_IS_IT_UP
            ) from exc
        except (RuntimeError, ValueError) as exc:
            raise UsageError(
                f"the Ray cluster at {self.address!r} cannot be used: {exc}",
                hint=f"all machines need the same versions: Ray {ray.__version__}, Python {sys.version.split()[0]}",
            ) from exc
        return ray


class RayPool:
    """The workers of one run, on a cluster that is connected. `size` is how many there should be."""

    def __init__(self, ray: Any, settings: Config, run_id: str, pad: bytes, head: tuple[str, int]) -> None:
        self._ray = ray
        self._pad = pad
        self._head = head
        self._run_id = run_id
        self._numbers = count(1)
        self._actors: list[Any] = []
        self._quota = (
            ray.remote(QuotaActor)
            .options(
                name=f"pipeline budget ({run_id})",
                num_cpus=0,
                resources=_ON_THE_HEAD,
                max_restarts=-1,
                max_task_retries=-1,
            )
            .remote()
        )
        self.size = settings.cluster.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))

    async def start_worker(self, settings: Config, options: Options, *, first_share: float) -> _RayWorker:
        await _until_open(self._head)  # else the next call stands still, and all of us with it
        number = next(self._numbers)
        words = (self._pad, settings, options)
        broker = _ActorBroker(self._quota, f"worker {number}")
        named = {"run_id": self._run_id, "broker": broker, "first_share": first_share}
        try:
            actor = (
                self._ray.remote(RemoteWorker)
                .options(name=f"pipeline worker {number} ({self._run_id})", num_cpus=1, max_restarts=0)
                .remote(*words, **named)
            )
        except Exception as exc:
            if _is_about_work(self._ray, exc):
                raise
            raise self._loss() from exc
        self._actors.append(actor)
        worker = _RayWorker(self._ray, actor)
        await worker.wait_ready()
        return worker

    async def kill_all(self) -> None:
        for actor in self._actors:
            with suppress(Exception):  # the head may be gone, through which the other goes
                actor.leave.remote()
            _kill(self._ray, actor)
        self._actors.clear()

    async def until_lost(self) -> PipelineError:
        """Return once the head was away for so long that it may not come back before Ray ends this program."""
        reached = anyio.current_time()
        while anyio.current_time() - reached < _HEADLESS_SECONDS and self._ray.is_initialized():
            await anyio.sleep(_CHECK_SECONDS)
            if await _is_open(self._head):
                reached = anyio.current_time()
        return self._loss()

    def close(self) -> None:
        """End the quota actor."""
        _kill(self._ray, self._quota)

    def _loss(self) -> TryLaterError:
        return TryLaterError(
            f"the head of the Ray cluster, {self._head[0]}:{self._head[1]}, can no longer be reached",
            hint="restart the cluster, then repeat the command",
        )


class RemoteWorker(Worker):
    """A worker as an actor: it opens what was sealed on its way."""

    def __init__(self, pad: bytes, *words: Any, **named: Any) -> None:
        environment.take_variables(secrets.unseal(environment.default_variable(secrets.VARIABLE, ""), pad))
        super().__init__(*words, **named)
        cpu_affinity.pin()

    async def leave(self) -> None:
        """End this process at once, whatever it does."""
        os._exit(1)


class QuotaActor:
    """The actor that keeps the leases of all workers."""

    def __init__(self) -> None:
        self._quota = Quota()

    def __repr__(self) -> str:
        return repr(self._quota)

    async def renew(self, holder: str, needs: Mapping[str, Demand]) -> dict[str, Lease]:
        return self._quota.renew(holder, needs, anyio.current_time())


class _RayWorker:
    """A worker behind an actor's handle."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray = ray
        self._actor = actor

    async def wait_ready(self) -> None:
        """Wait until the actor has found a place; one that died before is told by the first call."""
        with suppress(WorkerLostError):
            await self._ask(lambda: self._actor.__ray_ready__.remote())

    async def greet(self, place: Name, token: str) -> Greeting:
        return await self._ask(lambda: self._actor.greet.remote(place, token))

    async def scan(self, spans: Sequence[ByteRange], before: IdRange) -> Scan:
        return await self._ask(lambda: self._actor.scan.remote(spans, before))

    async def work(self, task: Task) -> ShardOutcome:
        return await self._ask(lambda: self._actor.work.remote(task))

    async def progress(self) -> list[Snapshot]:
        return await self._ask(lambda: self._actor.progress.remote())

    async def grant(self, number: int, amount: int | None) -> None:
        await self._ask(lambda: self._actor.grant.remote(number, amount))

    async def stop(self) -> None:
        await self._ask(lambda: self._actor.stop.remote())

    async def kill(self) -> None:
        _kill(self._ray, self._actor)

    async def _ask(self, call: Callable[[], Awaitable[T]]) -> T:
        exceptions = self._ray.exceptions
        try:
            return await call()
        except exceptions.RayTaskError as exc:
            raise (exc.cause if isinstance(exc.cause, PipelineError) else exc) from None
        except (exceptions.RayActorError, exceptions.ObjectLostError, exceptions.NodeDiedError) as exc:
            if isinstance(exc, exceptions.ActorUnavailableError):
                _kill(self._ray, self._actor)  # it may come back, when another does its work
            raise WorkerLostError(str(exc).partition("\n")[0]) from exc
        except Exception as exc:
            if _is_about_work(self._ray, exc):
                raise
            raise WorkerLostError("the cluster cannot be reached") from exc


def _is_about_work(ray: Any, error: Exception) -> bool:
    """Tell an error of the work from what Ray's client raises without its server, which has no class of its own."""
    return not isinstance(error, ConnectionError) and bool(ray.is_initialized())


def _kill(ray: Any, actor: Any) -> None:
    """End an actor; what is gone already, or out of reach, needs no killing."""
    with suppress(Exception):
        ray.kill(actor)


class _ActorBroker:
    """The actor that keeps the leases, as a worker sees it; it goes to the worker as an argument.

    While it is not there all keep what they have: together that is never more than there is.
    """

    def __init__(self, quota: Any, holder: str) -> None:
        self._quota = quota
        self._holder = holder

    async def renew(self, needs: Mapping[str, Demand], now: float) -> Mapping[str, Lease]:
        from ray.exceptions import RayError

        from_now = {
            name: replace(need, cooldown_until=max(0.0, need.cooldown_until - now)) for name, need in needs.items()
        }
        while True:
            try:
                leases: Mapping[str, Lease] = await self._quota.renew.remote(self._holder, from_now)
            except RayError:
                await anyio.sleep(_ASK_AGAIN_SECONDS)
            else:
                now = anyio.current_time()
                return {
                    name: replace(lease, cooldown_until=now + lease.cooldown_until if lease.cooldown_until else 0.0)
                    for name, lease in leases.items()
                }

    async def give_back(self) -> None:
        """Keep it, for the next part of this worker; what is not renewed is given back in a second."""


_ADDRESSES = "give HOST:PORT, ray://HOST:10001, auto for this machine's cluster, or local to start one here"
_IS_IT_UP = (
    "check the address, and that the cluster is up (ray status). If it requires a token, set RAY_AUTH_MODE=token and "
    "put the token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
)


def _require_reachable(address: str) -> None:
    """Try the door before Ray does, which for a closed one takes two minutes and ends the process."""
    place = place_of(address)
    if place is None:
        return
    try:
        socket.create_connection(place, timeout=_CONNECT_SECONDS).close()
    except socket.gaierror as exc:
        raise UsageError(f"the Ray cluster {address!r} has no address: {exc}", hint=_ADDRESSES) from exc
    except OSError as exc:
        raise TryLaterError(f"the Ray cluster at {address!r} cannot be reached: {exc}", hint=_IS_IT_UP) from exc


async def _until_open(place: tuple[str, int]) -> None:
    while True:
        if await _is_open(place):
            return
        await anyio.sleep(_CHECK_SECONDS)


async def _is_open(place: tuple[str, int]) -> bool:
    with anyio.move_on_after(_CONNECT_SECONDS), suppress(OSError):
        async with await anyio.connect_tcp(*place):
            return True
    return False


def place_of(address: str) -> tuple[str, int] | None:
    """Return host and port of a cluster's address; None where Ray finds it by itself."""
    match = _ADDRESS.fullmatch(address)
    if address == "auto" or match is None:
        return None
    return match["host"].strip("[]"), int(match["port"] or _DEFAULT_PORTS[match["scheme"] or ""])
