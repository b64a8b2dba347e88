"""A page of HTML as a test reads it."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

_OUTSIDE = r"https?:|//[a-z]|@import|url\(|innerHTML|\beval\b|fetch\(|XMLHttp"


class Page(HTMLParser):
    """Tags with their attributes, the text, and the content of scripts and styles."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.raw, self.text, self._inside = [], [], "", False
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text += "" if tag == "wbr" else " "
        self._inside = tag in ("script", "style")
        if self._inside:
            self.raw.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.raw[-1][2] += data
        else:
            self.text += data

    @property
    def json(self) -> str:
        """The data of its scripts."""
        (content,) = [content for _, attributes, content in self.raw if attributes.get("type") == "application/json"]
        return content

    @property
    def data(self):
        return json.loads(self.json)


def assert_self_contained(source: str) -> None:
    """The page needs nothing else, and its policy allows its own code alone."""
    page = Page(source)
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag, attributes, content in page.raw:
        if attributes.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
    for tag, attributes in page.tags:
        assert not {"src", "href", "style", "xlink:href", "xmlns"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert not re.search(_OUTSIDE, re.sub(r"// .*", "", source))
