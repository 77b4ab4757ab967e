"""One request's texts on their way in and out, under its account's content policy.

Input is judged before the engine sees it. Under `block`, output is held back until a sentence is
whole; then the text so far is judged, and only text that has passed is let out, tokens and
log-probabilities with it. When it breaks the policy, the sequence ends with the finish reason
`content_filter` and what was held back never leaves.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from data import content_events
from data.content import Policy, Side, Verdict
from data.errors import ContentBlocked, EndUserBlocked
from serve.api.generation import Generation
from serve.api.moderation_shapes import check_model, moderation_result
from serve.api.schemas import ModeratedFields
from serve.engine.base import Delta
from serve.runtime import Runtime

FINISH_FILTER = "content_filter"
SENTENCE_END = re.compile(r"[.!?…][\"')\]]*\s|[。！？]|\n")
LONG = 400  # characters held back after which any white space ends a sentence
WINDOW = 2000  # characters that are judged at the end of each sentence; at the end, all of them


@dataclass(frozen=True, slots=True)
class Withheld(Delta):
    """The last delta of a sequence that broke the policy; `hidden` tokens are not told."""

    hidden: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens to bill."""
        return self.hidden


@dataclass(slots=True)
class _Held:
    """What is known of one sequence."""

    text: str = ""
    passed: int = 0  # characters that were judged and let out
    pending: list[tuple[int, Delta]] = field(default_factory=list)  # where each ends in the text
    broken: bool = False
    hidden: int = 0

    def boundary(self) -> int:
        """Return where the last whole sentence ends, or 0 when none is new."""
        ends = [match.end() for match in SENTENCE_END.finditer(self.text, self.passed)]
        if ends:
            return ends[-1]
        if len(self.text) - self.passed > LONG:
            return max(0, self.text.rfind(" ", self.passed) + 1)
        return 0

    def recent(self, end: int) -> str:
        """Return the last `WINDOW` characters before a place, from the start of a word on."""
        start = max(0, end - WINDOW)
        return self.text[self.text.find(" ", start, end) + 1 if start else 0 : end]


class Screening:
    """Judges the texts of one request; a `serve.api.generation.Screen`."""

    def __init__(self, runtime: Runtime, request: Request, account: str, body: Any, model: str):
        self._runtime = runtime
        self._account = account
        self._model = model
        self._request_id: str = request.state.request_id
        self._wanted = body.moderation if isinstance(body, ModeratedFields) else None
        if self._wanted is not None:
            check_model(self._wanted.model, runtime.moderator.classifier.name, "moderation.model")
        identifier = getattr(body, "safety_identifier", None)
        self._end_user: str | None = identifier or body.user
        self.policy: Policy = runtime.moderator.policy(account).tightened(**_modes(self._wanted))
        self._seen: dict[Side, list[Verdict]] = {"input": [], "output": []}
        self._held: defaultdict[int, _Held] = defaultdict(_Held)

    @property
    def sees_output(self) -> bool:
        """Whether it has to see what is generated."""
        return self.policy.output != "off"

    async def admit(self, texts: Sequence[str], param: str) -> None:
        """Judge what goes in.

        Raises:
            EndUserBlocked: The end user is shut out.
            ContentBlocked: A text breaks the policy, which blocks.
        """
        moderator = self._runtime.moderator
        for name in {self._end_user} - {None, ""}:
            if moderator.is_blocked(self._account, str(name)):
                raise EndUserBlocked(
                    "This end user is blocked because of earlier texts; the account's owner may "
                    "ask the server's operator to lift it.",
                    param="safety_identifier",
                )
        if self.policy.input == "off":
            return
        matched: dict[str, None] = {}
        for text in texts:
            verdict = await self._judge("input", text)
            matched |= dict.fromkeys(verdict.matched)
        if matched:
            await self._note("input", list(matched))
            if self.policy.input == "block":
                raise ContentBlocked(list(matched), param=param)

    async def take(self, generation: Generation, index: int, delta: Delta) -> Sequence[Delta]:
        """Return what may leave of a sequence, now that the engine tells more of it."""
        if self.policy.output == "off":
            return [delta]
        held = self._held[index]
        held.text += delta.text
        if self.policy.output == "score":
            if delta.finish_reason is not None:
                verdict = await self._judge("output", held.text)
                if verdict.matched:
                    await self._note("output", verdict.matched)
            return [delta]
        held.pending.append((len(held.text), delta))
        if held.broken:
            held.hidden += len(delta.token_ids)
            return [] if delta.finish_reason is None else [_withheld(held)]
        ended = delta.finish_reason is not None
        end = len(held.text) if ended else held.boundary()
        if not ended and end <= held.passed:
            return []
        shown = held.text if ended else held.recent(end)
        verdict = await self._judge("output", shown, keep=ended)
        if not verdict.matched:
            held.passed = end
            free = [one for place, one in held.pending if place <= end]
            del held.pending[: len(free)]
            return free
        if not ended:
            self._seen["output"].append(verdict)
        held.broken = True
        held.hidden = sum(len(one.token_ids) for _, one in held.pending)
        await self._note("output", verdict.matched)
        if ended:
            return [_withheld(held)]
        generation.stop(index)
        return []

    def results(self) -> dict[str, Any]:
        """Return the `moderation` field of the answer, if the request asked for it."""
        if self._wanted is None:
            return {}
        classifier = self._runtime.moderator.classifier
        told: dict[str, Any] = {}
        for side, seen in self._seen.items():
            told[side] = {
                "type": "moderation_results",
                "model": classifier.name,
                "results": [
                    {"type": "moderation_result", "model": classifier.name}
                    | moderation_result(verdict)
                    for verdict in seen
                ],
            }
        return {"moderation": told}

    async def _judge(self, side: Side, text: str, *, keep: bool = True) -> Verdict:
        verdict = await run_in_threadpool(self._runtime.moderator.judge, text, self.policy)
        if keep:
            self._seen[side].append(verdict)
        return verdict

    async def _note(self, side: Side, matched: Sequence[str]) -> None:
        await run_in_threadpool(
            lambda: content_events.note(
                self._runtime.database,
                self._account,
                self.policy,
                side,
                matched,
                end_user=self._end_user,
                model=self._model,
                request_id=self._request_id,
            )
        )
        if self.policy.block_user_after:
            await run_in_threadpool(self._runtime.moderator.refresh)


def _modes(wanted: Any) -> dict[str, Any]:
    if wanted is None:
        return {}
    asked = {"input": "score", "output": "score"}
    for side in asked:
        own = getattr(wanted.policy, side, None)
        if own is not None:
            asked[side] = own.mode
    return asked


def _withheld(held: _Held) -> Withheld:
    _, last = held.pending[-1]
    told = [one.prompt_logprobs for _, one in held.pending if one.prompt_logprobs is not None]
    return Withheld(
        last.request_id,
        prompt_logprobs=told[0] if told else None,
        finish_reason=FINISH_FILTER,
        num_cached=last.num_cached,
        hidden=held.hidden,
    )
