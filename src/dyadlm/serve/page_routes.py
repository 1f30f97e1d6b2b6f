"""The page at `/`, which shows what a model does at each token, and its files."""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

# Nothing but what the server itself sends is loaded or asked, and nothing runs that stands in the page's text.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FILES = ("style.css", "app.js", "client.js", "future.js", "pictures.js", "icon.svg")


def routes() -> APIRouter:
    """`/`, and `/page/NAME` for each file."""
    router = APIRouter()
    router.add_api_route("/", lambda: _served("index.html"))
    for name in FILES:
        router.add_api_route(f"/page/{name}", lambda name=name: _served(name))
    return router


def _served(name: str) -> Response:
    content = (files("dyadlm.serve") / "page" / name).read_bytes()
    headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Response(content, media_type=KINDS[name.rsplit(".", 1)[1]], headers=headers)
