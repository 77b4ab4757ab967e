"""A worker's hold on a job, renewed from a thread of its own.

However long validation or publishing takes, the lease lives as long as the worker's process. When
it is lost, because the job was cancelled, taken over, or the database could not be reached for the
lease's length, the worker must stop its trainer and write nothing more.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Self

from sqlalchemy.exc import SQLAlchemyError

from data import job_lease
from data.db import Database

LOOK_S = 0.5  # how often a request to cancel is looked for

log = logging.getLogger("hone.worker")


class Lease:
    """Holds a claimed job for the length of a `with` block; does not give it back at the end.

    Attributes:
        lost: Set when the job is no longer this worker's, as when it was cancelled.
        pause: Set when the job's owner wants it to go on later.
    """

    def __init__(
        self, database: Database, job_id: str, worker_id: str, lease_s: float, heartbeat_s: float
    ):
        self.lost = threading.Event()
        self.pause = threading.Event()
        self._database = database
        self._job_id = job_id
        self._worker_id = worker_id
        self._lease_s = lease_s
        self._heartbeat_s = min(heartbeat_s, lease_s / 3)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {job_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        renewed = time.monotonic()
        while not self._done.wait(min(LOOK_S, self._heartbeat_s)):
            begun = time.monotonic()
            due = begun - renewed >= self._heartbeat_s
            try:
                standing = self._renew() if due else self._look()
            except SQLAlchemyError as error:
                log.warning("%s: the lease could not be renewed: %s", self._job_id, error)
                if time.monotonic() - renewed > self._lease_s:
                    self.lost.set()
                    return
                continue
            if due:
                renewed = begun
            if standing is job_lease.Standing.LOST:
                self.lost.set()
                return
            if standing is job_lease.Standing.PAUSE:
                self.pause.set()

    def _renew(self) -> job_lease.Standing:
        return job_lease.heartbeat(self._database, self._job_id, self._worker_id, self._lease_s)

    def _look(self) -> job_lease.Standing:
        return job_lease.standing(self._database, self._job_id, self._worker_id)
