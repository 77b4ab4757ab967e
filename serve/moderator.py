"""What judges texts in a running server: the classifier, the accounts' policies, and who is out.

Policies are read when the server starts, twice a second after that, and at once when this server
changes them; judging needs no database.
"""

from __future__ import annotations

from data import content, content_events
from data.content import Policy, Verdict
from data.db import Database
from data.moderation.classifier import Classifier

OFF = Policy()


class Moderator:
    """The policies of all accounts, and the classifier that serves them."""

    def __init__(self, database: Database, classifier: Classifier):
        self.classifier = classifier
        self._database = database
        self._policies: dict[str, Policy] = {}
        self._blocked: frozenset[tuple[str, str]] = frozenset()
        self.refresh()

    def refresh(self) -> None:
        """Read the policies again."""
        self._policies = content.all_policies(self._database)
        self._blocked = content_events.all_blocked(self._database)

    def policy(self, project_id: str) -> Policy:
        """Return an account's policy."""
        return self._policies.get(project_id, OFF)

    def is_blocked(self, project_id: str, identifier: str) -> bool:
        """Tell whether an end user of an account is shut out."""
        return (project_id, identifier[: content_events.MAX_IDENTIFIER]) in self._blocked

    def judge(self, text: str, policy: Policy = OFF) -> Verdict:
        """Judge a text."""
        return content.judge(text, policy, self.classifier)
