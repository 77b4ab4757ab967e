"""What a client may say of a job in sections of their own: adapter, early stopping, classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from data.errors import InvalidInput
from data.job_checks import check_number, check_text, unknown, wrong_type
from data.job_methods import Rule

MAX_BETAS = 10


def check_section(name: str, value: Any) -> None:
    """Raise InvalidInput, naming the field, unless a section and all in it is as it should be."""
    if not isinstance(value, Mapping):
        raise wrong_type(name, "an object", value)
    known = SECTIONS[name]
    for key, item in value.items():
        if key not in known:
            raise unknown(f"{name}.{key}", key, list(known))
        known[key](f"{name}.{key}", item)
    if name == "classification":
        _check_classes(value)


def _number(*rule: Any) -> Callable[[str, Any], None]:
    found: Rule = rule
    return lambda name, value: check_number(name, value, found)


def _check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise wrong_type(name, "true or false", value)


def _check_targets(name: str, value: Any) -> None:
    names = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    if value != "all-linear" and not names:
        raise InvalidInput(
            f"Invalid '{name}': {value!r}. Give \"all-linear\" or a list of module "
            'names such as ["q_proj", "v_proj"].',
            param=name,
        )


def _check_betas(name: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) > MAX_BETAS:
        raise InvalidInput(
            f"Invalid '{name}': expected a list of at most {MAX_BETAS} numbers, but got {value!r} "
            "instead.",
            param=name,
        )
    for index, item in enumerate(value):
        check_number(f"{name}[{index}]", item, (float, None, 1000))


def _check_classes(section: Mapping[str, Any]) -> None:
    """Check what has to be told of the classes together."""
    number, positive = section.get("n_classes"), section.get("positive_class")
    if number is None and positive is None:
        raise InvalidInput(
            "Missing required parameter: 'classification.n_classes', or the "
            "'classification.positive_class' of two classes.",
            param="classification.n_classes",
            code="missing_required_parameter",
        )
    if positive is not None and (number or 2) > 2:
        raise InvalidInput(
            f"Invalid 'classification.positive_class': it is one of two classes, but 'n_classes' "
            f"is {number}.",
            param="classification.positive_class",
        )
    if section.get("betas") and positive is None:
        raise InvalidInput(
            "Invalid 'classification.betas': F-scores are of two classes; name their "
            "'positive_class'.",
            param="classification.betas",
        )


SECTIONS: dict[str, dict[str, Callable[[str, Any], None]]] = {
    "lora": {
        "r": _number(int, 1, 256),
        "alpha": _number(float, None, 1024),
        "dropout": _number(float, 0, 0.9),
        "lr_ratio": _number(float, 1, 64),
        "target_modules": _check_targets,
        "use_rslora": _check_switch,
    },
    "early_stopping": {
        "patience": _number(int, 1, 100),
        "min_delta": _number(float, 0, 100),
        "warmup_evals": _number(int, 0, 1000),
        "enabled": _check_switch,
    },
    "classification": {
        "n_classes": _number(int, 2, 1000),
        "positive_class": check_text,
        "betas": _check_betas,
    },
}
