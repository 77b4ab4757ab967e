"""What a running server holds: database, files, and the engine with its base model.

`open_runtime` does the slow part of a start, up to one answer from the model, before the port
accepts connections: a server that can be reached is a server that works.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.db import Database
from data.files import FileStore
from data.metering import Meter
from data.moderation import classifier
from data.settings import Settings
from data.tables import new_id
from data.uploads import UploadStore
from serve.api.adapters import ModelCatalog
from serve.api.generation import Generator
from serve.engine import base_model
from serve.engine.base import Engine, GenerationRequest, SamplingParams
from serve.engine.base_spec import ModelSpec
from serve.engine.local import EngineConfig, LocalEngine
from serve.gate import Gate
from serve.metrics import Metrics
from serve.moderator import Moderator
from serve.throttle import Throttle

MIB = 1 << 20


@dataclass
class Runtime:
    """Everything that routes share."""

    settings: Settings
    database: Database
    files: FileStore
    engine: Engine
    models: ModelCatalog
    created: int  # when the base model was fetched
    generator: Generator = field(init=False)
    uploads: UploadStore = field(init=False)
    access_throttle: Throttle = field(default_factory=Throttle)
    login_throttle: Throttle = field(default_factory=lambda: Throttle(30, 10_000, "sign-ins"))
    gate: Gate = field(init=False)
    meter: Meter = field(init=False)
    moderator: Moderator = field(init=False)
    metrics: Metrics = field(default_factory=Metrics)
    probe_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.generator = Generator(self.engine)
        self.uploads = UploadStore(self.database, self.files)
        self.meter = Meter(self.database, self.settings.prices)
        self.gate = Gate(self.database, self.meter, self.settings.limits, self.models.base_model)
        weights = self.settings.moderation_weights
        self.moderator = Moderator(self.database, classifier.load(weights))
        self.meter.start(on_tick=self.refresh)

    def refresh(self) -> None:
        """Read again what requests are held against."""
        self.gate.refresh()
        self.moderator.refresh()

    def probe(self) -> GenerationRequest:
        """Return the smallest question that shows whether the model answers."""
        params = SamplingParams(max_tokens=1, temperature=0)
        return GenerationRequest(
            new_id("probe-"), (min(self.engine.eos_token_ids, default=0),), params
        )

    def apply(self, settings: Settings) -> None:
        """Take over settings that may change while requests run."""
        self.settings = settings
        self.gate.set_defaults(settings.limits)
        self.files.limits = settings.limits
        self.meter.set_prices(settings.prices)
        self.engine.set_limits(
            queue_size=settings.queue_size,
            request_timeout_s=settings.request_timeout_s,
            adapter_cache_bytes=settings.adapter_cache_mb * MIB,
            max_adapters_per_account=settings.max_adapters_per_account,
        )

    def close(self) -> None:
        """Stop the engine and let go of the database."""
        self.engine.close()
        self.meter.close()
        self.database.close()


def open_runtime(settings: Settings) -> Runtime:
    """Open the database, load the base model, start the engine, and have it answer once.

    Raises:
        ModelUnavailable: The base model can be neither fetched nor read.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    database = Database(settings.effective_database_url)
    database.migrate()
    max_upload_bytes = settings.max_upload_mb * MIB
    spec = base_model.find_spec(settings.model)
    folder = base_model.fetch(spec, settings.models_dir)
    fingerprint = base_model.fingerprint(folder)
    engine = open_engine(settings, spec, folder, fingerprint)
    runtime = Runtime(
        settings=settings,
        database=database,
        files=FileStore(database, settings.effective_blob_url, max_upload_bytes, settings.limits),
        engine=engine,
        models=ModelCatalog(
            database, settings.adapters_dir, spec.name, fingerprint, engine, engine.tokenizer
        ),
        created=int((folder / "config.json").stat().st_mtime),
    )
    try:
        engine.generate([runtime.probe()])
    except BaseException:
        runtime.close()
        raise
    runtime.generator.last_answer_s = time.monotonic()
    return runtime


def open_engine(settings: Settings, spec: ModelSpec, folder: Path, fingerprint: str) -> LocalEngine:
    """Load a fetched base model and start its engine."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dtype = spec.dtype if settings.dtype == "auto" else settings.dtype
    config = EngineConfig(
        max_batch=settings.max_batch,
        max_context=settings.max_context or spec.context_length,
        kv_budget_bytes=settings.kv_cache_mb * MIB,
        queue_size=settings.queue_size,
        adapter_cache_bytes=settings.adapter_cache_mb * MIB,
        max_adapters_per_account=settings.max_adapters_per_account,
        request_timeout_s=settings.request_timeout_s,
        max_lora_rows=settings.max_lora_rows,
    )
    return LocalEngine.open(folder, dtype, settings.device, config, fingerprint).start()
