"""What a client may ask of a fine-tuning job, checked before anything is stored.

Ranges and names are those of OpenAI's API; `options` are hone's extensions. Every value is either
used or refused: a setting that would be ignored is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data.errors import InvalidInput
from data.job_checks import check_choice, check_keys, check_number, check_text, unknown
from data.job_methods import METHODS, MethodRules, Rule
from data.job_sections import SECTIONS, check_section

AUTO = "auto"
MAX_SEED = 2**31 - 1
MAX_METADATA = 16
SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
# name: (type, lowest, highest); a lowest of None means "more than zero"
OPTIONS: dict[str, Rule] = {
    "max_seq_length": (int, 8, 1 << 20),
    "max_completion_tokens": (int, 1, 1 << 16),
    "n_checkpoints": (int, 1, 100),
    "n_evals": (int, 1, 1000),
    "keep_checkpoints": (int, 1, 100),
    "prompt_loss_weight": (float, 0, 1),
}
TEXTS = ("from_checkpoint", "reward_model")


def auto_epochs(num_rows: int) -> int:
    """Return the passes over the data that "auto" becomes: the fewer, the more rows there are."""
    limits = ((100, 10), (500, 8), (2000, 5), (20_000, 3), (50_000, 2))
    return next((epochs for limit, epochs in limits if num_rows < limit), 1)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A request for a fine-tuning job; the constructor raises InvalidInput naming the field."""

    model: str
    training_file: str
    validation_file: str | None = None
    method: Mapping[str, Any] | None = None
    hyperparameters: Mapping[str, Any] | None = None  # the older place, beside `method`
    suffix: str | None = None
    seed: int | None = None
    metadata: Mapping[str, str] | None = None
    integrations: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.resolved_hyperparameters()
        self._check_names()
        for name, value in self.options.items():
            if name in SECTIONS:
                check_section(name, value)
            elif name == "on_long":
                check_choice(name, value, ("truncate", "error", "drop"))
            elif name in OPTIONS:
                check_number(name, value, OPTIONS[name])
            elif name in TEXTS:
                check_text(name, value)
            else:
                raise unknown(name, name, [*OPTIONS, *SECTIONS, *TEXTS, "on_long"])
        self._check_method_options()
        self._check_evaluations()
        self._check_integrations()

    @property
    def method_type(self) -> str:
        return str((self.method or {}).get("type", "supervised"))

    @property
    def rules(self) -> MethodRules:
        """What the method takes."""
        return METHODS[self.method_type]

    @property
    def grader(self) -> dict[str, Any] | None:
        """What judges the answers of a method that samples."""
        section = (self.method or {}).get(self.method_type) or {}
        found = section.get("grader")
        return None if found is None else dict(found)

    def resolved_hyperparameters(self) -> dict[str, Any]:
        """Return every hyperparameter, "auto" where the client left it open."""
        check_choice("method.type", self.method_type, tuple(METHODS))
        rules = self.rules
        section = (self.method or {}).get(self.method_type) or {}
        check_keys("method", self.method or {}, ("type", self.method_type))
        known = ("hyperparameters", "grader") if rules.graded else ("hyperparameters",)
        check_keys(f"method.{self.method_type}", section, known)
        if rules.graded and not section.get("grader"):
            raise InvalidInput(
                f"Missing required parameter: 'method.{self.method_type}.grader': it says what a "
                "good answer is.",
                param=f"method.{self.method_type}.grader",
                code="missing_required_parameter",
            )
        nested = section.get("hyperparameters") or {}
        if nested and self.hyperparameters:
            raise InvalidInput(
                "Give hyperparameters in `method` or at the top level, not in both.",
                param="hyperparameters",
            )
        place = f"method.{self.method_type}.hyperparameters" if nested else "hyperparameters"
        asked = {**nested, **(self.hyperparameters or {})}
        for name, value in asked.items():
            if name == "reasoning_effort" and self.method_type == "reinforcement":
                _check_effort(f"{place}.{name}", value)
                continue
            if name not in rules.hyperparameters:
                raise unknown(f"{place}.{name}", name, list(rules.hyperparameters))
            if value is not None and value != AUTO:
                check_number(f"{place}.{name}", value, rules.hyperparameters[name])
        return {
            name: AUTO if asked.get(name) is None else asked[name] for name in rules.hyperparameters
        }

    def _check_method_options(self) -> None:
        for name in self.options:
            if name not in self.rules.options:
                raise InvalidInput(
                    f"Unsupported parameter: '{name}' is not used by the method "
                    f"'{self.method_type}'. It takes {', '.join(sorted(self.rules.options))}.",
                    param=name,
                    code="unsupported_parameter",
                )
        lora = self.options.get("lora")
        if self.method_type == "supervised" or not isinstance(lora, Mapping):
            return
        for name in ("lr_ratio", "dropout"):
            if lora.get(name):
                raise InvalidInput(
                    f"Unsupported parameter: 'lora.{name}' is used by supervised fine-tuning only, "
                    f"not by the method '{self.method_type}'.",
                    param=f"lora.{name}",
                    code="unsupported_parameter",
                )

    def _check_evaluations(self) -> None:
        early = self.options.get("early_stopping")
        if early and early.get("enabled", True) and "n_checkpoints" in self.options:
            raise InvalidInput(
                "Invalid 'n_checkpoints': a job that may stop early makes a checkpoint at every "
                "evaluation; set 'n_evals' instead.",
                param="n_checkpoints",
            )
        if self.validation_file is not None:
            return
        stopping = self.options.get("early_stopping")
        wanted = [name for name in ("classification", "n_evals") if name in self.options]
        wanted += ["early_stopping"] if stopping and stopping.get("enabled", True) else []
        if wanted:
            raise InvalidInput(
                f"Invalid '{wanted[0]}': it needs a `validation_file` to evaluate on.",
                param=wanted[0],
            )

    def _check_integrations(self) -> None:
        for index, item in enumerate(self.integrations):
            for name in (item.get("wandb") or {}).keys() - {"project", "name"}:
                if item["wandb"][name]:
                    raise InvalidInput(
                        f"Unsupported parameter: 'integrations[{index}].wandb.{name}'. A run is "
                        "logged with `project` and `name` only.",
                        param=f"integrations[{index}].wandb.{name}",
                        code="unsupported_parameter",
                    )

    def _check_names(self) -> None:
        if self.suffix is not None:
            check_suffix(self.suffix)
        if self.seed is not None:
            check_number("seed", self.seed, (int, 0, MAX_SEED))
        metadata = self.metadata or {}
        if len(metadata) > MAX_METADATA:
            raise InvalidInput(
                f"Invalid 'metadata': {len(metadata)} pairs; at most {MAX_METADATA} are kept.",
                param="metadata",
            )
        for key, value in metadata.items():
            if len(key) > 64 or not isinstance(value, str) or len(value) > 512:
                raise InvalidInput(
                    f"Invalid 'metadata.{key[:64]}': keys are strings of at most 64 characters, "
                    "values strings of at most 512.",
                    param=f"metadata.{key[:64]}",
                )


def _check_effort(name: str, value: Any) -> None:
    if value not in (None, "default"):
        raise InvalidInput(
            f"Unsupported value: {value!r} for '{name}': the models that are trained here do not "
            "reason before they answer. Leave it out.",
            param=name,
            code="unsupported_parameter",
        )


def check_suffix(suffix: Any) -> None:
    """Raise InvalidInput unless a suffix can be a part of a model's name."""
    if not isinstance(suffix, str) or not SUFFIX.fullmatch(suffix):
        raise InvalidInput(
            f"Invalid 'suffix': {suffix!r}. Give 1 to 64 letters, digits, '.', '_' or '-': it "
            "becomes a part of the model's name.",
            param="suffix",
        )
