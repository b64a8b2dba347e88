"""One HTML file that needs nothing else: no network, no foreign text as markup, a content security policy of hashes.

A page holds its data as JSON in a script element of type application/json; its script makes elements from them with textContent.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}  # to their pictures
_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")


def html_page(template: str, styles: Sequence[str], scripts: Sequence[str], data: object, **values: Any) -> str:
    """The template, a file of ``diffpo/templates`` as the others, filled in. data: JSON values for the scripts; values: for the template.

    Text is escaped wherever the template puts it; control characters become visible, halves of characters the replacement character.
    """
    loader = PackageLoader("diffpo")
    environment = Environment(loader=loader, autoescape=True, finalize=printable, trim_blocks=True, lstrip_blocks=True)

    environment.filters["breakable"] = breakable

    def joined(names: Sequence[str]) -> str:
        return "\n".join(loader.get_source(environment, name)[0] for name in names)

    style, script = joined(styles), joined(scripts)
    return environment.get_template(template).render(
        style=Markup(style), style_hash=_hash(style), script=Markup(script), script_hash=_hash(script),
        data=Markup(json_for_html(data)), **values,
    )  # fmt: skip


def printable(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Markup):
        return _HALF_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", value.translate(_CONTROLS))
    return value


def breakable(name: str) -> Markup:
    """A long name that may go on in the next line behind a dot or an underscore."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(printable(name)))))


def json_for_html(value: object) -> str:
    """JSON that can stand inside a script element whatever strings it holds: no <, > or &, ASCII only."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
