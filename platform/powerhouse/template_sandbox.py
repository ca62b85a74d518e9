"""The sandbox that chat templates run in: jinja2's immutable one, with what transformers 5 adds to it.

That is `raise_exception`, `strftime_now`, `tojson` without escapes for HTML, {% break %} and {% continue %}, and the
{% generation %} block around what the assistant writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from powerhouse.errors import InputError

MARKS_SPANS = "powerhouse_marks_spans"
"""Variable of a rendering: where it is true, the content of each {% generation %} block stands between marks."""

# Unicode noncharacters: never in text that is exchanged.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def compile_template(text: str) -> jinja2.Template:
    """Compile a chat template.

    Raises:
        InputError: it is not valid jinja2.
    """
    try:
        return _environment().from_string(text)
    except (jinja2.TemplateError, RecursionError) as error:
        where = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InputError(f"the chat template is not valid{where}", got=error, do="correct the template") from None


def read_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the marks of {% generation %} blocks out of a rendering, and give the character ranges between them."""
    plain, spans, size, start = [], [], 0, 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if piece == _OPEN:
            start = size
        elif piece == _CLOSE:
            spans.append((start, size))
        else:
            plain.append(piece)
            size += len(piece)
    return "".join(plain), spans


class _Generation(Extension):
    """The {% generation %} block: its content, between marks where the rendering asks for them."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _mark(self, context: Context, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}" if context.get(MARKS_SPANS) else caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
