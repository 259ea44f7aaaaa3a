"""The templates: escaped by default, and an unknown name in one is an error."""

import asyncio
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from consumer.console import formatting as words


class Rendering:
    """Renders in a thread, as a scrape is: the loop has messages to attend to."""

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
            words.shown, words.moment, words.clock, words.instant, words.when, words.day, words.stamp, words.span,
            words.number, words.rate, words.money,
        ):  # fmt: skip
            self._templates.filters[function.__name__] = function
        self._templates.globals |= {"run_path": words.run_path, "names_run": words.names_run}

    async def text(self, template: str, **values: Any) -> str:  # noqa: ANN401 - whatever the template shows
        """Return *template*, filled in."""
        return await asyncio.to_thread(self._templates.get_template(template).render, values)

    async def page(self, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:  # noqa: ANN401
        """Answer with a whole page; ``q`` is what stands in the search, ``live`` the address of what is refreshed."""
        return html(await self.text(template, **{"q": "", "live": "", "status": status, **values}), status=status)


def html(body: str, *, status: int = 200) -> HTMLResponse:
    """Answer with *body*, which nobody stores: it holds what senders wrote, and is old after a second."""
    return HTMLResponse(body, status_code=status, headers={"cache-control": "no-store"})
