from __future__ import annotations

import gc
import signal
import subprocess
import sys
import time

import psutil
import pytest

from powerhouse.corpora import extractor
from powerhouse.corpora.extract import extract
from powerhouse.corpora.extractor import ExtractionError, Extractor
from powerhouse.errors import ClusterError

PAGE = "<html><body><p>It was the best of times, être.</p></body></html>"
SLOW = {
    "attributes": ("html", "<html><body><p " + " ".join(f"a{number}=1" for number in range(200_000)) + ">x</p>"),
    "templates": ("wikitext", "{{a|[[b|" * 3000),
    "links": ("wikitext", "[http://a " * 20_000),
}
"""Each takes its parser more than ten seconds, by the square of its size."""


def newest_child(parent: psutil.Process) -> psutil.Process:
    return max(parent.children(), key=lambda child: child.create_time())


def test_it_gives_what_extraction_in_this_process_gives() -> None:
    extract_page = Extractor(10)
    for markup, content in (("html", PAGE), ("wikitext", "'''Ada''' was a [[mathematician]]."), ("text", " a\n"), ("html", "")):
        assert extract_page(markup, content) == extract(markup, content)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_page_over_the_limit_is_given_up_and_the_next_is_read(name: str) -> None:
    extract_page = Extractor(0.5)
    extract_page("html", PAGE)
    first = newest_child(psutil.Process())
    start = time.process_time()
    with pytest.raises(ExtractionError, match=r"over 0\.5 s") as caught:
        extract_page(*SLOW[name])  # type: ignore[arg-type]
    assert caught.value.reason == "timeout"
    assert extract_page("html", PAGE) == "It was the best of times, être."
    assert not first.is_running()
    assert time.process_time() - start < 1, "the work is not done here"


def test_the_limit_is_of_a_page_and_not_of_many() -> None:
    extract_page = Extractor(0.2)
    page = f"<html><body>{'<p>It was the best of times.</p>' * 1000}</body></html>"
    extract_page("html", page)
    child = newest_child(psutil.Process())
    while sum(child.cpu_times()[:2]) < 1.5:
        assert extract_page("html", page).startswith("It was")
    assert newest_child(psutil.Process()) == child


def test_a_crash_of_the_parser_is_a_failure_and_the_next_page_is_read() -> None:
    extract_page = Extractor(10)
    extract_page("html", PAGE)
    newest_child(psutil.Process()).send_signal(signal.SIGSEGV)
    with pytest.raises(ExtractionError, match="the parser ended by SIGSEGV") as caught:
        extract_page("html", PAGE)
    assert caught.value.reason == "failure"
    assert extract_page("html", PAGE) == "It was the best of times, être."


def test_an_error_of_the_parser_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    extract_page = Extractor(10)
    with pytest.raises(ExtractionError, match="TypeError"):
        extract_page("html", 5)  # type: ignore[arg-type]
    assert extract_page("html", PAGE)


def test_no_process_stays() -> None:
    extract_page = Extractor(10)
    extract_page("html", PAGE)
    child = newest_child(psutil.Process())
    del extract_page
    gc.collect()
    assert not child.is_running()


def test_a_process_whose_owner_is_killed_ends() -> None:
    code = (
        f"import time; from powerhouse.corpora.extractor import *; e = Extractor(9); print(e('html', {PAGE!r})); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        child = newest_child(psutil.Process(owner.pid))
        owner.kill()
        child.wait(timeout=20)


def test_a_process_that_cannot_start_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor.sys, "executable", "/bin/false")
    with pytest.raises(ClusterError, match="does not start\n  got: exit status 1"):
        Extractor(10)("html", PAGE)
