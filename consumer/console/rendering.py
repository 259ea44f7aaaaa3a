"""Renders the templates: escaped by default; an unknown name is an error."""

import asyncio
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from consumer.console import formatting
from consumer.runs.steps import details_of, name_of


class Rendering:
    """Renders in a thread, so that the event loop can process messages."""

    def __init__(self) -> None:
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).with_name("templates")),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        for function in (
            formatting.shown, formatting.moment, formatting.clock, formatting.instant, formatting.when, formatting.day,
            formatting.stamp, formatting.span, formatting.number, formatting.rate, formatting.money,
        ):  # fmt: skip
            self._templates.filters[function.__name__] = function
        self._templates.globals |= {"run_path": formatting.run_path, "names_run": formatting.names_run}
        self._templates.globals |= {"name_of": name_of, "details_of": details_of}

    async def text(self, template: str, **values: Any) -> str:  # noqa: ANN401 - whatever the template shows
        """Return the rendered *template*."""
        return await asyncio.to_thread(self._templates.get_template(template).render, values)

    async def page(self, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:  # noqa: ANN401
        """Return a complete page; ``q`` is the text of the search, ``live`` the address of the refreshed part."""
        return html(await self.text(template, **{"q": "", "live": "", "status": status, **values}), status=status)


def html(body: str, *, status: int = 200) -> HTMLResponse:
    """Return *body* with caching disabled: it has senders' data and is outdated after a second."""
    return HTMLResponse(body, status_code=status, headers={"cache-control": "no-store"})
