"""Which models an account may use, once read: a list of those allowed, or of those denied."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelRules:
    """The list of one account; without one, nothing is denied.

    Attributes:
        mode: `allow_list` or `deny_list`.
        entries: Names; each stands for all that lies below it, see `data.model_access`.
    """

    mode: str = "deny_list"
    entries: tuple[str, ...] = ()

    def permits(self, name: str, base_model: str | None = None) -> bool:
        """Tell whether a model may be used; give the base of a fine-tune."""
        listed = base_model in self.entries or any(
            name == entry or name.startswith(f"{entry}:") for entry in self.entries
        )
        return listed if self.mode == "allow_list" else not listed
