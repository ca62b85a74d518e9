"""The oracle is transformers' apply_chat_template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chats import ANSWERS, CHATML, CONVERSATIONS, HEADERS, INSTRUCT, TEMPLATES, TOKENS, TOOLS, turns
from fakes import tiny_tokenizer
from powerhouse.chat import ChatTemplate
from powerhouse.errors import InputError, ModelFormatError

TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds <it> & 'that', naïvely",
        "parameters": {"type": "object", "properties": {"what": {"type": "string", "enum": ["ä", "b"]}}, "required": []},
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompt": {"add_generation_prompt": True},
    "tools": {"tools": [TOOL, TOOL], "add_generation_prompt": True},
    "documents": {"documents": [{"title": f"t{index}", "text": "é"} for index in range(4)]},
    "no thinking": {"enable_thinking": False, "add_generation_prompt": True},
    "another end": {"eos_token": "<end>"},
    "continued": {"continue_final_message": True},
}


def oracle(source: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().core, chat_template=source, **TOKENS)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_a_conversation_is_rendered_or_refused_as_transformers_does(source: str, options: dict[str, Any]) -> None:
    template, theirs, num_rendered = ChatTemplate(source, TOKENS), oracle(source), 0
    for name, messages in CONVERSATIONS.items():
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:
            reason = "" if "continue_final_message" in options else str(error)
            with pytest.raises(InputError) as caught:
                template.render(messages, **options)
            assert reason in str(caught.value), name
        else:
            assert template.render(messages, **options) == expected, name
            num_rendered += 1
    assert num_rendered >= 7


def test_a_template_sees_the_date_and_named_templates_are_chosen_as_transformers_does() -> None:
    sources = {"default": "{{ strftime_now('%Y') | length }}", "tool_use": "{{ tools | length }} tools"}
    theirs = oracle("")
    theirs.chat_template = sources
    template = ChatTemplate(sources)

    for options in ({}, {"tools": [TOOL]}):
        assert template.render(turns("a"), **options) == theirs.apply_chat_template(turns("a"), tokenize=False, **options)
    assert template.render(turns("a")) == "4"


@pytest.mark.parametrize("name", ANSWERS)
def test_spans_are_what_the_assistant_writes_and_its_end_of_turn(name: str) -> None:
    messages = CONVERSATIONS[name]
    text, spans = ChatTemplate(HEADERS, TOKENS).render_spans(messages)

    assert text == ChatTemplate(HEADERS, TOKENS).render(messages)
    answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    assert [text[start:end] for start, end in spans] == [f"{answer}<|eot_id|>" for answer in answers]


@pytest.mark.parametrize("name", ANSWERS)
def test_spans_without_generation_blocks_are_those_with_them(name: str) -> None:
    bare = HEADERS.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    assert "generation %}" not in bare

    assert ChatTemplate(bare, TOKENS).render_spans(CONVERSATIONS[name]) == ChatTemplate(HEADERS, TOKENS).render_spans(
        CONVERSATIONS[name]
    )


def test_spans_of_chatml_and_instruct_leave_out_the_header_and_the_blank_after() -> None:
    for source, expected in ((CHATML, ["b<|im_end|>", "d<|im_end|>"]), (INSTRUCT, [" b</s>", " d</s>"])):
        text, spans = ChatTemplate(source, TOKENS).render_spans(turns("a", "b", "c", "d"))
        assert [text[start:end] for start, end in spans] == expected


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}", turns("a", "b", "c")),
        ("{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}{% endfor %}", turns("a", "b")),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", turns("a", "b")),
        (CHATML, CONVERSATIONS["assistant first"]),
    ],
    ids=["hides older messages", "has no generation prompt", "is turned round", "starts with an answer"],
)
def test_a_template_that_does_not_show_where_answers_stand_is_refused(source: str, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=r"does not show where an answer starts[^$]*do: put {% generation %}"):
        ChatTemplate(source, TOKENS).render_spans(messages)


def test_marks_in_a_message_do_not_move_the_spans() -> None:
    with pytest.raises(InputError, match="cannot be told from its text"):
        ChatTemplate(HEADERS, TOKENS).render_spans(turns("a\ufdd1", "b"))


def test_in_a_guarded_text_only_what_the_template_wrote_spells_a_token() -> None:
    messages = turns("<|im_end|> <|im_e", "nd|>", system="array[0] <|im_start|>")
    text, guarded = ChatTemplate(CHATML).render_guarded(messages, ["<|im_start|>", "<|im_end|>"])

    assert text == ChatTemplate(CHATML).render(messages)
    assert guarded.count("<|im_start|>") == guarded.count("<|im_end|>") == 3
    assert [a == b for a, b in zip(text, guarded, strict=True)].count(False) == 3


def test_the_names_of_a_tools_parameters_are_guarded_too() -> None:
    tool = {"function": {"name": "f", "parameters": {"</s>": "</s>"}}}
    text, guarded = ChatTemplate("{{ tools | tojson }}").render_guarded(turns("a"), ["</s>"], tools=[tool])

    assert (text.count("</s>"), guarded.count("</s>")) == (2, 0)


@pytest.mark.parametrize(
    "source",
    ["{{ messages[0].content == '</s>' }}", "{{ messages[0].content | tojson(ensure_ascii=true) }}"],
    ids=["compares", "escapes"],
)
def test_a_template_that_looks_for_a_token_in_a_message_is_refused_when_guarded(source: str) -> None:
    with pytest.raises(InputError, match="treats a message differently because it spells a special token"):
        ChatTemplate(source).render_guarded(turns("</s>"), ["</s>"])


DEEP = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
FAULTS = [
    ("{% if %}", "the chat template is not valid in line 1\n  got: Expected an expression"),
    ("\n{% for m in messages %}", "not valid in line 2\n  got: Unexpected end of template"),
    ("{{ messages | nofilter }}", "not valid in line 1\n  got: No filter named 'nofilter'"),
    ("{{ raise_exception('No, thanks') }}", "refuses the conversation\n  got: No, thanks"),
    ("{{ nothing.at_all }}", "refuses the conversation\n  got: 'nothing' is undefined"),
    (DEEP, "access to attribute '__class__' of 'str' object is unsafe"),
    ("{{ messages.append(1) }}", "is unsafe"),
    ("{{ raise_exception.__globals__ }}{{ x.y }}", "refuses the conversation"),
    ("{{ 1 / 0 }}", "refuses the conversation\n  got: division by zero"),
    ("{{ range(99999999) | length }}", "Range too big"),
    ("{{ messages | tojson(indent='a', foo=1) }}", "unexpected keyword argument 'foo'"),
]


@pytest.mark.parametrize(("source", "message"), FAULTS, ids=[source[:20] for source, _ in FAULTS])
def test_a_fault_of_a_template_is_one_clear_error(source: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        ChatTemplate(source).render(turns("a"))
    assert message in str(caught.value)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "an empty conversation\n  do: give at least one message"),
    (["hello"], {}, "a message is a mapping of role, content and more\n  got: hello"),
    ([{"role": "user", "content": b"x"}], {}, "made of JSON values\n  got: Object of type bytes"),
    (turns("a"), {"continue_final_message": True, "add_generation_prompt": True}, "do: choose one"),
    ([{"role": "user"}], {"continue_final_message": True}, "the last message has no text to go on from"),
]


@pytest.mark.parametrize(("messages", "options", "message"), BAD, ids=[message[:24] for _, _, message in BAD])
def test_a_conversation_that_is_none_is_refused(messages: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        ChatTemplate("{{ messages | length }}").render(messages, **options)
    assert message in str(caught.value)


def test_a_template_that_drops_the_last_message_cannot_go_on_from_it() -> None:
    with pytest.raises(InputError, match="does not show the last message's end\n  got: b"):
        ChatTemplate("{{ messages[0].content }}").render(turns("a", "b"), continue_final_message=True)


def test_the_last_text_part_of_a_message_is_continued_as_transformers_does() -> None:
    source = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    options: dict[str, Any] = {"continue_final_message": True}

    expected = oracle(source + "{# content #}").apply_chat_template(messages, tokenize=False, **options)
    assert ChatTemplate(source).render(messages, **options) == expected == "[a][b"


def test_rendering_leaves_the_conversation_as_it_was() -> None:
    messages = [*turns("a"), {"role": "assistant", "content": "b", "thinking": "c"}]
    before = json.dumps(messages)

    ChatTemplate(CHATML).render(messages, continue_final_message=True)
    assert json.dumps(messages) == before


def test_a_template_is_loaded_from_where_transformers_keeps_it(tmp_path: Path) -> None:
    theirs, config = oracle(HEADERS), tmp_path / "tokenizer_config.json"
    theirs.save_pretrained(tmp_path)
    expected = theirs.apply_chat_template(turns("a"), tokenize=False)

    assert (tmp_path / "chat_template.jinja").is_file()
    assert ChatTemplate.load(tmp_path).render(turns("a")) == expected
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": HEADERS}, {"name": "tool_use", "template": "T"}]
    for kept in (HEADERS, named):
        config.write_text(json.dumps({"chat_template": kept, "bos_token": {"content": "<s>"}, "add_bos_token": True}))
        assert ChatTemplate.load(tmp_path).render(turns("a")) == expected
    assert ChatTemplate.load(tmp_path).render(turns("a"), tools=[]) == "T"


def test_saved_templates_are_read_by_transformers(tmp_path: Path) -> None:
    sources = {"default": CHATML, "tool_use": TOOLS}
    tiny_tokenizer().save(tmp_path)
    ChatTemplate(sources).save(tmp_path)

    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template == sources
    assert ChatTemplate.load(tmp_path).sources == sources


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", "no chat template\n  allowed: chat_template.jinja, or `chat_template` in tokenizer_config.json\n  do: take"),
        ("{", "tokenizer_config.json: damaged"),
        ("[]", "tokenizer_config.json: not a JSON object\n  got: list"),
        ('{"chat_template": 3}', "tokenizer_config.json: chat_template\n  allowed: a text, or a list of"),
        ('{"chat_template": [{"name": "a"}]}', "tokenizer_config.json: chat_template\n  allowed: a text, or a list of"),
    ],
)
def test_a_directory_without_a_template_or_with_a_damaged_one_is_refused(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)

    with pytest.raises(InputError) as caught:
        ChatTemplate.load(tmp_path)
    assert message in str(caught.value)


def test_several_templates_without_a_default_are_refused() -> None:
    with pytest.raises(InputError, match=r"none is the default\n  got: \['rag', 'tool_use'\]"):
        ChatTemplate({"tool_use": "a", "rag": "b"}).render(turns("a"))


def test_a_damaged_file_of_special_tokens_is_a_fault_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("a")
    (tmp_path / "special_tokens_map.json").write_text("?")

    with pytest.raises(ModelFormatError, match=r"special_tokens_map.json: damaged"):
        ChatTemplate.load(tmp_path)
