"""Every error that hone raises on purpose.

A message says what was wrong, where, the value got, and the fix. Each class also inherits the
standard-library class that it refines, so callers may catch either, and stays picklable. The HTTP
status of each class is decided in one place, `serve/api/errors.py`; `code` and `param` are the
fields of the OpenAI error envelope.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ToolkitError(Exception):
    """Base of all errors of hone.

    Args:
        message: One or more sentences for the person who can fix it.
        param: The request field or config key at fault, as a dotted path.
        code: A stable machine-readable name of the condition.
    """

    code: str | None = None
    kind: str | None = None  # the envelope's `type`, where the HTTP status does not tell it

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    @property
    def public(self) -> str:
        """The message for a customer, who must not learn of the server's folders."""
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, dict(self.__dict__))


def _rebuild(cls: type[ToolkitError], message: str, state: dict[str, Any]) -> ToolkitError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class InvalidInput(ToolkitError, ValueError):
    """A value that a person or client gave is wrong."""

    code = "invalid_value"


class ConfigError(InvalidInput):
    """A configuration is wrong; `problems` holds every finding, not only the first."""

    code = "invalid_config"

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        listed = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"The configuration has {count}:\n{listed}")


class DataError(InvalidInput):
    """A dataset is unusable; `lines` holds one dict a bad line: line, column, code, message."""

    code = "invalid_file_format"

    def __init__(
        self,
        message: str,
        *,
        lines: Sequence[dict[str, Any]] = (),
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message, param=param, code=code)
        self.lines = list(lines)


class NotFound(ToolkitError, KeyError):
    """An object is absent, or belongs to another account: the two must not be told apart."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class ModelNotFound(NotFound):
    """A model name that this account cannot use."""

    code = "model_not_found"

    def __init__(self, name: str):
        super().__init__(
            f"The model `{name}` does not exist or you do not have access to it.", param="model"
        )


class StateConflict(ToolkitError, RuntimeError):
    """The object is in a state in which the call makes no sense."""

    code = "invalid_state"


class Unauthorized(ToolkitError, PermissionError):
    """The key is missing, unknown, revoked or expired."""

    code = "invalid_api_key"

    def __str__(self) -> str:
        return self.message


class Forbidden(Unauthorized):
    """The key is good but may not do this."""

    code = "insufficient_permissions"


class ContentBlocked(InvalidInput):
    """A text breaks the content policy of its account."""

    code = "content_policy_violation"

    def __init__(self, matched: Sequence[str], param: str | None = None):
        self.matched = list(matched)
        super().__init__(
            "Your request was rejected as a result of the safety system: the text breaks the "
            f"content policy ({', '.join(matched)}). Change the text and try again.",
            param=param,
        )


class EndUserBlocked(Forbidden):
    """An end user of an account is shut out."""

    code = "safety_identifier_blocked"


class ContextTooLong(InvalidInput):
    """Prompt plus requested tokens do not fit in the model's context."""

    code = "context_length_exceeded"


class AdapterRefused(ToolkitError, ValueError):
    """An adapter failed a check at publish or load; `code` names the check."""

    code = "adapter_refused"

    @property
    def public(self) -> str:
        return (
            f"The files of the adapter failed a check ({self.code}), so it is not served. Train it "
            "again; the server's operator finds the particulars in the log."
        )


class ModelUnavailable(ToolkitError, RuntimeError):
    """A base model could not be fetched or read; the message says what to do."""

    code = "model_unavailable"


class Overloaded(ToolkitError, RuntimeError):
    """No room now; the same request may succeed after `retry_after_s` seconds."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1, code: str | None = None):
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class RateLimited(ToolkitError, RuntimeError):
    """Too much in too short a time; `retry_after_s` is None where waiting does not help."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, kind: str, retry_after_s: int | None = None):
        super().__init__(message)
        self.kind = kind  # requests, tokens
        self.retry_after_s = retry_after_s


class QuotaExceeded(ToolkitError, RuntimeError):
    """The account has used up, or holds, all that it may."""

    code = "insufficient_quota"
    kind = "insufficient_quota"


class IdempotencyMismatch(InvalidInput):
    """A key that names one call was sent with another."""

    code = None  # type: ignore[assignment]
    kind = "idempotency_error"


class DeadlineExceeded(ToolkitError, TimeoutError):
    """A request took longer than it may."""

    code = "deadline_exceeded"


class EngineFailure(ToolkitError, RuntimeError):
    """The engine could not finish a request through no fault of the client."""

    code = "internal_error"


class TrainingFailed(ToolkitError, RuntimeError):
    """A training run cannot go on; `code` becomes the job's error code."""

    code = "training_failed"
