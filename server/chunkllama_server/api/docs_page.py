"""Serve /docs, a page to read and try the API, from files of an installed package: no network."""

from __future__ import annotations

from importlib import resources
from typing import Literal

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, Response

router = APIRouter(include_in_schema=False)

_PACKAGE = "fastapi_offline"  # holds Swagger UI's files
_TYPES = {".css": "text/css", ".js": "text/javascript", ".png": "image/png"}
# FastAPI's page has an inline script, and Swagger UI draws its icons from data URLs.
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
FileName = Literal["swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"]


@router.get("/docs")
async def page() -> HTMLResponse:
    """Return Swagger UI on /openapi.json; its addresses are relative, for a proxy with a prefix."""
    answer = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="ChunkLlama",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon.png",
    )
    answer.headers["content-security-policy"] = _POLICY
    return answer


@router.get("/docs/{name}")
async def file(name: FileName) -> Response:
    """Return one of the page's files."""
    path = resources.files(_PACKAGE).joinpath("static", name)
    suffix = name[name.rindex(".") :]
    headers = {"cache-control": "max-age=86400"}
    return Response(path.read_bytes(), media_type=_TYPES[suffix], headers=headers)
