"""The page at / to try a server with: one file, which may load nothing and run nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import Response

_FILE = Path(__file__).parents[1] / "assets" / "page.html"


def page() -> Response:
    """Behind the key as all else: browsers ask for it as a password, and send it from then on."""
    html, policy = _parts()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(html, media_type="text/html", headers=headers)


@cache
def _parts() -> tuple[str, str]:
    """The page, and the policy that names its own style and script by their digests."""
    html = _FILE.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_digest(html, 'script')}; "
        f"style-src {_digest(html, 'style')}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _digest(html: str, tag: str) -> str:
    (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"
