"""Hosts made from network namespaces: a bridge, a cable per host, and a private world in each.

A host has its own network, process tree, host name, ``/tmp``, ``/dev/shm`` and home; killing its
first process is a power cut. A cut loses packets silently: nothing is refused, nothing is reset.
Needs root; see shared/notes/infra.md, section 5.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

SUBNET = "10.77.0"
_NOWHERE = "02:00:00:00:00:01"
_TOOLS = ("ip", "unshare", "nsenter", "mount")


@functools.cache
def missing() -> str:
    """Return why hosts cannot be made here; nothing where they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    lacking = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed"
    name = f"avz-try-{os.getpid()}"
    for step in (
        ["ip", "netns", "add", name],
        ["ip", "netns", "exec", name, "ip", "link", "add", "name", "switch0", "type", "bridge"],
        ["ip", "netns", "exec", name, "unshare", "-m", "-u", "-p", "-f", "true"],
    ):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            return f"{' '.join(step)}: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return ""


def _do(*words: object, check: bool = True) -> str:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


class Host:
    """A machine of a ``Network``."""

    def __init__(self, net: Network, name: str, number: int, root: Path) -> None:
        self.net, self.name = net, name
        self.address = f"{SUBNET}.{number}"
        self.mac = f"02:77:00:00:00:{number:02x}"
        self.space = f"{net.prefix}-{name}"
        self.port = f"{net.prefix}{number}"
        """The bridge's end of its cable."""
        self.root = root / name
        self._init: subprocess.Popen[bytes] | None = None
        self._pid = 0
        _do("ip", "netns", "add", self.space)
        _do("ip", "-n", net.switch, "link", "add", self.port, "type", "veth",
            "peer", "name", "eth0", "netns", self.space)  # fmt: skip
        _do("ip", "-n", net.switch, "link", "set", self.port, "master", "switch0", "up")
        _do("ip", "-n", self.space, "link", "set", "eth0", "address", self.mac)
        _do("ip", "-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _do("ip", "-n", self.space, "link", "set", device, "up")
        # Ray learns its address from the route a packet would take; nobody is there to take one.
        _do("ip", "-n", self.space, "route", "add", "default", "via", f"{SUBNET}.253")

    def boot(self) -> None:
        """Start its first process; files in ``root`` survive, processes and ``/dev/shm`` do not."""
        folders = {part: self.root / part for part in ("tmp", "home", "etc")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{h.address} {' '.join([h.name, *h.aliases])}" for h in self.net.hosts.values()]
        hosts = "\n".join(["127.0.0.1 localhost", *lines])
        etc, ready = folders["etc"], self.root / "ready"
        ready.unlink(missing_ok=True)
        # Own /etc over the machine's; no name server, or every look-up would wait for one.
        script = (
            "set -e; mount --make-rprivate /; mount -t proc proc /proc; "
            f"mount -t tmpfs tmpfs {etc}; mkdir {etc}/upper {etc}/work; mount -t overlay overlay "
            f"-o lowerdir=/etc,upperdir={etc}/upper,workdir={etc}/work /etc; "
            f"echo '{hosts}' > /etc/hosts; echo > /etc/resolv.conf; "
            "mount -t tmpfs -o size=1g tmpfs /dev/shm; "
            f"hostname {self.name}; touch {ready}; mount --bind {folders['tmp']} /tmp; "
            "exec sleep infinity"
        )
        self._init = subprocess.Popen(
            ["ip", "netns", "exec", self.space, "unshare", "-m", "-u", "-p", "-f", "--kill-child",
             "sh", "-c", script],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait(ready.exists, 10, f"host {self.name} boots")
        child = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children")
        self._pid = int(child.read_text().split()[0])

    aliases: tuple[str, ...] = ()
    """Further names, such as a Service's."""

    def command(self, words: Sequence[object], env: Mapping[str, str] | None = None) -> list[str]:
        """Return a command line that runs a command on the host."""
        own = {"HOME": str(self.root / "home"), "TMPDIR": "/tmp"} | dict(env or {})  # noqa: S108 - its own
        return [
            "nsenter", "-t", str(self._pid), "-m", "-u", "-n", "-p",
            "env", *(f"{k}={v}" for k, v in own.items()), *map(str, words),
        ]  # fmt: skip

    def start(
        self, words: Sequence[object], log: str, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run a command in the background; what it prints goes to ``root/log``."""
        with (self.root / log).open("ab") as out:
            return subprocess.Popen(
                self.command(words, env),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd="/",
            )

    def run(
        self, words: Sequence[object], env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self.command(words, env),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            cwd="/",
        )

    def power_off(self) -> None:
        """Kill everything on it at once."""
        if self._init is not None:
            os.kill(self._pid, signal.SIGKILL)
            self._init.wait(timeout=20)
            self._init = None

    def log(self, name: str) -> str:
        """Return what a command started with ``log=name`` has printed."""
        path = self.root / name
        return path.read_text(errors="replace") if path.exists() else ""


class Network:
    """A switch and its hosts.

    Args:
        root: where hosts keep their files.
        names: of the hosts, addressed .1, .2, … in this order.
        aliases: further names of hosts.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        aliases: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.prefix = f"avz{os.getpid() % 10000}"
        self.switch = f"{self.prefix}-switch"
        self.hosts: dict[str, Host] = {}
        _do("ip", "netns", "add", self.switch)
        _do("ip", "-n", self.switch, "link", "add", "name", "switch0", "type", "bridge")
        _do("ip", "-n", self.switch, "link", "set", "switch0", "up")
        # The test itself sits at the switch: it may call servers on the hosts.
        _do("ip", "link", "add", f"{self.prefix}t", "type", "veth",
            "peer", "name", "test", "netns", self.switch)  # fmt: skip
        _do("ip", "-n", self.switch, "link", "set", "test", "master", "switch0", "up")
        _do("ip", "addr", "add", f"{SUBNET}.254/24", "dev", f"{self.prefix}t")
        _do("ip", "link", "set", f"{self.prefix}t", "up")
        try:
            for number, name in enumerate(names, start=1):
                self.hosts[name] = Host(self, name, number, root)
                self.hosts[name].aliases = tuple((aliases or {}).get(name, ()))
            for host in self.hosts.values():
                host.boot()
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def cut(self, name: str) -> None:
        """Lose every packet from and to a host."""
        _do("ip", "-n", self.switch, "link", "set", self[name].port, "nomaster")

    def heal(self, name: str) -> None:
        """Undo ``cut``."""
        _do("ip", "-n", self.switch, "link", "set", self[name].port, "master", "switch0")

    def cut_pair(self, one: str, other: str, both: bool = True) -> None:
        """Lose what ``one`` sends to ``other``, and the answers; others reach both."""
        for here, there in ((one, other), (other, one))[: 1 + both]:
            _do("ip", "-n", self[here].space, "neigh", "replace", self[there].address,
                "lladdr", _NOWHERE, "nud", "permanent", "dev", "eth0")  # fmt: skip

    def heal_pair(self, one: str, other: str) -> None:
        """Undo ``cut_pair``."""
        for here, there in ((one, other), (other, one)):
            _do("ip", "-n", self[here].space, "neigh", "del", self[there].address,
                "dev", "eth0", check=False)  # fmt: skip

    def close(self) -> None:
        """Power everything off and take the cables away."""
        for host in self.hosts.values():
            host.power_off()
            _do("ip", "netns", "del", host.space, check=False)
        _do("ip", "link", "del", f"{self.prefix}t", check=False)
        _do("ip", "netns", "del", self.switch, check=False)


def wait(ready: Callable[[], object], seconds: float, what: str) -> float:
    """Wait until a call returns something true; return the seconds it took."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        if ready():
            return time.monotonic() - begun
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds:.0f} s")
