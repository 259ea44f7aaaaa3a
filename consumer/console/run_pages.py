"""The page of a run, and the search for runs."""

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import unquote

from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from consumer.console import run_view as one_run
from consumer.console.formatting import run_path
from consumer.console.queries import owners, read_one_run
from consumer.console.recently_parked import ParkedLately
from consumer.console.rendering import Rendering
from consumer.console.shared_reads import SharedRead, Snapshot
from consumer.contract.refusals import EXPECTED
from consumer.contract.scalars import is_tenant_id, run_id_of
from consumer.phases import TransactionPhase
from consumer.runs.lookup import CHILDREN_AT_MOST, TENANTS_AT_MOST, RunFile
from domains.run import RunKey

# The address of a run's page.
_ADDRESS = re.compile(r"(?:https?://[^/]+(?:/.*?)??)?/runs/([^/?#]+/[^?#]+)(?:[?#].*)?")
# Runs cached for a second, for all viewers; one may have a megabyte.
_KEPT = 8
# Seconds that a viewer waits for a run. Before it was first read there is nothing to show in its place, unlike on the
# overview, and on a busy machine a run of a megabyte takes longer than the overview's patience.
_PATIENCE_SECONDS = 5.0


class RunPages:
    """``/runs/<tenant_id>/<run_id>`` and ``/runs?q=``; *seen* is called for each request that needs the database."""

    def __init__(
        self, *, engine: AsyncEngine, parked: ParkedLately, rendering: Rendering, seen: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._parked = parked
        self._rendering = rendering
        self._seen = seen
        self._shared: OrderedDict[tuple[str, str], SharedRead[Any]] = OrderedDict()

    async def show(self, request: Request) -> Response:
        """Answer ``/runs/<tenant_id>/<run_id>``."""
        return await self._show(request.path_params["tenant_id"], request.path_params["run_id"])

    async def search(self, request: Request) -> Response:
        """Handle ``/runs?q=``: ``tenant/run``, the address of a run's page, or a run's id or ``run_ref``."""
        asked = request.query_params.get("q", "").strip()
        if not asked:
            return RedirectResponse("/", 303)
        address = _ADDRESS.fullmatch(asked)
        tenant_id, slash, bare = (unquote(address[1]) if address else asked).partition("/")
        named = run_id_of(tenant_id, bare)
        if address is None:
            is_key = slash and is_tenant_id(tenant_id)
            # A slash may also belong to the id.
            if not is_key or (named and await self._is_rather_an_id(asked, RunKey(tenant_id, named[0]))):
                return await self._by_id(asked, asked)
        path = run_path(tenant_id, bare)
        is_served_here = "?" in path or named is None or not is_tenant_id(tenant_id)
        return await self._show(tenant_id, bare, asked) if is_served_here else RedirectResponse(path, 303)

    def forget(self) -> None:
        """Drop the cached runs."""
        self._shared.clear()

    async def _by_id(self, run_id: str, asked: str) -> Response:
        if run_id_of("", run_id) is None:
            return await self._refusal("run id", run_id, f"{EXPECTED['run_id']}, or tenant/run id", asked=asked)
        found = await self._owners(run_id)
        if found.value is None:
            return await self._away(found, asked=asked)
        match found.value:
            case []:
                return await self._missing(None, run_id, asked=asked)
            case [key]:
                return RedirectResponse(run_path(*key), 303)
            case keys:
                return await self._rendering.page(
                    "owners.html", q=asked, run_id=run_id, keys=keys, most=TENANTS_AT_MOST
                )

    async def _is_rather_an_id(self, text: str, key: RunKey) -> bool:
        """Return whether no run with *key* is stored, but one that its runner calls *text*."""
        return (await self._read(key)).value is None and bool((await self._owners(text)).value)

    async def _owners(self, text: str) -> Snapshot[list[RunKey]]:
        return await self._reading("", text, partial(owners, self._engine, text))

    async def _show(self, tenant_id: str, text: str, asked: str = "") -> Response:
        if not is_tenant_id(tenant_id):
            return await self._refusal("tenant id", tenant_id, EXPECTED["tenant_id"], asked=asked)
        named = run_id_of(tenant_id, text)
        if named is None:
            return await self._refusal("run id", text, EXPECTED["run_id"], asked=asked)
        reading = await self._read(RunKey(tenant_id, named[0]))
        if reading.read_at is None:
            return await self._away(reading, asked=asked)
        run = reading.value
        if run is None:
            return await self._missing(tenant_id, text, asked=asked)
        is_final = run.completion["phase"] == TransactionPhase.EVENTS_PUBLISHED
        return await self._rendering.page(
            "run.html",
            q=asked,
            # An unfinished run is read again.
            live="" if is_final else run_path(tenant_id, named[0]),
            run=run,
            reading=reading,
            marks=one_run.marks(run),
            stretches=one_run.stretches(run),
            steps=one_run.step_bars(run),
            in_time=one_run.has_times(run.trace["steps"] if run.trace else ()),
            children_at_most=CHILDREN_AT_MOST,
            steps_in_sight=one_run.STEPS_IN_SIGHT,
            events=one_run.events(run),
        )

    async def _read(self, key: RunKey) -> Snapshot[RunFile | None]:
        return await self._reading(key.tenant_id, str(key.run_id), partial(read_one_run, self._engine, *key))

    async def _reading(self, tenant_id: str, run_id: str, read: Callable[[], Any]) -> Snapshot[Any]:
        """Return the result of *read*, shared by concurrent viewers."""
        self._seen()
        key = (tenant_id, run_id)
        shared = self._shared.setdefault(key, SharedRead("PostgreSQL", read, patience_seconds=_PATIENCE_SECONDS))
        self._shared.move_to_end(key)
        while len(self._shared) > _KEPT:
            self._shared.popitem(last=False)
        return await shared.latest()

    async def _refusal(self, what: str, found: str, expected: str, *, asked: str) -> Response:
        lines = [f"{what}: found {found[:200]!r}; expected {expected}."]
        return await self._rendering.page("message.html", status=404, q=asked, title="No such run", lines=lines)

    async def _away(self, reading: Snapshot[Any], *, asked: str) -> Response:
        lines = [reading.fault or "PostgreSQL has not responded.", "The run is shown once it responds."]
        return await self._rendering.page("message.html", status=503, q=asked, title="No answer", lines=lines)

    async def _missing(self, tenant_id: str | None, run_id: str, *, asked: str) -> Response:
        parked = [
            message
            for message in self._parked.newest()
            if tenant_id in {None, message.tenant_id}
            and _is_same(message.tenant_id or "", message.run_id or "", run_id)
        ]
        live = run_path(tenant_id, run_id) if tenant_id else ""
        return await self._rendering.page(
            "missing.html", status=404, q=asked, live=live, tenant_id=tenant_id, run_id=run_id, parked=parked
        )


def _is_same(tenant_id: str, one: str, other: str) -> bool:
    """Return whether two texts name the same run of *tenant_id*."""
    first, second = run_id_of(tenant_id, one), run_id_of(tenant_id, other)
    return first is not None and second is not None and first[0] == second[0]
