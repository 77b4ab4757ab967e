"""Guidelines in Markdown as HTML, from an allow-list: everything else in them is text."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markupsafe import Markup

# No raw HTML, no images, no links that could lead elsewhere unseen: `linkify` stays off, and a
# link is shown as its text followed by its address.
_parser = MarkdownIt("zero").enable(
    [
        *("heading", "lheading", "list", "blockquote", "code", "fence", "hr", "table"),
        *("emphasis", "backticks", "escape", "newline", "strikethrough"),
    ]
)


def as_html(text: str) -> Markup:
    """Return Markdown as HTML that holds no markup of its author's."""
    return Markup(_parser.render(text))
