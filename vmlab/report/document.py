"""The HTML document that every page of the lab is: head, style, body, data, script, in one file that loads nothing.

The page's own style and script are allowed by their hashes and nothing else is (content security policy), so that a string from a
configuration or a guest's console could not run even if it got through the escaping.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from string import Template

_DOCUMENT = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="$policy">
<title>$title</title>
<style>$style</style>
</head>
<body>
$body
$scripts</body>
</html>
""")


def document(title: str, body: str, *, style: str, script: str = "", data: str = "", images: str = "data:") -> str:
    """A whole page.

    :param title: plain text.
    :param body: HTML; what came from elsewhere must be escaped already.
    :param script: the page's one script; with it goes ``data``, JSON that :func:`vmlab.report.live.embed` made safe.
    :param images: where images may come from, as the policy says it.
    """
    scripts = f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n' if script else ""
    return _DOCUMENT.substitute(title=escape(title), policy=_policy(style, script, images), style=style, body=body, scripts=scripts)


def _policy(style: str, script: str, images: str) -> str:
    """A content security policy under which a page loads nothing but ``images``, and runs and styles itself with these two texts only."""
    def named(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"

    scripts = f"script-src {named(script)}; " if script else ""
    return f"default-src 'none'; style-src {named(style)}; {scripts}img-src {images}; base-uri 'none'; form-action 'none'"
