"""Where a training job runs: in this process, or as a Ray Train job that asks for its GPUs, CPUs and memory.

Whenever training saves, the first worker brings the job's storage up to date, and a worker that takes over begins with
that (``storage``). What it writes to be looked at (log, pictures, status) also comes here through a queue at once: the
run folders on this side are live, and a lost node loses none of them.

What Ray's workers run is ``worker``; Ray itself is imported when it is used.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from dopsd.config.groups import ComputeSettings, Method
from dopsd.files import append_line, full_disk_said, is_disk_full, whole_file
from dopsd.train import worker
from dopsd.train.checkpoint import set_aside
from dopsd.train.errors import LaunchError
from dopsd.train.job import Job, run_job
from dopsd.train.observer import Observer, Progress
from dopsd.train.status import end_run, how_it_ended
from dopsd.train.storage import JobStorage
from dopsd.train.trainer import TrainError, TrainResult, milestones, publish

_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths stay relative to the project
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_OWN_RAY_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # of cloud nodes; here a process for nothing
    "RAY_worker_niceness": "0",  # Ray would let everything else on the machine go before training
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: else Ray leaves loopback on Linux too
}
_OWN_RAY = {
    "object_store_memory": 256 * 2**20,  # it carries little more than the encoded examples
    "include_dashboard": False,
    "_node_ip_address": "127.0.0.1",
}
_RAY_LOCK = threading.Lock()
_SOCKET_LIMIT = 107  # bytes of a path that a socket can have, on Linux
_BELOW_TEMP = len("/ray/session_2026-11-29_08-58-04_123456_1234567/sockets/plasma_store.12")


def run_training(
    job: Job, compute: ComputeSettings, root: Path, folder: Path, adapters: Path, observer: Observer
) -> dict[Method, TrainResult]:
    """Run ``job`` to its end; its run folders are in ``folder``, live, and its adapters end up in ``adapters``.

    Raises :class:`~dopsd.train.trainer.TrainError` where the job itself is at fault, :class:`LaunchError` where the
    machines are and ``compute.max_failures`` did not suffice.
    """
    with full_disk_said(folder):
        if compute.launcher == "local":
            return run_job(job, folder, adapters, observer)
        return _run_on_ray(job, compute, root, folder, adapters, observer)


def connect_ray(compute: ComputeSettings) -> None:
    """Join the cluster in ``RAY_ADDRESS``, or start a Ray of our own that ends with this process."""
    address = os.environ.get("RAY_ADDRESS")
    for name, value in (_RAY_ENVIRONMENT | ({} if address else _OWN_RAY_ENVIRONMENT)).items():
        os.environ.setdefault(name, value)
    if not address:
        _want_a_token()
    place = {} if address else _place_for_sockets()
    import ray

    with _RAY_LOCK:
        if ray.is_initialized():
            return
        own: dict[str, Any] = {} if address else _OWN_RAY | place
        try:
            if address:
                _check_reachable(address)
            _in_lasting_thread(lambda: _start(address or "local", own))
        except (OSError, RuntimeError, ValueError) as error:
            where = f"the cluster at {address}" if address else "a Ray on this machine"
            raise LaunchError(f"cannot reach {where}: {str(error).strip().splitlines()[0]}") from None


def _want_a_token() -> None:
    """Other users of this machine reach the ports of a Ray of our own, so it is to take nothing without a token, one
    that no file holds. Left alone it would make one in the home folder, or take what lies there, whoever knows it."""
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "ray" not in sys.modules:  # it reads this when it is imported; later it asks for tokens by its own default
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@cache
def _place_for_sockets() -> dict[str, str]:
    """Where Ray is to have its sockets, if that is not where it would: a path of theirs must not be long. It goes when
    this process ends, after Ray, which registers its own end later, when it is imported."""
    if len(os.fsencode(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())) + _BELOW_TEMP <= _SOCKET_LIMIT:
        return {}
    try:
        place = tempfile.mkdtemp(prefix="dopsd-ray-", dir="/tmp")
    except OSError as error:
        raise LaunchError(
            f"{tempfile.gettempdir()} is too long for Ray's sockets, and /tmp cannot be written to ({error.strerror}); "
            f"set RAY_TMPDIR to a folder of at most {_SOCKET_LIMIT - _BELOW_TEMP} characters"
        ) from None
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return {"_temp_dir": place}


def _start(address: str, own: dict[str, Any]) -> None:
    import ray

    context = ray.init(address=address, log_to_driver=False, logging_level="error", **own)
    if not context.dashboard_url:
        _leave_no_helper()


def _leave_no_helper() -> None:
    """Ray Train gives each job a helper that frees the job's place when its controller dies. It outlives the job that
    it belongs to until Ray's dashboard tells it so, and where there is no dashboard it never ends. Ray itself frees the
    place when the process that started the job ends, which is how jobs end here that do not end by themselves."""
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2.api import data_parallel_trainer

    data_parallel_trainer.PlacementGroupCleanerCallback = ControllerCallback


def _in_lasting_thread(start: Callable[[], Any]) -> None:
    """Call ``start`` in a thread that lives as long as this process: the kernel kills the processes of a Ray of our own
    when the *thread* that started them ends (Linux's PDEATHSIG), and a flow's task is a thread of a pool.

    That is the main thread where we are in it: there Ray can also see to its processes on SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        start()
        return
    started: Future[None] = Future()

    def live() -> None:
        try:
            start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        threading.Event().wait()

    threading.Thread(target=live, name="ray", daemon=True).start()
    started.result()


def _check_reachable(address: str) -> None:
    """Raise ``OSError`` where nobody listens: Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def resources(compute: ComputeSettings, device: str) -> dict[str, float]:
    """What one worker asks Ray for."""
    most = compute.workers if isinstance(compute.workers, int) else compute.workers[1]
    gpus = compute.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if device == "cuda" or (device == "auto" and _cluster_has_gpus()) else 0.0
    cpus = compute.cpus_per_worker or (1 if gpus else max(1, _cpus_of_a_node() // most))
    requested: dict[str, float] = {"CPU": cpus}
    if gpus:
        requested["GPU"] = gpus
    if compute.memory_gib:
        requested["memory"] = compute.memory_gib * 2**30
    return requested


def _cluster_has_gpus() -> bool:
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


def _cpus_of_a_node() -> int:
    import ray

    return int(max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=1))


def _run_on_ray(
    job: Job, compute: ComputeSettings, root: Path, folder: Path, adapters: Path, observer: Observer
) -> dict[Method, TrainResult]:
    connect_ray(compute)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import BackendConfig
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # on this machine, which outlives the nodes: the job goes on without any of them
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    requested = resources(compute, job.model.device)
    storage = storage_of(job.name, compute, root)
    try:
        storage.offer(folder, job.train.methods)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise LaunchError(f"{job.name}: cannot write to the storage {_shown(storage.place)} ({error})") from None
    trainer = DataParallelTrainer(
        worker.run,
        # one worker meets nobody: torch's meeting point would listen on every address, and asks nobody who they are
        backend_config=BackendConfig() if compute.workers == 1 else TorchConfig(),
        train_loop_config={
            "job": ray.put(replace(job, root=root.resolve())),  # read by the workers alone: it brings torch
            "queue": queue,
            "storage": storage,
        },
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            use_gpu="GPU" in requested,
            resources_per_worker=requested,
            elastic_resize_monitor_interval_s=compute.resize_seconds,
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=storage.place,  # for Ray's own notes about the job
            failure_config=FailureConfig(max_failures=compute.max_failures),
        ),
    )
    asked = ", ".join(f"{amount:g} {what}" for what, amount in requested.items() if what != "memory")
    observer.message(f"{job.name}: handed to Ray; a worker asks for {asked}, and begins where they are free")
    with _Reader(queue, folder, observer, job):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise LaunchError(f"{job.name}: {_last_line(error)}; start it again to go on from its checkpoint") from None
    answer = result.return_value
    if "error" in answer:
        raise TrainError(answer["error"])
    _bring_home(storage, folder, adapters, answer["results"])
    storage.delete()
    result.filesystem.delete_dir(result.path)
    return {
        method: TrainResult(**found | {"adapters": {k: adapters / path.name for k, path in found["adapters"].items()}})
        for method, found in answer["results"].items()
    }


def storage_of(name: str, compute: ComputeSettings, root: Path) -> JobStorage:
    """Of the job ``name``, where the settings say, or in the project."""
    return JobStorage(compute.storage or str((root / ".cache" / "ray").resolve()), name)


def bring_back(name: str, compute: ComputeSettings, root: Path, folder: Path) -> None:
    """Fetch into ``folder`` the checkpoints that job ``name``, which ran on Ray and did not end, left in its storage:
    the one to come looks elsewhere. So they are gone on from, or set aside with their run.

    Raises :class:`LaunchError` where the storage cannot be read.
    """
    storage = storage_of(name, compute, root)
    if compute.launcher == "local" and not Path(storage.place, name).is_dir():
        return
    with full_disk_said(folder):
        try:
            if further := storage.further_than(folder):
                _fetch(storage, folder, further, ("checkpoints", "adapters"))
                storage.delete()
        except OSError as error:
            if is_disk_full(error):
                raise
            raise LaunchError(f"{name}: cannot read the storage {_shown(storage.place)} ({error})") from None


def _bring_home(storage: JobStorage, folder: Path, adapters: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Add to the run folders what did not come through the queue: checkpoints and adapters."""
    _fetch(storage, folder, list(results))
    for method, found in results.items():
        publish(folder / method / "adapters", adapters, dict(enumerate(found["adapters"])))


def _fetch(storage: JobStorage, folder: Path, methods: Sequence[str], replaced: Sequence[str] | None = None) -> None:
    """Move the runs of ``methods`` from the storage into ``folder``. ``replaced``: what of them takes the place of what
    is here; the rest only where there is nothing (``None``: all of it)."""
    place = folder / "arriving.partial"
    shutil.rmtree(place, ignore_errors=True)
    storage.load(place)
    for method in methods:
        (folder / method).mkdir(parents=True, exist_ok=True)
        for arrived in sorted((place / method).iterdir()):
            target = folder / method / arrived.name
            if target.exists() and replaced is not None and arrived.name not in replaced:
                continue
            if target.is_dir():
                shutil.rmtree(target)
            arrived.replace(target)
    shutil.rmtree(place)


def _shown(place: str) -> str:
    """A storage without its options, among which may be keys."""
    return place.partition("?")[0]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


class _Reader:
    """Reads a job's messages in a thread, and writes the files they are about into the run folders on this side."""

    def __init__(self, queue: Any, folder: Path, observer: Observer, job: Job) -> None:
        self._queue, self._folder, self._observer, self._job = queue, folder, observer, job
        self._thread = threading.Thread(target=self._read, name=f"messages of {job.name}", daemon=True)
        self._failure: BaseException | None = None
        self._bars: dict[Path, Progress] = {}

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        from ray.exceptions import RayError

        try:
            self._queue.put(None)
            self._thread.join()
            self._queue.shutdown()
        except RayError:
            pass  # Ray itself is gone, which the job's own error says
        for method in self._job.train.methods:  # those whose worker had no time to write it
            with suppress(OSError):  # a disk that is full is said anyway
                end_run(self._folder / method, self._observer, how_it_ended(error or self._failure))
        if self._failure is not None and error is None:
            raise self._failure

    def _read(self) -> None:
        from ray.exceptions import RayError

        try:
            while (message := self._queue.get()) is not None:
                self._take(*message)
        except BaseException as failure:
            self._failure = failure
            with suppress(RayError):  # where it is Ray that is gone, no messages come
                while self._queue.get() is not None:
                    pass  # nobody reads them, but they must not pile up until training ends
        finally:
            for bar in self._bars.values():
                bar.close()

    def _take(self, name: str | None, content: str | bytes | None) -> None:
        """A message of :class:`dopsd.train.worker._Relay`."""
        if name is None:
            self._observer.message(str(content))
            return
        path = self._folder / name
        if isinstance(content, str):
            append_line(path, content)
            self._show(path.parent, json.loads(content))
        elif content is not None:
            with whole_file(path) as partial:
                partial.write_bytes(content)
        elif path.exists():
            set_aside(path)
        self._observer.wrote(path, content if isinstance(content, str) else None)

    def _show(self, run: Path, row: Mapping[str, float]) -> None:
        if "train/loss" not in row:
            return
        if run not in self._bars:
            last = max(milestones(self._job.train, run.name))  # type: ignore[arg-type]  # folders are named after methods
            self._bars[run] = Progress(run.name, last, 0)
        self._bars[run].to(int(row["step"]), row["train/loss"], row["train/images_per_second"])
