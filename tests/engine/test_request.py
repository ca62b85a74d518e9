from __future__ import annotations

import math
import re

import pytest

from powerhouse.engine import Constraint, SamplingParams
from powerhouse.errors import RequestError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is out of range\n  got: 0\n  allowed: a whole number above 0"),
        ({"max_tokens": 1.5}, "max_tokens is out of range\n  got: 1.5"),
        ({"max_tokens": True}, "max_tokens is out of range\n  got: True"),
        ({"temperature": -0.1}, "temperature is out of range\n  got: -0.1\n  allowed: 0 or above"),
        ({"temperature": math.nan}, "temperature is out of range\n  got: nan"),
        ({"temperature": math.inf}, "temperature is out of range\n  got: inf"),
        ({"temperature": "1"}, "temperature is out of range\n  got: '1'"),
        ({"top_p": 0}, "top_p is out of range\n  got: 0\n  allowed: above 0, up to 1"),
        ({"top_p": 1.01}, "top_p is out of range\n  got: 1.01"),
        ({"top_k": 0}, "top_k is out of range\n  got: 0\n  allowed: 1 or above, or None"),
        ({"top_k": -1}, "top_k is out of range\n  got: -1"),
        ({"seed": -1}, "seed is out of range\n  got: -1\n  allowed: 0 or above, or None"),
        ({"seed": 0.5}, "seed is out of range\n  got: 0.5"),
        ({"stop": "end"}, "stop is out of range\n  got: 'end'\n  allowed: a tuple of non-empty strings"),
        ({"stop": ("end", "")}, "stop is out of range\n  got: ('end', '')"),
        ({"logprobs": -1}, "logprobs is out of range\n  got: -1\n  allowed: 0 to 20, or None"),
        ({"logprobs": True}, "logprobs is out of range\n  got: True"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is out of range\n  got: 21\n  allowed: 0 to 20, or None"),
        ({"prompt_logprobs_from": -1}, "prompt_logprobs_from is out of range\n  got: -1\n  allowed: 0 or above"),
        ({"prompt_logprobs": 1, "max_tokens": -1}, "max_tokens is out of range\n  got: -1\n  allowed: a whole number, 0 or"),
        ({"min_p": 1.5}, "min_p is out of range\n  got: 1.5\n  allowed: 0 to 1"),
        ({"n": 0}, "n is out of range\n  got: 0\n  allowed: 1 to 128"),
        ({"n": 10**9}, "n is out of range\n  got: 1000000000"),
        ({"min_tokens": 17}, "min_tokens is out of range\n  got: 17\n  allowed: 0 to max_tokens=16"),
        ({"repetition_penalty": 0}, "repetition_penalty is out of range\n  got: 0\n  allowed: above 0"),
        ({"presence_penalty": 2.1}, "presence_penalty is out of range\n  got: 2.1\n  allowed: -2 to 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is out of range\n  got: nan"),
        ({"logit_bias": {1: 101}}, "logit_bias is out of range\n  got: {1: 101}\n  allowed: token ids with numbers"),
        ({"logit_bias": {"1": 1}}, "logit_bias is out of range\n  got: {'1': 1}"),
        ({"logit_bias": [1]}, "logit_bias is out of range\n  got: [1]"),
        ({"stop_token_ids": (1.5,)}, "stop_token_ids is out of range\n  got: (1.5,)\n  allowed: a tuple of token ids"),
        ({"constraint": "[a-z]"}, "constraint is out of range\n  got: '[a-z]'\n  allowed: a Constraint, or None"),
        (
            {"constraint": Constraint.by_choice(["a"]), "min_tokens": 2},
            "min_tokens is out of range\n  got: 2\n  allowed: 0 with a constraint",
        ),
        ({"ignore_eos": 1}, "ignore_eos is out of range\n  got: 1\n  allowed: true or false"),
    ],
)
def test_a_parameter_out_of_range_is_refused_with_what_is_allowed(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        SamplingParams(**settings)  # type: ignore[arg-type]
