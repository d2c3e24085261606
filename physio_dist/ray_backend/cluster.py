"""Connection of a driver to a Ray cluster, and the cluster's resources.

Tokens, certificates and credentials come from the environment of the nodes; nothing here writes them anywhere.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil
import ray
from ray.exceptions import AuthenticationError
from ray.util.placement_group import placement_group, remove_placement_group

from physio_dist import storage
from physio_dist.errors import UserError
from physio_dist.runtime import exit_status

_PROBE_S = 5.0
_CONNECT_S = 22.0
# The resources of a run that has ended are free within seconds.
_RETURN_S = 15.0
# A placement that Ray has begun on a machine that then lost its power stays pending for 130 to 170 s, and later
# requests wait behind it.
_LOST_S = 240.0
_ANSWER_S = 2.0
_REPORT_S = 10.0
# HTTP/2's preface and an empty settings frame, which every gRPC server answers with its settings.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4

Say = Callable[[str], None]

_dashboard = ""


def connect(say: Say, hear_workers: bool = True, option: str = "RAY_ADDRESS") -> None:
    """Connect to the cluster that ``RAY_ADDRESS`` names, else to one that runs on this machine, else start one here.

    Args:
        say: receives which cluster it is.
        hear_workers: whether the output of workers is repeated here; it is in the dashboard in any case.
        option: origin of the address, for messages.

    Raises:
        UserError: there is no cluster at the address, it refuses this client, or it runs other versions.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address not in ("", "auto", "local"):
        _probe(address, option)
        # It answers, so that Ray need not retry for 20 s, in vain if the token is wrong.
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "5")
    # Ray would wait for minutes for a server that speaks HTTP/2 and is no cluster, in a call that nothing interrupts.
    limit = threading.Timer(_CONNECT_S, _give_up, (address, option))
    limit.daemon = True
    if address not in ("", "local"):
        limit.start()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        context = ray.init(logging_level="WARNING", log_to_driver=hear_workers)
    except (AuthenticationError, ConnectionError) as error:
        # A wrong token surfaces as a failed connection, and further down the chain of causes.
        if isinstance(error, AuthenticationError) or "AuthenticationError" in _causes(error):
            raise UserError(
                f"the Ray cluster{_at(address)} wants a token, and there is none or a wrong one: set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
            ) from None
        raise UserError(
            f"there is no Ray cluster{_at(address)} ({_first_line(error)}): start one with `ray start --head`, correct "
            f"{option}, or set it to local to use this machine alone"
        ) from None
    except (RuntimeError, ValueError) as error:
        raise UserError(
            _mismatch(str(error), address)
            or (f"cannot join the Ray cluster{_at(address)}: {' '.join(str(error).split())}")
        ) from None
    finally:
        limit.cancel()
        if threading.current_thread() is threading.main_thread():
            # Ray has replaced it by a handler that ends the process with another status.
            signal.signal(signal.SIGTERM, on_sigterm)
    global _dashboard
    _dashboard = context.dashboard_url or ""
    own = any(child.name() == "gcs_server" for child in psutil.Process().children())
    name = "started a Ray cluster on this machine alone" if own else f"Ray cluster at {_gcs_address()}"
    nodes, total = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
    gpus = f", {total['GPU']:g} GPU(s)" if total.get("GPU") else ""
    say(f"{name}: {nodes} node(s), {total.get('CPU', 0):g} CPU(s){gpus}")
    if url := dashboard_url():
        say(f"dashboard: {url}")


def dashboard_url() -> str | None:
    """Return the URL of the connected cluster's dashboard, if it has one."""
    if not _dashboard:
        return None
    return _dashboard if "://" in _dashboard else f"http://{_dashboard}"


def free_slots(cpus: float, gpus: float) -> int:
    """Return how many workers of that size the living nodes could hold if they were empty."""
    count = 0
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            fits = [resources.get(name, 0.0) / each for name, each in (("CPU", cpus), ("GPU", gpus)) if each > 0]
            # A share of a CPU is no exact binary number.
            count += int(min(fits, default=0.0) + 1e-6)
    return count


def draining_nodes() -> set[str]:
    """Return the addresses of nodes that are announced to go, by `ray drain-node`, an autoscaler or a provider's agent.

    Ray 2.60 has no public interface for this outside a training function: ``ray.nodes()``, ``ray.util.state`` and
    ``ray.train.UserCallback`` do not have the draining state. ``ray.train.get_preemption_info()`` is public, but it is
    a barrier of all workers, which must call it equally often: it would be one more collective in each step, and in
    another thread would get in the way of ``ray.train.report()``. Ray Train itself reads the state from the function
    used here.
    """
    try:
        ids = set(ray._private.state.state.get_draining_nodes())
    except AttributeError:
        # Another release may have moved it. Then nodes go without an extra checkpoint.
        return set()
    return {node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] in ids}


def require_resources(cpus: float, gpus: float, workers: int, wait_s: float, say: Say, option: str = "") -> None:
    """Check that ``workers`` of ``cpus`` and ``gpus`` each can be placed now, or within ``wait_s`` seconds.

    Args:
        cpus, gpus: resources of each worker.
        workers: number of workers that must fit at the same time.
        wait_s: seconds to wait for nodes that an autoscaler may add.
        say: receives a message about the shortage every 10 s.
        option: name of the option for ``wait_s``, for the message.

    Raises:
        UserError: they cannot; the message has the requested and the available resources.
    """
    advice = "Ask for less or add nodes" + (f"; {option}=SECONDS waits for them" if option else "")
    if free_slots(cpus, gpus) < workers and wait_s <= 0:
        raise UserError(f"{describe_shortage(cpus, gpus, workers, unresponsive_nodes())}. {advice}")
    bundle = {name: each for name, each in (("CPU", cpus), ("GPU", gpus)) if each > 0}
    # A pending placement group also makes an autoscaler add nodes.
    group = placement_group([bundle] * workers, strategy="PACK")
    try:
        started, report_at, return_s = time.monotonic(), 0.0, _RETURN_S
        # Whole seconds, because Ray truncates fractions.
        while not group.wait(1):
            waited = time.monotonic() - started
            if waited < report_at:
                continue
            unresponsive = unresponsive_nodes()
            return_s = _LOST_S if unresponsive else return_s
            enough = free_slots(cpus, gpus) >= workers
            shortage = describe_shortage(cpus, gpus, workers, unresponsive)
            patience = max(wait_s, return_s) if enough else wait_s
            if waited >= patience:
                busy = "; others are using it" if enough else ""
                raise UserError(f"{shortage}{busy}. Waited {patience:g} s in vain. {advice}")
            say(f"waiting up to {patience - waited:.0f} s for room: {shortage}")
            report_at = min(waited + _REPORT_S, patience)
    finally:
        remove_placement_group(group)


def unresponsive_nodes() -> list[str]:
    """Return the addresses of nodes that do not answer though Ray, for about a minute, takes them for alive."""
    nodes = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(32) as pool:
        return [address for (address, _), answer in zip(nodes, pool.map(_answers, nodes), strict=True) if not answer]


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def describe_shortage(cpus: float, gpus: float, workers: int, unresponsive: Sequence[str]) -> str:
    """Describe the requested and the available resources and the :func:`unresponsive_nodes`, for a message."""

    def text(resources: dict[str, float]) -> str:
        return f"{resources.get('CPU', 0):g} CPU(s) and {resources.get('GPU', 0):g} GPU(s)"

    nodes = sum(node["Alive"] for node in ray.nodes())
    each = f"{cpus:g} CPU(s)" + (f" and {gpus:g} GPU(s)" if gpus else "")
    return (
        f"asked for {workers} worker(s) of {each}; the cluster has {text(ray.cluster_resources())} on {nodes} node(s), "
        f"{text(ray.available_resources())} of them free"
        + (f"; no answer from {', '.join(unresponsive)}" if unresponsive else "")
    )


def _probe(address: str, option: str) -> None:
    """Check that a gRPC server answers, because Ray itself tries for two minutes."""
    if "://" in address:
        raise UserError(
            f"{option}={storage.without_secrets(address)} is an address for `ray job submit` or for Ray Client; a "
            "driver needs the cluster's own, HOST:6379 by default (`ray start` prints it). Or submit it as a job: "
            "ray job submit --working-dir . -- python -m physio_dist.launch ..."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{option}={address} is not of the form HOST:PORT")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S) as connection:
            answer = b"\0\0\0\4"
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                connection.sendall(_HELLO)
                answer = connection.recv(9)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(
            f"no Ray cluster answers at {address} ({reason}): start one with `ray start --head`, correct {option}, or "
            "set it to local to use this machine alone"
        ) from None
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise UserError(f"what answers at {address} is no Ray cluster: {option} takes the cluster's HOST:PORT")


def _give_up(address: str, option: str) -> None:
    def fail() -> None:
        raise UserError(
            f"what answers at {address} is no Ray cluster, or one too busy to let a driver in within {_CONNECT_S:g} s: "
            f"{option} takes the cluster's HOST:PORT"
        )

    os._exit(exit_status.status_of(fail))


def _gcs_address() -> str:
    return str(ray.get_runtime_context().gcs_address)


def _at(address: str) -> str:
    return f" at {address}" if address else ""


def _mismatch(message: str, address: str) -> str | None:
    """Return a message if Ray's is about other versions in the cluster, for which it has no exception class."""
    versions = re.findall(r"(Ray|Python): (\S+)", message)
    if "Version mismatch" not in message or len(versions) != 4:
        return None
    theirs, ours = (" and ".join(" ".join(pair) for pair in versions[i : i + 2]) for i in (0, 2))
    return (
        f"the Ray cluster{_at(address)} runs {theirs}, this driver {ours}: start it with the cluster's versions, or "
        "have it run there, which any version can: ray job submit --working-dir . -- python -m physio_dist.launch ..."
    )


def _causes(error: BaseException | None) -> str:
    messages = []
    while error is not None:
        messages.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(messages)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
