from __future__ import annotations

from powerhouse.corpora.extract import extract

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
