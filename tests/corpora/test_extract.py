from __future__ import annotations

import pytest

from powerhouse.corpora.extract import MAX_DEPTH, extract, markup_depth

PROSE = "The engine keeps a pool of connections, and it hands them out on request. " * 5


def test_html_gives_the_main_content_without_navigation_and_scripts() -> None:
    page = f"""<html><head><title>T</title><script>var x = 1;</script></head><body>
    <nav><ul><li><a href="/">Home</a></li><li><a href="/p">Prices</a></li></ul></nav>
    <main><h1>Pools</h1><p>{PROSE}</p><p>1 &lt; 2 &amp; so on.</p></main>
    <footer>Copyright of somebody</footer></body></html>"""
    text = extract("html", page)
    assert PROSE.strip() in text
    assert "1 < 2 & so on." in text
    assert not any(word in text for word in ("Prices", "var x", "Copyright"))


def test_a_page_that_looks_all_boilerplate_gives_its_whole_text() -> None:
    page = f'<html><body><div class="withsidebar core-selectable"><p>{PROSE}</p></div></body></html>'
    assert PROSE.strip() in extract("html", page)


def test_html_without_text_is_empty() -> None:
    assert extract("html", "<html><body><img src='a.png'></body></html>") == ""


def test_wikitext_gives_prose_without_templates_tables_notes_images_and_references() -> None:
    source = """{{Infobox person|name=X}}
'''Ada''' was a [[mathematician|famous mathematician]] in [[London]].<ref>A note</ref>
[[File:Ada.jpg|thumb|A portrait]]
{| class="wikitable"
| cell
|}
== Life ==
She wrote ''notes''.

== References ==
{{reflist}}
* a reference
[[Category:People]]"""
    text = extract("wikitext", source)
    assert " ".join(text.split()) == "Ada was a famous mathematician in London. Life She wrote notes."


def test_plain_text_only_loses_white_space_around_it() -> None:
    assert extract("text", "\n\n a  b\n\nc \n") == "a  b\n\nc"


def test_mojibake_is_mended_and_accents_are_left_alone() -> None:
    good = "The naïve café's “garden” – là-bas, Ângela, Ã la carte, naïveté."
    broken = good.replace("à", "a").replace("”", "“").encode().decode("windows-1252")
    assert extract("text", good) == good
    assert extract("text", broken) == good.replace("à", "a").replace("”", "“")


DEEP = {
    "divs": ("html", "<html><body>" + "<div>" * 10_000 + "<p>Deep down.</p>" + "</div>" * 10_000),
    "unclosed": ("html", "<html><body>" + "<b><i>" * 10_000 + "x"),
    "tables": ("html", "<table><tr><td>" * 10_000),
    "notes": ("wikitext", "<ref>" * 10_000),
    "cut tags": ("wikitext", "<b " * 10_000),
    "wikitables": ("wikitext", "{|\n|\n" * 5_000),
}


@pytest.mark.parametrize("name", DEEP)
def test_a_page_nested_10000_deep_is_left_out_before_it_is_parsed(name: str) -> None:
    markup, content = DEEP[name]
    assert markup_depth(markup, content) > MAX_DEPTH[markup]  # type: ignore[arg-type,index]


FLAT = {
    "paragraphs": ("html", "<html><body>" + "<p>One.<br><li>Two.<img src=x>" * 5_000),
    "spans": ("html", "<html><body>" + "<span>a</span><i/>" * 5_000),
    "notes": ("wikitext", "A <ref>note</ref> and <ref name=x /> " * 5_000),
    "tables": ("wikitext", "{|\n| a\n|}\n" * 5_000),
}


@pytest.mark.parametrize("name", FLAT)
def test_a_long_flat_page_is_not_deep(name: str) -> None:
    markup, content = FLAT[name]
    assert markup_depth(markup, content) <= 3  # type: ignore[arg-type]
