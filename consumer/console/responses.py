"""The headers of every response, and the static files."""

from hashlib import sha256
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Only our own files are loaded; no inline content, no frames, and no script can turn text into markup (Trusted Types
# without a policy).
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_FILES = {
    "console.css": "text/css",
    "live.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


class SecurityHeaders:
    """Adds the headers to every response, including error responses of the framework."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the inner application."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)


class StaticFiles:
    """The static files, read once.

    Their names do not change with their content: during a rolling deployment a new page may load files from an old
    worker, and an old style sheet is better than none. Browsers therefore revalidate them.
    """

    def __init__(self) -> None:
        folder = Path(__file__).with_name("static")
        self._files = {name: (folder / name).read_bytes() for name in _FILES}

    async def answer(self, request: Request) -> Response:
        """Return the requested file, or 404."""
        name = request.path_params["name"]
        body = self._files.get(name)
        if body is None:
            return PlainTextResponse(f"no such file; available: {', '.join(_FILES)}\n", status_code=404)
        tag = f'"{sha256(body).hexdigest()[:16]}"'
        headers = {"etag": tag, "cache-control": "no-cache", "content-type": f"{_FILES[name]}; charset=utf-8"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)
