from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from jsonschema import validate

from powerhouse.engine import Constraint, Engine, SamplingParams
from powerhouse.errors import RequestError

MakeEngine = Callable[..., Engine]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "naïf", "猫"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def answers(engine: Engine, constraint: Constraint | None, num: int = 3) -> list[str]:
    """Of a model with random weights, which by itself writes nothing of any form."""
    params = SamplingParams(max_tokens=90, temperature=1.5, seed=1, n=num, ignore_eos=True, constraint=constraint)
    completions = list(engine.generate(["It was"], params))
    if constraint:
        assert {completion.finish_reason for completion in completions} == {"stop"}
    return [completion.text for completion in completions]


def test_every_answer_has_the_form_that_is_asked_for_in_any_company(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4, num_blocks=64, max_num_batched_tokens=32)
    free = answers(engine, None, 2)
    assert not any(re.fullmatch(r"\{.*\}", text) for text in free)
    for text in answers(engine, Constraint.by_json_schema(SCHEMA)):
        validate(json.loads(text), SCHEMA)
    assert all(re.fullmatch(r"[A-C]{2,4}-\d{3}", text) for text in answers(engine, Constraint.by_regex(r"[A-C]{2,4}-\d{3}")))
    chosen = answers(engine, Constraint.by_choice(["yes", "no", 'say "猫"\n']), 6)
    assert set(chosen) <= {"yes", "no", 'say "猫"\n'}
    assert len(set(chosen)) > 1
    assert answers(engine, None, 2) == free, "who asks for no form is not disturbed"


def test_a_constrained_answer_is_the_same_alone_beside_others_and_preempted(make_engine: MakeEngine) -> None:
    constraint = Constraint.by_json_schema(SCHEMA)
    engine = make_engine(block_size=4, num_blocks=26)
    params = SamplingParams(max_tokens=90, temperature=1.5, seed=1, constraint=constraint)
    (alone,) = make_engine().generate(["It was"], params)
    for _ in range(5):
        engine.add_request("Call me", SamplingParams(max_tokens=40, seed=5, constraint=Constraint.by_regex("[a-z]{30,35}")))
    engine.add_request("It was", params, "same")
    text = ""
    while engine.has_unfinished:
        text += "".join(output.text for output in engine.step() if output.request_id == "same")
    assert text == alone.text
    assert engine.stats()["num_preemptions"] > 0
    assert engine.stats()["kv_cache_usage"] == 0


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint.by_regex("[0-9"), "the regex is not valid\n  got: at 1(8): invalid regex"),
        (Constraint.by_json_schema({"type": "objec"}), "the JSON schema is not valid\n  got: Invalid type: objec"),
        (Constraint.by_json_schema({"type": "integer", "minimum": 5, "maximum": 4}), "the JSON schema is not valid"),
        (Constraint.by_json_schema({"$ref": "#/$defs/none"}), "the JSON schema is not valid"),
    ],
)
def test_a_form_that_is_not_valid_is_refused_and_the_others_go_on(
    make_engine: MakeEngine, constraint: Constraint, message: str
) -> None:
    engine = make_engine()
    engine.add_request([5, 6], SamplingParams(max_tokens=3), "good")
    with pytest.raises(RequestError, match=re.escape(message)):
        engine.add_request([5, 6], SamplingParams(constraint=constraint), "bad")
    while engine.has_unfinished:
        assert {output.request_id for output in engine.step()} == {"good"}


@pytest.mark.parametrize("texts", [[], [""], ["a", 1]])
def test_a_choice_of_nothing_is_refused(texts: list[str]) -> None:
    with pytest.raises(RequestError, match="choice is out of range"):
        Constraint.by_choice(texts)


@pytest.mark.slow
def test_the_library_is_not_loaded_before_the_first_constraint() -> None:
    code = "import sys, powerhouse.engine, powerhouse.serving.protocol; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
