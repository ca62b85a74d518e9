"""Chat templates: a conversation to the text a model was trained on, as transformers 5 renders it.

A template is a program that came with a model: it runs in jinja2's immutable sandbox and sees plain JSON values alone.
Every fault of it, and every conversation that it refuses, is one InputError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from powerhouse.errors import InputError, ModelFormatError
from powerhouse.template_sandbox import MARKS_SPANS, compile_template, read_marks

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"

# Unicode noncharacters: never in text that is exchanged, so they can mark places inside a rendering.
_CONTINUE, _GUARD = "\ufdd2 ", "\ufdd3"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One template, or several by name: `tool_use` is taken where tools are given and there is one, else `default`."""

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        """`special_tokens` are variables of the template: bos_token, eos_token, ...

        Raises:
            InputError: the template is not valid jinja2.
        """
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self.special_tokens = dict(special_tokens or {})
        self._templates = {name: compile_template(text) for name, text in self.sources.items()}

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate:
        """Read chat_template.jinja and additional_chat_templates/*.jinja, else `chat_template` of tokenizer_config.json.

        Raises:
            InputError: the directory has no chat template, or a damaged one.
        """
        config = read_json(directory / CONFIG_FILE)
        if sources := read_sources(directory, config):
            return cls(sources, read_special_tokens(directory, config))
        raise InputError(
            f"{directory}: no chat template",
            allowed=f"{TEMPLATE_FILE}, or `chat_template` in {CONFIG_FILE}",
            do=f"take a model tuned for chat, or write its template into {TEMPLATE_FILE}",
        )

    def save(self, directory: Path) -> None:
        """Write the files that `load` and transformers read."""
        for name, text in self.sources.items():
            path = directory / (TEMPLATE_FILE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> str:
        """Give the text; `variables` are further ones of the template, such as enable_thinking.

        With `continue_final_message` it ends where the last message does, for the model to write on from there.

        Raises:
            InputError: the template refuses the conversation, fails, or cannot be continued.
        """
        if continue_final_message and add_generation_prompt:
            raise InputError("add_generation_prompt starts a new answer, continue_final_message goes on", do="choose one")
        chat, last = _plain_messages(messages), ""
        if continue_final_message:
            last = _tag_last(chat)
        given = _plain({"tools": tools, "documents": documents, **variables})
        text = self._run(messages=chat, add_generation_prompt=add_generation_prompt, **given)
        return _cut_at_tag(text, last) if continue_final_message else text

    def render_guarded(self, messages: Messages, tokens: Iterable[str], **options: Any) -> tuple[str, str]:
        """Give `render`'s text, and the same text in which no token can be found but those that the template wrote.

        Both have one length. In the second, the first character of every token that a message (or tool, or document)
        spells, in whole or by a part at its end, is another one. `options` are those of `render`.

        Raises:
            InputError: as `render`; or the template does something else with a message because it spells a token.
        """
        starts = _token_starts(tokens)
        text = self.render(messages, **options)
        guarded = self.render(_guard(_plain_messages(messages), starts), **_guard(options, starts))
        if len(text) != len(guarded) or any(a != b and b != _GUARD for a, b in zip(text, guarded, strict=True)):
            raise InputError(
                "the chat template treats a message differently because it spells a special token",
                do="take the special token out of the message",
            )
        return text, guarded

    def render_spans(self, messages: Messages, **options: Any) -> tuple[str, list[Span]]:
        """Give the text and the character ranges [start, end) of what the assistant writes in it.

        The ranges are the template's {% generation %} blocks. Without such blocks an answer is what its message adds to
        the conversation before it, blanks after it left out; it ends with the template's end-of-turn token, if any.

        Raises:
            InputError: as `render`; or the template has no such blocks and does not only add text with each message.
        """
        text = self.render(messages, **options)
        if "endgeneration" not in self.sources[self._name(options.get("tools"))]:
            return text, self._spans_by_prefix(text, messages, options)
        plain, spans = read_marks(self.render(messages, **options | {MARKS_SPANS: True}))
        if plain != text:
            raise InputError("the template's generation blocks cannot be told from its text", do="keep them in the open")
        return text, spans

    def _spans_by_prefix(self, text: str, messages: Messages, options: Mapping[str, Any]) -> list[Span]:
        spans = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self.render(messages[:index], **options, add_generation_prompt=True) if index else ""
            after = self.render(messages[: index + 1], **options)
            answer, content = after[len(before) :], message.get("content")
            starts_with_content = not isinstance(content, str) or answer.lstrip().startswith(content.strip())
            if not (text.startswith(after) and after.startswith(before) and starts_with_content):
                raise InputError(
                    "the chat template does not show where an answer starts and ends",
                    got=f"message {index}: {answer[:80]!r}",
                    do="put {% generation %} ... {% endgeneration %} around what the assistant writes",
                )
            spans.append((len(before), len(after.rstrip())))
        return spans

    def _name(self, tools: object) -> str:
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise InputError("several chat templates, and none is the default", got=sorted(self.sources))
        return name

    def _run(self, *, tools: object, **variables: Any) -> str:
        template = self._templates[self._name(tools)]
        try:
            return template.render(**self.special_tokens | {"tools": tools} | variables)
        except Exception as error:  # whatever a template raises is a fault of the template or of the conversation
            reason = str(error) or type(error).__name__
            raise InputError("the chat template refuses the conversation", got=reason) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read an object; a missing file is an empty one.

    Raises:
        ModelFormatError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFormatError(f"{path}: damaged", got=error, do="fetch or export the tokenizer again") from None
    if not isinstance(content, dict):
        raise ModelFormatError(f"{path}: not a JSON object", got=type(content).__name__)
    return content


def read_sources(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Give the templates of a directory by name; the files go before its tokenizer_config.json. There may be none."""
    paths = {path.stem: path for path in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))}
    if (directory / TEMPLATE_FILE).is_file():
        paths["default"] = directory / TEMPLATE_FILE
    if paths:
        return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    found = config.get("chat_template") or {}
    try:
        sources = {"default": found} if isinstance(found, str) else {item["name"]: item["template"] for item in found}
    except (TypeError, KeyError):
        sources = {"default": None}
    if not all(isinstance(text, str) for text in sources.values()):
        raise ModelFormatError(f"{directory / CONFIG_FILE}: chat_template", allowed="a text, or a list of {name, template}")
    return sources


def read_special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Give the named tokens, as `eos_token: </s>`; special_tokens_map.json is of the time before added_tokens_decoder."""
    legacy = {} if "added_tokens_decoder" in config else read_json(directory / "special_tokens_map.json")
    named = {key: item for key, item in (*config.items(), *legacy.items()) if key.endswith("_token")}
    texts = {key: item.get("content") if isinstance(item, dict) else item for key, item in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _plain(value: Any) -> Any:
    """A copy out of JSON values alone: what has methods does not come into the sandbox."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError("a conversation is made of JSON values", got=error) from None


def _plain_messages(messages: Messages) -> list[dict[str, Any]]:
    """Copy the messages: keys without a value go, and reasoning gets the names under which templates look for it."""
    chat = []
    for message in _plain(list(messages)):
        if not isinstance(message, dict):
            raise InputError("a message is a mapping of role, content and more", got=message)
        given = {key: item for key, item in message.items() if item is not None}
        if (reasoning := next((given[key] for key in _REASONING if key in given), None)) is not None:
            given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
        chat.append(given)
    if not chat:
        raise InputError("an empty conversation", do="give at least one message")
    return chat


def _tag_last(chat: list[dict[str, Any]]) -> str:
    """Put a tag at the end of the last message's text, and give that text."""
    content = chat[-1].get("content")
    parts = content if isinstance(content, list) else [chat[-1]]
    key = "text" if isinstance(content, list) else "content"
    for part in reversed(parts):
        if isinstance(part, dict) and isinstance(part.get(key), str):
            text: str = part[key]
            part[key] = text + _CONTINUE
            return text
    raise InputError("the last message has no text to go on from", got=chat[-1])


def _cut_at_tag(text: str, last: str) -> str:
    start = text.rfind(_CONTINUE.strip())
    if start < 0 or last.strip() not in text:
        raise InputError("the chat template does not show the last message's end", got=last, do="start a new answer")
    # A template that trims has taken the blank of the tag; what stood before the tag would have gone with it.
    return text[:start] if text.startswith(_CONTINUE, start) else text[:start].rstrip()


def _token_starts(tokens: Iterable[str]) -> re.Pattern[str]:
    """Find the first character of a token, or of as much of it as stands at the end: the next text may hold the rest."""
    ways = []
    for token in sorted(tokens):
        parts = "|".join(re.escape(token[1:end]) for end in range(1, len(token)))
        ways.append(rf"{re.escape(token[0])}(?={re.escape(token[1:])}|(?:{parts})\s*\Z)")
    return re.compile("|".join(ways) or r"(?!)")


def _guard(value: Any, starts: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return starts.sub(_GUARD, value)
    if isinstance(value, Mapping):
        return {_guard(key, starts): _guard(item, starts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_guard(item, starts) for item in value]
    return value
