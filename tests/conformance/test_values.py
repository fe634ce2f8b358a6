"""Values that cannot be meant are one line that names field, value and remedy; the rest passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from workbench import values
from workbench.attacks.relearn import RelearnSettings
from workbench.builtin import BuiltinConfig
from workbench.data.world import WorldConfig
from workbench.errors import WorkbenchError
from workbench.runs.config import RunConfig, validated
from workbench.unlearning.budget import match_budget
from workbench.unlearning.methods import METHODS, known_settings, settings_for

ODD = [
    math.nan,
    math.inf,
    -math.inf,
    1e300,
    1e308,
    -1,
    -0.5,
    0.5,
    True,
    None,
    "4",
    "",
    [],
    2**63,
    1e30,
]


@given(st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.booleans()))
def test_a_check_gives_the_value_back_or_one_line(value: object) -> None:
    for check in (
        values.number,
        values.rate,
        values.share,
        values.whole,
        values.steps,
        values.rows,
        values.seed,
    ):
        said, found = "field is ", None
        try:
            found = check("field", value)  # type: ignore[operator]
        except WorkbenchError as error:
            said = str(error)
        assert said.startswith("field is ") and "\n" not in said.encode("unicode_escape").decode()
        if found is not None:
            assert found == value and math.isfinite(found) and not isinstance(value, bool)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"seeds": [2**63]}, "a seed is 9223372036854775808"),
        ({"seeds": [-1]}, "a seed is -1"),
        ({"attack": {"steps": 1e30}}, "attack"),
        ({"attack": {"lr": math.nan}}, "lr"),
        ({"attack": {"batch_size": 10**12}}, "batch_size"),
        ({"attack": {"measure_at": [0, 99, 4, 40]}}, "attack.measure_at is (0, 99, 4, 40)"),
        ({"attack": {"measure_at": [0, 4, 4, 40]}}, "must rise strictly"),
        ({"model": {"steps": -1}}, "steps is -1"),
        ({"model": {"mlp_width": 0}}, "mlp_width is 0"),
        ({"model": {"heads": 4, "key_value_heads": 3}}, "key_value_heads is 3"),
        ({"model": {"width": 100, "heads": 8}}, "width is 100"),
        ({"model": {"world": {"seed": 2**63}}}, "seed is 9223372036854775808"),
        ({"alpha_limit": 1e30}, "alpha_limit"),
        ({"budget": math.nan}, "budget"),
        ({"budget": math.inf}, "budget"),
        ({"variants": {"base": {"method": "npo"}}}, "'base' is a name with a meaning of its own"),
        ({"variants": {"never-learned": {"method": "npo"}}}, "meaning of its own"),
        ({"variants": {"NPO": {"method": "rmu"}}}, "meaning of its own"),
        ({"variants": {"A": {"method": "npo"}, "a": {"method": "rmu"}}}, "would share one folder"),
    ],
)
def test_a_configuration_with_nonsense_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(WorkbenchError) as error:
        validated(RunConfig, fields, "a file")
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_no_setting_takes_nonsense(name: str, llama: PreTrainedModel) -> None:
    for key, default in known_settings(name).items():
        for odd in ODD:
            if key in METHODS[name].fixed or (odd == 0.5 and not isinstance(default, str)):
                continue
            if isinstance(default, int | float) and odd == -1 and key.endswith("layer"):
                continue  # the method's own choice
            with pytest.raises(WorkbenchError) as error:
                settings_for(name, llama, {key: odd})  # type: ignore[dict-item]
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("budget", [math.nan, 0.0, -1.0, 1e300])
def test_a_budget_that_is_none_is_refused(budget: float) -> None:
    with pytest.raises(WorkbenchError, match="the disruption budget is"):
        match_budget(lambda alpha: alpha, budget)


@pytest.mark.parametrize("limit", [math.nan, 0.0, math.inf, 1e30])
def test_a_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(WorkbenchError, match="the limit of alpha is"):
        match_budget(lambda alpha: alpha, 0.1, limit=limit)


def test_a_price_that_is_no_number_never_reaches_a_budget() -> None:
    found = match_budget(lambda alpha: math.nan if alpha else 0.0, 0.1)
    assert not found.reached and found.alpha == 0
    later = match_budget(lambda alpha: math.nan if alpha > 0.4 else 0.01 * alpha, 0.1)
    assert not later.reached and later.alpha <= 0.4


@pytest.mark.parametrize(
    "make",
    [
        lambda: RelearnSettings(steps=2**40),
        lambda: RelearnSettings(lr=1e308),
        lambda: BuiltinConfig(steps=0),
        lambda: WorldConfig(seed=-1),
        lambda: WorldConfig(islands=10**9),
    ],
)
def test_python_callers_get_the_same_line(make: Callable[[], Any]) -> None:
    with pytest.raises(WorkbenchError):
        make()


def test_the_default_configuration_passes() -> None:
    assert validated(RunConfig, {}, "nothing") == RunConfig()
