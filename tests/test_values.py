"""Values as a person writes them become the types that settings and fields have."""

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyadlm import DyadConfig, UserError
from dyadlm.values import coerce, coerce_fields, parse_assignment, type_of


@pytest.mark.parametrize(
    ("text", "annotation", "expected"),
    [
        ("x=1e-1", float, 0.1),
        ("x=1", float, 1),
        ("x=1e3", int, 1000),
        ("x=true", bool, True),
        ("x=null", int | None, None),
        ("x=[1, 2]", int | list[int] | None, [1, 2]),
        ("x=[1e1, 2]", list[int], [10, 2]),
        ("x=[1, word]", list[int | str], [1, "word"]),
        ("x=off", Literal["off", "on"], "off"),
        ("x=1e-5", Any, "1e-5"),
    ],
)
def test_values_take_the_type_of_the_setting(text, annotation, expected):
    name, value = parse_assignment(text)
    assert name == "x"
    found = coerce(value, annotation, name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "annotation"),
    [("x=yes please", bool), ("x=1.5", int), ("x=[a]", list[int]), ("x=.inf", float), ("x=3", str), ("x=1", bool)],
)
def test_values_of_another_type_are_refused(text, annotation):
    with pytest.raises(UserError, match="x cannot be"):
        coerce(parse_assignment(text)[1], annotation, "x")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_survives_in_the_forms_that_python_prints(number):
    for text in (repr(number), f"{number:.17g}", f"{number:e}" if f"{number:e}" == repr(number) else repr(number)):
        assert coerce(parse_assignment(f"x={text}")[1], float, "x") == number


def test_fields_of_the_model_are_coerced():
    given = dict(map(parse_assignment, ("dropout=1e-1", "rms_norm_eps=1e-5", "level_rank=[4, 5]", "hidden_size=6e1")))
    assert DyadConfig.coerce_fields(given) == {
        "dropout": 0.1,
        "rms_norm_eps": 1e-5,
        "level_rank": [4, 5],
        "hidden_size": 60,
    }
    with pytest.raises(UserError, match=r"model\.dropout cannot be 'much'; it takes a number"):
        DyadConfig.coerce_fields({"dropout": "much"}, prefix="model.")
    with pytest.raises(UserError, match="did you mean 'dropout'"):
        DyadConfig.coerce_fields({"dropuot": 0.1})


def test_fields_of_other_models_take_the_type_of_their_value():
    now = {"rms_norm_eps": 1e-6, "tie": True, "layers": [1, 2], "name": "silu", "unset": None, "empty": []}
    types = {name: type_of(value) for name, value in now.items()}
    given = {"rms_norm_eps": "1e-5", "tie": False, "layers": ["3"], "name": "gelu", "unset": "1e-3", "empty": [7]}
    found = coerce_fields(given, types, "A model of type llama")
    assert found == {"rms_norm_eps": 1e-5, "tie": False, "layers": [3], "name": "gelu", "unset": 1e-3, "empty": [7]}
    with pytest.raises(UserError, match="A model of type llama has no field 'nmae'; the nearest is name"):
        coerce_fields({"nmae": "x"}, types, "A model of type llama")
    with pytest.raises(UserError, match="tie cannot be 'maybe'"):
        coerce_fields({"tie": "maybe"}, types, "A model of type llama")
