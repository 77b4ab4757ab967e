"""From a model's name to what the engine runs: alias -> version -> adapter on disk.

The name is looked up for each request, so a request binds to one version at admission and a
promoted alias serves the next request, with no restart and no cache to go stale. Before a version's
files are first used, and again whenever they changed on disk, their digest is checked.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from data import adapter_folders, model_access, registry
from data.db import Database
from data.errors import AdapterRefused, InvalidInput, ModelNotFound
from data.job_methods import REWARD_MODEL
from data.model_rules import ModelRules
from data.reward_head import RewardHead, load_head
from data.tables import AdapterVersion
from serve.api.schemas import SamplingFields
from serve.api.token_text import TokenText
from serve.engine.base import AdapterRef, Engine, engine_key

TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as one request uses it.

    Attributes:
        name: The version's full name, also when an alias was asked for.
        adapter: None for the base model.
        eos_token_ids: What ends an answer: the base model's, and the adapter's own.
        fingerprint: Changes with the base, the adapter's content and scale, and the engine.
        adapter_scale: How much of the adapter is added, 0 to 1.
    """

    name: str
    adapter: AdapterRef | None
    tokens: TokenText
    eos_token_ids: frozenset[int]
    fingerprint: str
    adapter_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A model that scores answers: an adapter, and the head on its last hidden state."""

    name: str
    adapter: AdapterRef
    head: RewardHead


class ModelCatalog:
    """Every model that this server can answer with."""

    def __init__(
        self,
        database: Database,
        adapters_dir: Path,
        base_model: str,
        base_fingerprint: str,
        engine: Engine,
        tokenizer: Any,
    ):
        self._database = database
        self._adapters_dir = adapters_dir
        self.base_fingerprint = base_fingerprint
        self._engine = engine
        self._verified: dict[
            str, tuple[Any, ...]
        ] = {}  # version id -> state of its files when checked
        self._heads = lru_cache(maxsize=64)(_read_head)
        self._own_tokens = lru_cache(maxsize=64)(_read_tokens)
        self.base_model = base_model
        self.base_tokens = TokenText(tokenizer)
        self.base = ServedModel(
            base_model, None, self.base_tokens, engine.eos_token_ids, _mark(engine.fingerprint, "")
        )

    def count_tokens(self, text: str) -> int:
        """Return how many tokens of the base model a text is."""
        return len(self.base_tokens.tokenizer.encode(text, add_special_tokens=False))

    async def bases(self, account_id: str) -> list[str]:
        """Return the base models that an account may use."""
        permitted = await run_in_threadpool(
            model_access.permits, self._database, account_id, self.base_model
        )
        return [self.base_model] if permitted else []

    async def resolve(
        self, account_id: str, name: str, rules: ModelRules | None = None
    ) -> ServedModel:
        """Find a model for this account.

        Args:
            rules: Which bases it may use, where that is known.

        Raises:
            ModelNotFound: There is none, or it belongs to another account.
            AdapterRefused: Its files are not what was published.
        """
        if name == self.base_model:
            permitted = rules.permits(name) if rules else bool(await self.bases(account_id))
            if not permitted:
                raise ModelNotFound(name)
            return self.base
        return await run_in_threadpool(self._resolve_adapter, account_id, name)

    async def resolve_for(
        self, account_id: str, body: SamplingFields, rules: ModelRules | None = None
    ) -> ServedModel:
        """Find the model of a request, with the adapter and the scale that it names.

        Args:
            rules: Which bases the account may use, where that is known.

        Raises:
            ModelNotFound: There is none, or it belongs to another account.
            AdapterRefused: Its files are not what was published.
            InvalidInput: `adapter` contradicts `model`, or there is no adapter to scale.
        """
        served = await self.resolve(account_id, body.model, rules)
        wanted = body.adapter or body.adapter_id
        if wanted is not None:
            asked = served
            served = await self.resolve(account_id, wanted, rules)
            if asked.adapter is not None and asked.adapter != served.adapter:
                raise InvalidInput(
                    f"Invalid 'adapter': '{wanted}' is another adapter than that of the model "
                    f"'{body.model}'. Set 'model' to '{self.base_model}', or leave 'adapter' out.",
                    param="adapter",
                )
        if body.adapter_scale == 1:
            return served
        if served.adapter is None:
            raise InvalidInput(
                f"Invalid 'adapter_scale': the model '{served.name}' has no adapter to scale.",
                param="adapter_scale",
            )
        mark = _mark(served.fingerprint, f"*{body.adapter_scale!r}")
        return replace(served, adapter_scale=body.adapter_scale, fingerprint=mark)

    async def resolve_reward(self, account_id: str, name: str) -> RewardModel:
        """Find a reward model for this account.

        Raises:
            ModelNotFound: There is none, or it belongs to another account.
            AdapterRefused: Its files are not what was published.
            InvalidInput: The model writes answers rather than scores them.
        """
        found = await self.resolve_judge(account_id, name)
        if not isinstance(found, RewardModel):
            raise InvalidInput(
                f"Invalid 'reward_model': '{name}' is no reward model. A fine-tuning job of the "
                "method 'reward_model' makes one.",
                param="reward_model",
            )
        return found

    async def resolve_judge(self, account_id: str, name: str) -> RewardModel | ServedModel:
        """Find a model that can judge answers: a reward model, or any other, which is asked.

        Raises:
            ModelNotFound: There is none, or it belongs to another account.
            AdapterRefused: Its files are not what was published.
        """
        if name == self.base_model:
            return await self.resolve(account_id, name)
        return await run_in_threadpool(self._resolve_judge, account_id, name)

    def _resolve_judge(self, account_id: str, name: str) -> RewardModel | ServedModel:
        version = self._find(account_id, name)
        if version.lineage.get("kind") != REWARD_MODEL:
            return self._resolve_adapter(account_id, name)
        folder = self._usable(version)
        return RewardModel(version.name, _ref(version, folder), self._heads(folder))

    def _find(self, account_id: str, name: str) -> AdapterVersion:
        version = registry.resolve(self._database, account_id, name)
        if version.base_fingerprint != self.base_fingerprint and name != version.name:
            # An alias on its way to another base: what it named last on this one is served.
            version = (
                registry.newest_of_base(self._database, account_id, name, self.base_fingerprint)
                or version
            )
        if not model_access.permits(self._database, account_id, version.name, version.base_model):
            raise ModelNotFound(name)
        return version

    def _resolve_adapter(self, account_id: str, name: str) -> ServedModel:
        version = self._find(account_id, name)
        if version.lineage.get("kind") == REWARD_MODEL:
            raise InvalidInput(
                f"Invalid 'model': '{name}' is a reward model, which scores answers and writes "
                "none. Name it in a grader, or as `reward_model` beside `best_of`.",
                param="model",
            )
        folder = self._usable(version)
        tokens, eos_token_ids = self.base_tokens, self._engine.eos_token_ids
        if (folder / TOKENIZER_FILE).exists():
            tokens = self._own_tokens(folder)
            if tokens.tokenizer.eos_token_id is not None:
                eos_token_ids |= {tokens.tokenizer.eos_token_id}
        return ServedModel(
            version.name,
            _ref(version, folder),
            tokens,
            eos_token_ids,
            _mark(self._engine.fingerprint, version.digest),
        )

    def _usable(self, version: AdapterVersion) -> Path:
        """Return a version's folder; raises AdapterRefused unless it is of this base and whole."""
        if version.base_fingerprint != self.base_fingerprint:
            raise AdapterRefused(
                f"The model {version.name} was trained on other weights ({version.base_model}, "
                f"{version.base_fingerprint}) than this server runs ({self.base_model}, "
                f"{self.base_fingerprint}); start a server with its base (`hone serve "
                f"model={version.base_model}`), or train or upgrade it to this one.",
                code="adapter_wrong_base",
            )
        folder = self._adapters_dir / version.path
        self._verify(version, folder)
        return folder

    def _verify(self, version: AdapterVersion, folder: Path) -> None:
        state = _file_states(folder)
        if self._verified.get(version.id) != state or not state:
            adapter_folders.verify(version, self._adapters_dir)
            self._verified[version.id] = state


def _ref(version: AdapterVersion, folder: Path) -> AdapterRef:
    key = engine_key(version.project_id, version.digest)
    return AdapterRef(key, str(folder), version.project_id)


def _file_states(folder: Path) -> tuple[Any, ...]:
    """Return name, size and times of each file: cheap to read, different after a change."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        stat = path.stat()
        found.append((path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(found)


def _read_head(folder: Path) -> RewardHead:
    try:
        return load_head(folder)
    except InvalidInput as error:
        raise AdapterRefused(error.message, code="adapter_no_reward_head") from error


def _read_tokens(folder: Path) -> TokenText:
    from transformers import AutoTokenizer

    return TokenText(AutoTokenizer.from_pretrained(folder, local_files_only=True))


def _mark(fingerprint: str, digest: str) -> str:
    return "fp_" + hashlib.sha256(f"{fingerprint}:{digest}".encode()).hexdigest()[:12]
