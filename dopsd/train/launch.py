"""Where a training job runs: in this process, or as a Ray Train job that asks for its GPUs, CPUs and memory.

The job's folder is its checkpoint: whenever training saves, the first worker hands the whole folder (checkpoints,
adapters, previews, log) to Ray's storage, and a worker that takes over begins with it. News travel the other way
through a queue, so that the tracker is fed where the job was started, and a lost node loses none of them.

What Ray's workers run is ``worker``; Ray itself is imported when it is used.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dopsd.config import ComputeSettings, Method
from dopsd.train import worker
from dopsd.train.errors import LaunchError
from dopsd.train.job import Job, Observe, run_job
from dopsd.train.observer import Progress
from dopsd.train.trainer import Observer, TrainError, TrainResult, milestones

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


def launch(
    job: Job, compute: ComputeSettings, root: Path, folder: Path, adapters: Path, observe: Observe
) -> dict[Method, TrainResult]:
    """Run ``job`` to its end; its run folders end up in ``folder``, its adapters in ``adapters``.

    Raises :class:`~dopsd.train.trainer.TrainError` where the job itself is at fault, :class:`LaunchError` where the
    machines are and ``compute.max_failures`` did not suffice.
    """
    if compute.launcher == "local":
        return run_job(job, folder, adapters, observe)
    return _launch_on_ray(job, compute, root, folder, adapters, observe)


def connect_ray(compute: ComputeSettings) -> None:
    """Join the cluster in ``RAY_ADDRESS``, or start a Ray of our own that ends with this process."""
    address = os.environ.get("RAY_ADDRESS")
    for name, value in (_RAY_ENVIRONMENT | ({} if address else _OWN_RAY_ENVIRONMENT)).items():
        os.environ.setdefault(name, value)
    if not address:
        _want_a_token()
    import ray

    with _RAY_LOCK:
        if ray.is_initialized():
            return
        own: dict[str, Any] = {} if address else _OWN_RAY
        try:
            if address:
                _knock(address)
            _lasting(lambda: _start(address or "local", own))
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


def _lasting(start: Callable[[], Any]) -> None:
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


def _knock(address: str) -> None:
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
    asked: dict[str, float] = {"CPU": cpus}
    if gpus:
        asked["GPU"] = gpus
    if compute.memory_gib:
        asked["memory"] = compute.memory_gib * 2**30
    return asked


def _cluster_has_gpus() -> bool:
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


def _cpus_of_a_node() -> int:
    import ray

    return int(max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=1))


def _launch_on_ray(
    job: Job, compute: ComputeSettings, root: Path, folder: Path, adapters: Path, observe: Observe
) -> dict[Method, TrainResult]:
    connect_ray(compute)
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import BackendConfig
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # on this machine, which outlives the nodes: the job goes on without any of them
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    asked = resources(compute, job.model.device)
    trainer = DataParallelTrainer(
        worker.run,
        # one worker meets nobody: torch's meeting point would listen on every address, and asks nobody who they are
        backend_config=BackendConfig() if compute.workers == 1 else TorchConfig(),
        train_loop_config={
            "job": ray.put(replace(job, root=root.resolve())),  # read by the workers alone: it brings torch
            "news": news,
            "before": _pack(folder, job.train.methods),
        },
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            use_gpu="GPU" in asked,
            resources_per_worker=asked,
            elastic_resize_monitor_interval_s=compute.resize_seconds,
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=compute.storage or str((root / ".cache" / "ray").resolve()),
            failure_config=FailureConfig(max_failures=compute.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with _Reader(news, observe, job):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise LaunchError(f"{job.name}: {_last_line(error)}; start it again to go on from its checkpoint") from None
    answer = result.return_value
    if "error" in answer:
        raise TrainError(answer["error"])
    with result.checkpoint.as_directory() as final:
        _bring_home(Path(final), folder, adapters, job.train.methods)
    result.filesystem.delete_dir(result.path)
    return {
        method: TrainResult(**found | {"adapters": {k: adapters / path.name for k, path in found["adapters"].items()}})
        for method, found in answer["results"].items()
    }


def _pack(folder: Path, methods: Sequence[str]) -> dict[str, bytes]:
    """What is already done here, as file contents: the nodes may not see this machine's disk."""
    files = [p for m in methods for p in sorted((folder / m).rglob("*")) if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def _bring_home(final: Path, folder: Path, adapters: Path, methods: Sequence[str]) -> None:
    """Put the finished run folders in place, each whole or not at all, and the adapters beside."""
    for method in methods:
        arrived = folder / f"{method}.arriving"
        shutil.rmtree(arrived, ignore_errors=True)
        shutil.copytree(final / "train" / method, arrived)
        shutil.rmtree(folder / method, ignore_errors=True)
        arrived.rename(folder / method)
    adapters.mkdir(parents=True, exist_ok=True)
    for file in sorted((final / "adapters").iterdir()):
        partial = adapters / f"{file.name}.partial"
        shutil.copyfile(file, partial)
        partial.replace(adapters / file.name)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


class _Reader:
    """Reads a job's news in a thread and tells the observers on this side."""

    def __init__(self, news: Any, observe: Observe, job: Job) -> None:
        self._news, self._observe, self._job = news, observe, job
        self._thread = threading.Thread(target=self._read, name=f"news of {job.name}", daemon=True)
        self._failure: BaseException | None = None

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: Any) -> None:
        from ray.exceptions import RayError

        try:
            self._news.put(None)
            self._thread.join()
            self._news.shutdown()
        except RayError:
            pass  # Ray itself is gone, which the job's own error says
        if self._failure is not None and error[0] is None:
            raise self._failure

    def _read(self) -> None:
        from ray.exceptions import RayError

        open_methods: dict[str, tuple[Any, Observer, Progress]] = {}
        try:
            while (message := self._news.get()) is not None:
                kind, method, content = message
                if kind == "begin" and method not in open_methods:
                    context = self._observe(method)
                    bar = Progress(method, max(milestones(self._job.train, method)), 0)
                    open_methods[method] = (context, context.__enter__(), bar)
                elif kind == "end":
                    context, _, bar = open_methods.pop(method)
                    bar.close()
                    context.__exit__(None, None, None)
                elif kind in ("metrics", "images", "message"):
                    _, observer, bar = open_methods[method]
                    getattr(observer, kind)(*content)
                    if kind == "metrics" and "train/loss" in content[1]:
                        bar.to(content[0], content[1]["train/loss"], content[1]["train/images_per_second"])
        except BaseException as failure:
            self._failure = failure
            with suppress(RayError):  # where it is Ray that is gone, no news come
                while self._news.get() is not None:
                    pass  # nobody hears them, but they must not pile up until training ends
        finally:
            for context, _, bar in open_methods.values():
                bar.close()
                lost = LaunchError(f"{self._job.name}: the job ended early")
                context.__exit__(LaunchError, lost, None)
