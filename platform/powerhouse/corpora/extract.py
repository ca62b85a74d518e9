"""Markup in, plain text out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import ftfy
import mwparserfromhell
from mwparserfromhell.nodes import Tag, Template, Wikilink
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

if TYPE_CHECKING:
    from powerhouse.corpora.document import Markup

_MIN_MAIN_SHARE = 0.05
_NO_PROSE_TAGS = {"ref", "table", "gallery", "timeline", "math", "imagemap", "score", "syntaxhighlight", "source"}
_NO_PROSE_LINK = re.compile(r"^\s*:?(file|image|category|media):", re.IGNORECASE)
_TAIL_SECTION = re.compile(
    r"^==\s*(see also|references|notes|further reading|external links|bibliography)\s*==\s*$", re.I | re.M
)
_MOJIBAKE = re.compile(r"[ÂÃâÐÑ][\x80-\xbf\u0152-\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]")
"""UTF-8 read as Windows-1252: the first bytes of what is common, and what follows them. To look is far cheaper than to mend."""
_BLANK_LINES = re.compile(r"\n\s*\n+")


_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)|(/)>")
_VOID = ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr")
_OPTIONAL_END = ("p", "li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot", "option", "colgroup")
_ENDS_BY_ITSELF = frozenset(_VOID + _OPTIONAL_END)
MAX_DEPTH = {"html": 1000, "wikitext": 200, "text": 0}
"""Elements, and tables of wikitext, that may be open at once: the parsers take the square of it in time. Text is not parsed."""


def markup_depth(markup: Markup, content: str) -> int:
    """Give how many elements are open at once, at most; 0 for text, and where so few are opened that it does not matter."""
    if markup == "text":
        return 0
    num_tables = content.count("{|") - content.count("|}") if markup == "wikitext" else 0
    if content.count("<") <= MAX_DEPTH[markup]:
        return max(0, num_tables)
    depth = deepest = 0
    for closes, name, is_empty in _TAG.findall(content):
        if name.lower() not in _ENDS_BY_ITSELF:
            depth = max(0, depth - 1) if closes or is_empty else depth + 1
            deepest = max(deepest, depth)
    return max(deepest, num_tables)


def extract(markup: Markup, content: str) -> str:
    """Give the running text of a document, its outer white space stripped and its mojibake mended; empty where it has none."""
    if markup == "html":
        content = _from_html(content)
    elif markup == "wikitext":
        content = _from_wikitext(content)
    return (ftfy.fix_encoding(content) if _MOJIBAKE.search(content) else content).strip()


def _from_html(content: str) -> str:
    """Give the main content, or the whole page's text where the heuristic finds next to nothing of it.

    Resiliparse takes an element for boilerplate by words in its class such as "select" or "related"; a page whose body has
    such a class would be lost whole.
    """
    tree = HTMLTree.parse(content)
    main = str(extract_plain_text(tree, main_content=True))
    if len(main) >= _MIN_MAIN_SHARE * len(content):  # the text of a page is shorter than the page: no need to extract it all
        return main
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
