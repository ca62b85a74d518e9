"""Markup in, plain text out."""

from __future__ import annotations

import re

import mwparserfromhell
from mwparserfromhell.nodes import Tag, Template, Wikilink
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from powerhouse.corpora.document import Markup

_MIN_MAIN_SHARE = 0.05
_NO_PROSE_TAGS = {"ref", "table", "gallery", "timeline", "math", "imagemap", "score", "syntaxhighlight", "source"}
_NO_PROSE_LINK = re.compile(r"^\s*:?(file|image|category|media):", re.IGNORECASE)
_TAIL_SECTION = re.compile(
    r"^==\s*(see also|references|notes|further reading|external links|bibliography)\s*==\s*$", re.I | re.M
)
_BLANK_LINES = re.compile(r"\n\s*\n+")


def extract(markup: Markup, content: str) -> str:
    """Give the running text of a document, its outer white space stripped; empty where it has none."""
    if markup == "html":
        return _from_html(content).strip()
    if markup == "wikitext":
        return _from_wikitext(content).strip()
    return content.strip()


def _from_html(content: str) -> str:
    """Give the main content, or the whole page's text where the heuristic finds next to nothing of it.

    Resiliparse takes an element for boilerplate by words in its class such as "select" or "related"; a page whose body has
    such a class would be lost whole.
    """
    tree = HTMLTree.parse(content)
    main = str(extract_plain_text(tree, main_content=True))
    whole = str(extract_plain_text(tree, main_content=False))
    return main if len(main) >= _MIN_MAIN_SHARE * len(whole) else whole


def _from_wikitext(content: str) -> str:
    """Give the article's prose: no templates, tables, footnotes, images, categories, or reference sections at its end."""
    tail = _TAIL_SECTION.search(content)
    code = mwparserfromhell.parse(content[: tail.start()] if tail else content, skip_style_tags=True)
    code.nodes = [node for node in code.nodes if not _is_no_prose(node)]
    return _BLANK_LINES.sub("\n\n", code.strip_code(normalize=True, collapse=True).replace("'''", "").replace("''", ""))


def _is_no_prose(node: object) -> bool:
    if isinstance(node, Tag):
        return str(node.tag).lower() in _NO_PROSE_TAGS
    if isinstance(node, Wikilink):
        return bool(_NO_PROSE_LINK.match(str(node.title)))
    return isinstance(node, Template)
