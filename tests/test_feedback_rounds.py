"""Rounds: what is held out, what a rule decides, and what becomes of a round, whatever happens.

Jobs are ended here by hand; `test_rounds_whole.py` has them trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_trainer
import pytest
from scipy.stats import binomtest
from sqlalchemy import select

from data import accounts, adapter_folders, audit, jobs, registry, webhooks
from data.db import Database
from data.errors import InvalidInput, NotFound, StateConflict
from data.feedback import (
    judgements,
    leases,
    projects,
    reports,
    round_rules,
    round_steps,
    rounds,
    tasks,
)
from data.feedback.judgements import Answer
from data.feedback.projects import ProjectSpec
from data.feedback.round_rules import Rule
from data.feedback.rounds import RoundSpec
from data.feedback.tasks import CandidateSpec, TaskSpec
from data.files import FileStore
from data.settings import Limits
from data.tables import Job, Project
from data.tables_feedback import LabelRound, LabelTask
from data.tables_jobs import WebhookDelivery

BASE = "tiny"
OTHERS = {"b@example.org"}


class Shop:
    """A database with one account, of whose labeling project every task is judged."""

    def __init__(self, home: Path, num_tasks: int = 40):
        self.home = home
        self.database = Database(f"sqlite:///{home / 'hone.db'}")
        self.database.migrate()
        self.files = FileStore(self.database, str(home / "files"))
        self.project: Project = accounts.create_account(self.database, "acme")[0]
        spec = ProjectSpec("p", "pairwise", guidelines="Be kind.")
        self.labeling = projects.create(self.database, self.project.id, spec).id
        pairs = [CandidateSpec("good", "m1"), CandidateSpec("bad", "m2")]
        given = [TaskSpec(f"question {i}", pairs) for i in range(num_tasks)]
        tasks.add(self.database, self.project.id, self.labeling, given)
        self.judge(self.labeling, lambda text: text == "good")

    def start(self, **fields: Any) -> LabelRound:
        spec = RoundSpec(**({"label_project_id": self.labeling, "model": BASE} | fields))
        return rounds.start(self.database, self.files, self.project.id, spec, [BASE])

    def publish(self, suffix: str, rank: int = 4, **lineage: Any) -> str:
        folder = self.home / f"made-{suffix}-{rank}"
        fake_trainer.write_adapter(folder, rank)
        given = (self.database, self.home / "adapters", self.project, folder)
        fingerprint = fake_trainer.FINGERPRINT
        return registry.publish(*given, BASE, fingerprint, suffix=suffix, lineage=lineage).name

    def end_job(self, job_id: str | None, status: str = "succeeded") -> str | None:
        """Do what the worker does at a job's end; returns the new version's name."""
        name = None
        with self.database.write() as session:
            job = session.get_one(Job, str(job_id))
            deciding = round_steps.decides(session, job)
            if status == "succeeded":
                folder = self.home / f"of-{job.id}"
                fake_trainer.write_adapter(folder)
                staged = adapter_folders.stage(
                    self.home / "adapters", folder, fake_trainer.FINGERPRINT
                )
                version = registry.record(
                    session,
                    session.get_one(Project, job.project_id),
                    staged,
                    BASE,
                    fake_trainer.FINGERPRINT,
                    suffix=job.suffix,
                    job_id=job.id,
                    lineage={"kind": job.method["type"]},
                )
                if deciding is None:
                    registry.point_alias(session, version)
                name = job.fine_tuned_model = version.name
            else:
                job.error = {"message": "it broke", "code": "x", "param": None}
            job.status = status
        return name

    def step(self, found: LabelRound) -> LabelRound:
        round_steps.advance(self.database, self.get(found), [BASE], Limits())
        return self.get(found)

    def get(self, found: LabelRound) -> LabelRound:
        return rounds.get(self.database, self.project.id, found.id)

    def trained(self, **fields: Any) -> LabelRound:
        """A round whose job has succeeded."""
        found = self.step(self.start(**fields))
        self.end_job(found.policy_job_id)
        return self.step(found)

    def compared(self, found: LabelRound, same: int = 0) -> LabelRound:
        """Give the models' answers, of which some do not differ."""
        old = ["old"] * len(found.prompts)
        new = ["old"] * same + ["new"] * (len(old) - same)
        round_steps.compare(self.database, found, old, new)
        return self.get(found)

    def judge(self, label_project: str | None, is_good: Any, limit: int = 1000) -> None:
        given = (self.database, self.project.id)
        for number in range(limit):
            shown = leases.next_task(*given, str(label_project), "ann")
            if shown is None:
                return
            choice = next((o.key for o in shown.options if is_good(o.text)), None)
            answer = Answer(choice=choice or ("tie" if number % 2 else "both_bad"))
            judgements.submit(*given, shown.assignment_id, "ann", answer)

    def alias(self, suffix: str) -> str | None:
        name = registry.alias_name(BASE, self.project.slug, suffix)
        found = {a.name: a.version_id for a in registry.list_aliases(*self.account)}
        versions = {v.id: v.name for v in registry.list_versions(*self.account)}
        return versions[found[name]] if name in found else None

    @property
    def account(self) -> tuple[Database, str]:
        return self.database, self.project.id


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


# ---- what is held out, and what a rule decides ----


def test_prompts_held_out_are_in_no_row_that_is_learned(shop: Shop) -> None:
    found = shop.start(comparisons=7, seed=3)
    with shop.files.open(shop.project.id, found.training_file) as stream:
        learned = {json.loads(line)["prompt"] for line in stream}
    with shop.files.open(shop.project.id, found.file_id) as stream:
        everything = {json.loads(line)["prompt"] for line in stream}
    assert len(found.prompts) == 7
    assert learned.isdisjoint(found.prompts)
    assert learned | set(found.prompts) == everything == {f"question {i}" for i in range(40)}
    again = shop.start(comparisons=7, seed=3)
    assert again.prompts == found.prompts
    assert shop.start(comparisons=7, seed=4).prompts != found.prompts


def test_at_most_a_quarter_of_the_prompts_is_held_out() -> None:
    rows = [{"prompt": f"q {i % 8}", "n": i} for i in range(16)]
    held, kept = round_rules.hold_out(rows, 50, seed=0)
    assert len(held) == 2
    assert len(kept) == 12  # both rows of a prompt go
    with pytest.raises(InvalidInput, match=r"concern 3 prompts; a round needs at least 4"):
        round_rules.hold_out(rows[:3], 50, seed=0)


@pytest.mark.parametrize(
    ("rule", "points", "same", "promotes"),
    [
        (Rule(), [1] * 6 + [0] * 4, 0, True),
        (Rule(), [1] * 4 + [0] * 6, 0, False),
        (Rule(), [1] * 5 + [0] * 5, 0, True),
        (Rule(), [1] * 9, 0, False),  # too few
        (Rule(min_judgements=9), [1] * 9, 0, True),
        (Rule(), [0.5] * 10, 0, True),
        (Rule(min_win_rate=0.6), [1] * 7 + [0] * 3, 10, True),  # (7 + 5) / 20
        (Rule(min_win_rate=0.61), [1] * 7 + [0] * 3, 10, False),
        (Rule(certain=True), [1] * 7 + [0] * 3, 0, False),
        (Rule(certain=True), [1] * 9 + [0] * 1, 0, True),
        (Rule(), [], 0, False),
    ],
)
def test_rules(rule: Rule, points: list[float], same: int, promotes: bool) -> None:
    told = round_rules.verdict(rule, points, same)
    assert told["promote"] is promotes
    assert told["reasons"]
    count = len(points) + same
    won = sum(points) + same / 2
    assert told["win_rate"] == (pytest.approx(won / count) if count else 0)
    if won == int(won) and count:
        expected = binomtest(int(won), count).proportion_ci(method="wilson")
        assert told["win_rate_interval"] == pytest.approx([expected.low, expected.high], abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "sft"}, "Invalid 'method': 'sft'; expected dpo or ppo."),
        ({"comparisons": 0}, "Invalid 'comparisons': 0; expected 1 to 1000."),
        ({"rule": Rule(min_win_rate=1.5)}, "Invalid 'rule.min_win_rate': 1.5; expected 0 to 1."),
        ({"rule": Rule(min_judgements=0)}, "Invalid 'rule.min_judgements': 0"),
        ({"model": "gpt-5"}, "The model `gpt-5` cannot be improved here. Available: `tiny`"),
        ({"hyperparameters": {"ppo": {}}}, "this round has jobs of dpo"),
        ({"hyperparameters": {"dpo": {"beta": 9}}}, "beta"),
        ({"hyperparameters": {"dpo": {"batch": 9}}}, "batch"),
    ],
)
def test_what_is_refused_makes_nothing(shop: Shop, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        shop.start(**fields)
    assert said in caught.value.message
    assert rounds.list_all(*shop.account) == []
    assert jobs.list_jobs(*shop.account)[0] == []
    assert shop.files.list(shop.project.id)[0] == []


def test_reward_models_are_not_improved(shop: Shop) -> None:
    judge = shop.publish("judge", kind="reward_model")
    mine = shop.publish("mine")
    assert rounds.improvable(*shop.account) == [registry.alias_of(mine)]
    with pytest.raises(InvalidInput, match="is a reward model"):
        shop.start(model=judge)
    with pytest.raises(InvalidInput, match="its suffix is 'mine'"):
        shop.start(model=mine, suffix="other")


def test_a_project_without_comparisons(shop: Shop) -> None:
    spec = ProjectSpec("thumbs", "thumbs")
    other = projects.create(*shop.account, spec).id
    with pytest.raises(InvalidInput, match="makes no preference rows"):
        shop.start(label_project_id=other)
    with pytest.raises(NotFound):
        shop.start(label_project_id="lproj-none")


# ---- the way of a round ----


def test_a_round_that_promotes(shop: Shop) -> None:
    old = shop.publish("mail")
    found = shop.start(model=registry.alias_of(old), comparisons=10)
    assert (found.status, found.model) == ("training", old)
    found = shop.step(found)
    assert shop.step(found).policy_job_id == found.policy_job_id  # one job, however often asked
    job = jobs.get(*shop.account, str(found.policy_job_id))
    assert (job.model, job.training_file) == (old, found.training_file)
    assert job.method["type"] == "dpo"

    new = shop.end_job(job.id)
    assert shop.alias("mail") == old  # the round decides, not the job
    found = shop.step(found)
    assert (found.status, found.candidate) == ("sampling", new)
    found = shop.compared(found, same=2)
    assert found.status == "comparing"
    comparison = projects.get(*shop.account, str(found.comparison_id))
    assert (comparison.kind, comparison.tasks_added) == ("pairwise", 8)
    assert projects.guidelines(*shop.account, comparison.id)[1] == "Be kind."

    events = ["label_round.promoted"]
    webhooks.create(*shop.account, "me", "https://93.184.216.34/", events)
    shop.judge(comparison.id, lambda text: text == "new", limit=7)
    assert shop.step(found).status == "comparing"  # one is not judged yet
    rule = Rule(min_judgements=8)
    with shop.database.write() as session:
        session.get_one(LabelRound, found.id).rule = {"min_judgements": 8, "min_win_rate": 0.9}
    shop.judge(comparison.id, lambda text: text == "new")
    found = shop.step(found)
    assert found.decision is not None
    assert found.decision["win_rate"] == pytest.approx((8 + 1) / 10)
    assert found.decision["judgements"] == rule.min_judgements
    assert (found.status, shop.alias("mail")) == ("promoted", new)
    assert shop.step(found).status == "promoted"
    found_entries, _ = audit.entries(shop.database, audit.Filter(), 100)
    actions = [entry.type for entry in found_entries]
    assert {"label_round.started", "label_round.promoted"} <= set(actions)
    with shop.database.read() as session:
        [event] = session.scalars(select(WebhookDelivery)).all()
    assert (event.event_type, json.loads(event.body)["data"]) == (events[0], {"id": found.id})
    assert registry.rollback(*shop.account, registry.alias_of(old)).name == old


def test_labelers_see_no_model_and_either_order(shop: Shop) -> None:
    found = shop.compared(shop.trained(comparisons=10))
    firsts = set()
    for labeler in "abcdefgh":
        shown = leases.next_task(*shop.account, str(found.comparison_id), labeler)
        assert shown is not None
        assert str(found.candidate) not in repr(shown)
        firsts.add(shown.options[0].text)
    assert firsts == {"old", "new"}


def test_a_round_that_rejects(shop: Shop) -> None:
    found = shop.compared(shop.trained(comparisons=10, suffix="mail"))
    shop.judge(found.comparison_id, lambda text: text == "old")
    found = shop.step(found)
    assert found.status == "rejected"
    assert found.decision is not None
    assert found.decision["reasons"][0].startswith("win rate 0.0%")
    assert shop.alias("mail") is None  # nothing was in use, and nothing is
    assert registry.resolve(*shop.account, str(found.candidate))  # it can still be tried


def test_ties_and_both_bad_are_half_a_win(shop: Shop) -> None:
    found = shop.compared(shop.trained(comparisons=10))
    shop.judge(found.comparison_id, lambda text: False)
    found = shop.step(found)
    assert found.decision is not None
    assert (found.decision["win_rate"], found.status) == (0.5, "promoted")


def test_what_a_reviewer_settled_counts(shop: Shop) -> None:
    found = shop.compared(shop.trained(comparisons=10))
    shop.judge(found.comparison_id, lambda text: text == "old")
    with shop.database.read() as session:
        mine = session.query(LabelTask).filter_by(label_project_id=found.comparison_id).all()
    for task in mine[:6]:
        answer = {"choice": "B"}  # by position: the new model's
        tasks.settle(*shop.account, task.id, "rev", answer)
    found = shop.step(found)
    assert found.decision is not None
    assert (found.decision["win_rate"], found.status) == (0.6, "promoted")


def test_the_same_answers_to_all_prompts_reject(shop: Shop) -> None:
    found = shop.trained(comparisons=10)
    found = shop.compared(found, same=10)
    assert (found.status, found.comparison_id) == ("rejected", None)
    assert found.decision == {"reasons": ["both models gave the same answers"], "same": 10}


def test_another_model_came_into_use_meanwhile(shop: Shop) -> None:
    old = shop.publish("mail")
    found = shop.compared(shop.trained(model=old, comparisons=10))
    other = shop.publish("mail", rank=8)
    shop.judge(found.comparison_id, lambda text: text == "new")
    found = shop.step(found)
    assert found.decision is not None
    assert (found.status, shop.alias("mail")) == ("rejected", other)
    assert found.decision["reasons"] == [
        f"the model in use is {other} now, with which nothing was compared"
    ]


def test_ppo_trains_a_judge_first(shop: Shop) -> None:
    found = shop.step(shop.start(method="ppo", suffix="mail", comparisons=10))
    assert (found.status, found.policy_job_id) == ("training_reward", None)
    judge_job = jobs.get(*shop.account, str(found.reward_job_id))
    assert (judge_job.method["type"], judge_job.suffix) == ("reward_model", "mail-judge")
    judge = shop.end_job(judge_job.id)
    found = shop.step(shop.step(found))
    policy_job = jobs.get(*shop.account, str(found.policy_job_id))
    assert policy_job.method["ppo"]["grader"]["model"] == judge
    assert shop.alias("mail-judge") == judge
    new = shop.end_job(policy_job.id)
    assert shop.step(found).candidate == new
    assert shop.alias("mail") is None


# ---- what goes wrong ----


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_job_that_does_not_succeed_fails_the_round(shop: Shop, status: str) -> None:
    found = shop.step(shop.start())
    shop.end_job(found.policy_job_id, status)
    found = shop.step(found)
    assert found.status == "failed"
    assert str(found.policy_job_id) in str(found.error)
    assert "it broke" in str(found.error)


def test_a_job_that_was_made_before_a_crash_is_found_again(shop: Shop) -> None:
    found = shop.start()
    shop.step(found)
    with shop.database.write() as session:
        session.get_one(LabelRound, found.id).policy_job_id = None  # it died before this
    shop.step(found)
    [job] = jobs.list_jobs(*shop.account)[0]
    shop.end_job(job.id)
    found = shop.step(found)
    assert (found.status, found.policy_job_id) == ("sampling", job.id)


def test_a_comparison_that_was_made_before_a_crash_is_found_again(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shop.trained(comparisons=10)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place, name in ((tasks, "add"), (rounds, "move")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, die)
            with pytest.raises(KeyboardInterrupt):
                shop.compared(found)
    found = shop.compared(found)
    assert found.status == "comparing"
    assert len(projects.list_all(*shop.account)) == 2
    assert reports.progress(*shop.account, str(found.comparison_id)).tasks == 10


def test_two_servers_do_not_sample_the_same_round(shop: Shop) -> None:
    found = shop.trained()
    assert round_steps.lease(shop.database, found, 100)
    assert not round_steps.lease(shop.database, found, 100)
    round_steps.lease(shop.database, found, 0)
    assert round_steps.lease(shop.database, found, 100)


def test_a_full_account_waits(shop: Shop) -> None:
    found = shop.start()
    limits = Limits(concurrent_jobs=0)
    round_steps.advance(shop.database, found, [BASE], limits)
    assert (shop.get(found).status, shop.get(found).policy_job_id) == ("training", None)
    assert shop.step(found).policy_job_id is not None


def test_cancel_ends_the_job_too(shop: Shop) -> None:
    found = shop.step(shop.start(suffix="mail"))
    assert rounds.cancel(*shop.account, found.id).status == "cancelled"
    job = jobs.get(*shop.account, str(found.policy_job_id))
    assert job.status == "cancelled"
    with pytest.raises(StateConflict, match="has ended already"):
        rounds.cancel(*shop.account, found.id)
    assert shop.step(found).status == "cancelled"
    assert rounds.under_way(shop.database) == []


def test_a_cancelled_round_takes_no_answers(shop: Shop) -> None:
    found = shop.trained()
    rounds.cancel(*shop.account, found.id)
    assert shop.compared(found).status == "cancelled"


def test_rounds_of_another_account_are_absent(shop: Shop) -> None:
    found = shop.start()
    other = accounts.create_account(shop.database, "other")[0].id
    assert rounds.list_all(shop.database, other) == []
    for ask in (rounds.get, rounds.cancel):
        with pytest.raises(NotFound, match="No such round"):
            ask(shop.database, other, found.id)
    [own] = rounds.list_all(*shop.account, shop.labeling)
    assert own.id == found.id


def test_a_job_that_names_a_round_of_others_is_not_held_back(shop: Shop) -> None:
    found = shop.step(shop.start())
    other = accounts.create_account(shop.database, "other")[0].id
    with shop.database.write() as session:
        job = session.get_one(Job, str(found.policy_job_id))
        assert round_steps.decides(session, job) is not None
        session.expunge(job)
        job.project_id = other
        assert round_steps.decides(session, job) is None
