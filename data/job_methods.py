"""The methods of fine-tuning jobs: what each takes, and which trainer does it.

Names and ranges are OpenAI's where it has them (`supervised`, `dpo`, `reinforcement`);
`reward_model`, `ppo` and `kto` are hone's. A hyperparameter that is "auto" becomes the default
here, written back to the job; those of supervised fine-tuning depend on the data and are resolved
by its trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.rows import Format

Rule = tuple[type, float | None, float]  # type, lowest (None: more than 0), highest

_COMMON: dict[str, Rule] = {
    "n_epochs": (int, 1, 50),
    "batch_size": (int, 1, 256),
    "learning_rate_multiplier": (float, None, 1000),
}
_EVALUATIONS: dict[str, Rule] = {"eval_interval": (int, 1, 10_000), "eval_samples": (int, 1, 1000)}
_PAIRS = (Format.PREFERENCE, Format.RANKING)
_PROMPTS = (
    *(Format.REINFORCEMENT, Format.PROMPT_ONLY, Format.CHAT, Format.PROMPT_COMPLETION),
    *(Format.PREFERENCE, Format.RANKING, Format.UNPAIRED),
)
_DATA_OPTIONS = {"lora", "from_checkpoint", "keep_checkpoints", "max_seq_length", "on_long"}
_JUDGED_OPTIONS = _DATA_OPTIONS | {"n_evals", "reward_model", "max_completion_tokens"}
_SAMPLING_OPTIONS = {"lora", "from_checkpoint", "keep_checkpoints", "max_completion_tokens"}
REWARD_MODEL = "reward_model"


@dataclass(frozen=True, slots=True)
class MethodRules:
    """What a method takes.

    Attributes:
        module: The trainer, started by `accelerate launch -m`.
        formats: Kinds of row of its files.
        options: hone's extensions that it uses.
        defaults: What "auto" becomes; empty where the trainer decides.
        learning_rate: Times `learning_rate_multiplier`; 0 where the trainer decides.
        graded: Whether it needs a grader.
    """

    module: str
    formats: tuple[Format, ...]
    hyperparameters: Mapping[str, Rule]
    options: frozenset[str]
    defaults: Mapping[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0
    graded: bool = False


METHODS: dict[str, MethodRules] = {
    "supervised": MethodRules(
        "train.sft",
        (Format.PROMPT_COMPLETION, Format.CHAT, Format.TEXT),
        _COMMON,
        frozenset(
            _DATA_OPTIONS
            | {"n_checkpoints", "n_evals", "early_stopping", "prompt_loss_weight", "classification"}
        ),
    ),
    "dpo": MethodRules(
        "rlhf.dpo",
        _PAIRS,
        _COMMON | {"beta": (float, None, 2)},
        frozenset(_JUDGED_OPTIONS),
        {"n_epochs": 1, "batch_size": 16, "learning_rate_multiplier": 1.0, "beta": 0.1},
        5e-5,
    ),
    "kto": MethodRules(
        "rlhf.kto",
        (Format.UNPAIRED, *_PAIRS),
        _COMMON | {"batch_size": (int, 2, 256), "beta": (float, None, 2)},
        frozenset(_JUDGED_OPTIONS),
        {"n_epochs": 1, "batch_size": 16, "learning_rate_multiplier": 1.0, "beta": 0.1},
        5e-5,
    ),
    REWARD_MODEL: MethodRules(
        "rlhf.reward",
        _PAIRS,
        _COMMON,
        frozenset(_DATA_OPTIONS | {"n_evals"}),
        {"n_epochs": 1, "batch_size": 32, "learning_rate_multiplier": 1.0},
        1e-4,
    ),
    "reinforcement": MethodRules(
        "rlhf.grpo",
        _PROMPTS,
        _COMMON
        | {
            "batch_size": (int, 4, 256),
            "compute_multiplier": (float, None, 10),
            **_EVALUATIONS,
        },
        frozenset(_SAMPLING_OPTIONS),
        {
            "n_epochs": 1,
            "batch_size": 32,
            "learning_rate_multiplier": 1.0,
            "compute_multiplier": 1.0,
            "eval_interval": 10,
            "eval_samples": 32,
        },
        5e-5,
        graded=True,
    ),
    "ppo": MethodRules(
        "rlhf.ppo",
        _PROMPTS,
        _COMMON
        | {
            "kl_coef": (float, 0, 10),
            **_EVALUATIONS,
        },
        frozenset(_SAMPLING_OPTIONS),
        {
            "n_epochs": 1,
            "batch_size": 64,
            "learning_rate_multiplier": 1.0,
            "kl_coef": 0.05,
            "eval_interval": 10,
            "eval_samples": 32,
        },
        3e-5,
        graded=True,
    ),
}


def score_models(grader: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parts of a grader that name a model."""
    if grader.get("type") == "multi":
        for part in (grader.get("graders") or {}).values():
            yield from score_models(part)
    elif grader.get("type") == "score_model":
        yield grader  # type: ignore[misc]


def unusable_rows(method: str, options: Mapping[str, Any], kind: Format | None) -> str | None:
    """Return why a job cannot learn from rows of a kind, None if it can."""
    rules = METHODS[method]
    if kind not in rules.formats:
        what = "supervised fine-tuning" if method == "supervised" else f"the method {method}"
        return f"are of the kind {kind}; {what} takes {', '.join(rules.formats)}."
    for name in ("prompt_loss_weight", "classification"):
        if options.get(name) and kind != Format.PROMPT_COMPLETION:
            return (
                f"are of the kind {kind}, but `{name}` needs {Format.PROMPT_COMPLETION} rows. "
                "Leave it out, or upload such rows."
            )
    return None
