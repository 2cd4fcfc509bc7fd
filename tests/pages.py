"""Reads the HTML pages that ftjax writes, and has a text that a page must keep as a text."""

from html.parser import HTMLParser

HOSTILE = "</td><script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" https://example.org/a.js ]]> \u202e"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags with attributes, the texts of cells and of the page, and tags that are not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.cells, self.open = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)
