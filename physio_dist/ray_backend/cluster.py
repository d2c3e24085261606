"""A Ray cluster as its drivers meet it: which one, whether it is large enough, where to look.

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
# What an earlier run held comes back within seconds of its end.
_RETURN_S = 15.0
# What Ray has begun to place on a machine that then lost its power stays there for 130 to 170 s, and all that is asked
# for later stays behind it.
_LOST_S = 240.0
_ANSWER_S = 2.0
_TELL_S = 10.0
# The opening of HTTP/2, which every gRPC server answers with its settings: a preface and an empty settings frame.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4

Say = Callable[[str], None]

_dashboard = ""


def connect(say: Say, hear_workers: bool = True, option: str = "RAY_ADDRESS") -> None:
    """Connect to the cluster that ``RAY_ADDRESS`` names, else to one that runs on this machine, else start one here.

    Args:
        say: told which cluster it is.
        hear_workers: whether what workers print is repeated here; it is in the dashboard in any case.
        option: where the address came from, for messages.

    Raises:
        UserError: there is no cluster at the address, it refuses this client, or it runs other versions.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address not in ("", "auto", "local"):
        _probe(address, option)
        # It answers, so that Ray need not try for 20 s what a wrong token will not change.
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "5")
    # What speaks HTTP/2 and is no cluster is asked by Ray for minutes, in a call that nothing interrupts.
    limit = threading.Timer(_CONNECT_S, _give_up, (address, option))
    limit.daemon = True
    if address not in ("", "local"):
        limit.start()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        # Ray says in a dozen lines what is said here in one.
        context = ray.init(logging_level="WARNING", log_to_driver=hear_workers)
    except (AuthenticationError, ConnectionError) as error:
        # A wrong token surfaces as a failed connection, for a reason that stands further down.
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
            # Ray takes it over, and would end the process with a status of its own.
            signal.signal(signal.SIGTERM, on_sigterm)
    global _dashboard
    _dashboard = context.dashboard_url or ""
    ours = any(child.name() == "gcs_server" for child in psutil.Process().children())
    what = "started a Ray cluster on this machine alone" if ours else f"Ray cluster at {_gcs_address()}"
    nodes, total = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
    gpus = f", {total['GPU']:g} GPU(s)" if total.get("GPU") else ""
    say(f"{what}: {nodes} node(s), {total.get('CPU', 0):g} CPU(s){gpus}")
    if url := dashboard_url():
        say(f"dashboard: {url}")


def dashboard_url() -> str | None:
    """Address of the dashboard of the cluster that was connected to, if it has one."""
    if not _dashboard:
        return None
    return _dashboard if "://" in _dashboard else f"http://{_dashboard}"


def free_slots(cpus: float, gpus: float) -> int:
    """How many workers of that size the living nodes can hold, were they empty."""
    count = 0
    for node in ray.nodes():
        if node["Alive"]:
            there = node["Resources"]
            fits = [there.get(name, 0.0) / each for name, each in (("CPU", cpus), ("GPU", gpus)) if each > 0]
            # A hair more, because a share of a CPU is no exact binary number.
            count += int(min(fits, default=0.0) + 1e-6)
    return count


def draining_nodes() -> set[str]:
    """Addresses of the nodes that were announced to go, by `ray drain-node`, an autoscaler or a provider's agent."""
    try:
        ids = set(ray._private.state.state.get_draining_nodes())
    except AttributeError:
        # Ray tells its own libraries alone, so another release may tell it elsewhere. Nothing but a notice is missed.
        return set()
    return {node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] in ids}


def require_resources(cpus: float, gpus: float, workers: int, wait_s: float, say: Say, option: str = "") -> None:
    """Make sure that ``workers`` of ``cpus`` and ``gpus`` each find room now, or within ``wait_s`` seconds.

    Args:
        cpus, gpus: of each worker.
        workers: that have to fit at the same time.
        wait_s: seconds to wait for nodes that an autoscaler may bring.
        say: is told at least every 10 s what is waited for.
        option: the one that sets ``wait_s``, for the message.

    Raises:
        UserError: they do not; the message says what is there and what was asked.
    """
    advice = "Ask for less or add nodes" + (f"; {option}=SECONDS waits for them" if option else "")
    if free_slots(cpus, gpus) < workers and wait_s <= 0:
        raise UserError(f"{describe_shortage(cpus, gpus, workers, unresponsive_nodes())}. {advice}")
    bundle = {name: each for name, each in (("CPU", cpus), ("GPU", gpus)) if each > 0}
    # A group that waits for its place is also what tells an autoscaler to bring nodes.
    group = placement_group([bundle] * workers, strategy="PACK")
    try:
        began, look_at, returns_s = time.monotonic(), 0.0, _RETURN_S
        # Whole seconds: Ray cuts fractions off.
        while not group.wait(1):
            waited = time.monotonic() - began
            if waited < look_at:
                continue
            lost = unresponsive_nodes()
            returns_s = _LOST_S if lost else returns_s
            enough, what = free_slots(cpus, gpus) >= workers, describe_shortage(cpus, gpus, workers, lost)
            patience = max(wait_s, returns_s) if enough else wait_s
            if waited >= patience:
                busy = "; others are using it" if enough else ""
                raise UserError(f"{what}{busy}. Waited {patience:g} s in vain. {advice}")
            say(f"waiting up to {patience - waited:.0f} s for room: {what}")
            look_at = min(waited + _TELL_S, patience)
    finally:
        remove_placement_group(group)


def unresponsive_nodes() -> list[str]:
    """Addresses of the nodes that Ray takes for living, as it does a lost one for a minute, and that do not answer."""
    nodes = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(32) as pool:
        return [address for (address, _), answers in zip(nodes, pool.map(_answers, nodes), strict=True) if not answers]


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def describe_shortage(cpus: float, gpus: float, workers: int, lost: Sequence[str]) -> str:
    """What was asked, what is there and which nodes are :func:`silent`, for a message."""

    def told(resources: dict[str, float]) -> str:
        return f"{resources.get('CPU', 0):g} CPU(s) and {resources.get('GPU', 0):g} GPU(s)"

    nodes = sum(node["Alive"] for node in ray.nodes())
    each = f"{cpus:g} CPU(s)" + (f" and {gpus:g} GPU(s)" if gpus else "")
    return (
        f"asked for {workers} worker(s) of {each}; the cluster has {told(ray.cluster_resources())} on {nodes} node(s), "
        f"{told(ray.available_resources())} of them free" + (f"; no answer from {', '.join(lost)}" if lost else "")
    )


def _probe(address: str, option: str) -> None:
    """Ask the address for a sign of life, because Ray itself asks for two minutes."""
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
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S) as link:
            answer = b"\0\0\0\4"
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                link.sendall(_HELLO)
                answer = link.recv(9)
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise UserError(
            f"no Ray cluster answers at {address} ({why}): start one with `ray start --head`, correct {option}, or "
            "set it to local to use this machine alone"
        ) from None
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise UserError(f"what answers at {address} is no Ray cluster: {option} takes the cluster's HOST:PORT")


def _give_up(address: str, option: str) -> None:
    def tell() -> None:
        raise UserError(
            f"what answers at {address} is no Ray cluster, or one too busy to let a driver in within {_CONNECT_S:g} s: "
            f"{option} takes the cluster's HOST:PORT"
        )

    os._exit(exit_status.status_of(tell))


def _gcs_address() -> str:
    return str(ray.get_runtime_context().gcs_address)


def _at(address: str) -> str:
    return f" at {address}" if address else ""


def _mismatch(told: str, address: str) -> str | None:
    """A message where Ray tells of other versions in the cluster, for which it has no class of error."""
    versions = re.findall(r"(Ray|Python): (\S+)", told)
    if "Version mismatch" not in told or len(versions) != 4:
        return None
    theirs, ours = (" and ".join(" ".join(pair) for pair in versions[i : i + 2]) for i in (0, 2))
    return (
        f"the Ray cluster{_at(address)} runs {theirs}, this driver {ours}: start it with the cluster's versions, or "
        "have it run there, which any version can: ray job submit --working-dir . -- python -m physio_dist.launch ..."
    )


def _causes(error: BaseException | None) -> str:
    told = []
    while error is not None:
        told.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(told)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
