"""Ceph's S3 gateway (RGW) on loopback: one monitor, one OSD, one gateway, as plain processes.

Debian: ``apt-get install --no-install-recommends radosgw ceph-mon ceph-osd``. No manager is needed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import uuid
from pathlib import Path

from tests.infra.servers import (
    KEY,
    LOOPBACK,
    SECRET,
    Process,
    ServerError,
    answers,
    free_port,
    wait_until,
)

_SECONDS = 60
"""For each administrative command; with nobody to talk to they would wait for ever."""


class Rgw:
    """An S3 gateway with a user whose keys are ``KEY`` and ``SECRET``.

    Args:
        folder: holds everything.
        port: of the endpoint.
        in_memory: keep objects in memory, which is quicker and lost when it stops.
        size: bytes of all objects.
    """

    name = "Ceph RGW"

    def __init__(
        self, folder: Path, port: int, in_memory: bool = False, size: int = 4 << 30
    ) -> None:
        self.folder, self.port = folder, port
        self._in_memory, self._size = in_memory, size
        self._conf = folder / "ceph.conf"
        self._mon, self._osd, self._gateway = (
            Process(folder, name) for name in ("mon", "osd", "rgw")
        )

    @staticmethod
    def missing() -> str:
        """Return what keeps it from running here; nothing when it can."""
        programs = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph")
        lacking = [name for name in programs if shutil.which(name) is None]
        return f"{', '.join(lacking)} not installed (.ci/infra-setup does it)" if lacking else ""

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://{LOOPBACK}:{self.port}"

    def alive(self) -> bool:
        """Return whether all three processes run."""
        return all(p.alive() for p in (self._mon, self._osd, self._gateway))

    def start(self) -> None:
        """Start it, unless it runs; the first time make its files."""
        if self.alive():
            return
        self.stop()
        if not (self.folder / "made").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self._make()
        self._spawn(self._mon, "ceph-mon", "-i", "a")
        self._do("ceph", "mon", "stat")
        if not (self.folder / "made").exists():
            self._make_osd()
        self._spawn(self._osd, "ceph-osd", "-i", "0")
        wait_until(self._osd_up, "ceph-osd", self._osd.log, self._osd.alive)
        self.start_gateway()
        if not (self.folder / "made").exists():
            self._do(
                "radosgw-admin",
                "user",
                "create",
                "--uid",
                "avzero",
                "--display-name",
                "avzero",
                "--access-key",
                KEY,
                "--secret-key",
                SECRET,
            )
            if not self._in_memory:
                (self.folder / "made").touch()

    def start_gateway(self) -> None:
        """Start the gateway alone, after ``stop_gateway``."""
        self._spawn(self._gateway, "radosgw", "-n", "client.rgw.a")
        wait_until(lambda: answers(self.url), "radosgw", self._gateway.log, self._gateway.alive)

    def stop_gateway(self) -> None:
        """End the gateway; what is stored stays."""
        self._gateway.stop()

    def stop(self) -> None:
        """End it."""
        for process in (self._gateway, self._osd, self._mon):
            process.stop()

    def _configuration(self, cluster: str, address: str) -> str:
        """Return ``ceph.conf`` for a monitor at an address, an OSD and a gateway."""
        store = "memstore" if self._in_memory else "bluestore"
        return f"""\
[global]
fsid = {cluster}
mon host = {address}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {self.folder}/keyring
run dir = {self.folder}/run
admin socket =
log file = {self.folder}/$name.log
pid file =
public addr = {LOOPBACK}
cluster addr = {LOOPBACK}
ms bind ipv6 = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail crit = 1
[mon]
mon data = {self.folder}/mon
[osd]
osd data = {self.folder}/osd
keyring = {self.folder}/osd/keyring
osd objectstore = {store}
memstore device bytes = {self._size}
bluestore block size = {self._size}
bluestore cache autotune = false
bluestore cache size = {64 << 20}
[client.rgw.a]
rgw frontends = beast endpoint={LOOPBACK}:{self.port} tcp_nodelay=1
rgw data = {self.folder}/run
"""

    def _make(self) -> None:
        """Write configuration, keys and the monitor's files."""
        for name in ("mon", "osd", "run"):
            (self.folder / name).mkdir(parents=True)
        cluster = uuid.uuid4()
        address = f"[v2:{LOOPBACK}:{free_port()},v1:{LOOPBACK}:{free_port()}]"
        self._conf.write_text(self._configuration(str(cluster), address))
        ring = ["--create-keyring", str(self.folder / "keyring")]
        for name, caps in (
            ("mon.", ["mon", "allow *"]),
            ("client.admin", ["mon", "allow *", "osd", "allow *"]),
            ("client.rgw.a", ["mon", "allow rw", "osd", "allow rwx"]),
        ):
            pairs = zip(caps[::2], caps[1::2], strict=True)
            options = [word for pair in pairs for word in ("--cap", *pair)]
            self._do("ceph-authtool", *ring, "--gen-key", "-n", name, *options)
            ring = [str(self.folder / "keyring")]
        monmap = str(self.folder / "monmap")
        self._do("monmaptool", "--create", "--addv", "a", address, "--fsid", str(cluster), monmap)
        self._do(
            "ceph-mon",
            "--mkfs",
            "-i",
            "a",
            "--monmap",
            monmap,
            "--keyring",
            str(self.folder / "keyring"),
        )

    def _make_osd(self) -> None:
        """Register the one OSD and make its files."""
        name = str(uuid.uuid4())
        secret = self._do("ceph-authtool", "--gen-print-key")
        note = self.folder / "osd.json"
        note.write_text(json.dumps({"cephx_secret": secret}))
        self._do("ceph", "osd", "new", name, "-i", str(note))
        note.unlink()
        (self.folder / "osd" / "keyring").write_text(f"[osd.0]\n\tkey = {secret}\n")
        self._do("ceph-osd", "-i", "0", "--mkfs", "--no-mon-config", "--osd-uuid", name)

    def _osd_up(self) -> bool:
        return "1 up" in self._do("ceph", "osd", "stat")

    def _spawn(self, process: Process, *command: str) -> None:
        process.start([*command, "-c", str(self._conf), "-f"])

    def _do(self, *command: str) -> str:
        """Run an administrative command; return what it printed."""
        own = [] if command[0] in ("ceph-authtool", "monmaptool") else ["-c", str(self._conf)]
        try:
            done = subprocess.run(
                [*command, *own], capture_output=True, text=True, check=False, timeout=_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(
                f"{' '.join(command[:3])}: no answer in {_SECONDS} s; see the logs in {self.folder}"
            ) from error
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise ServerError(f"{' '.join(command[:3])}: {lines[-1] if lines else 'failed'}")
        return done.stdout.strip()


def main() -> None:
    """Time a start: ``python -m tests.infra.ceph FOLDER``."""
    import sys

    rgw = Rgw(Path(sys.argv[1]), free_port(), in_memory="memory" in sys.argv)
    start = time.monotonic()
    rgw.start()
    print(f"{rgw.url} after {time.monotonic() - start:.1f} s")
    if "keep" not in sys.argv:
        rgw.stop()


if __name__ == "__main__":
    main()
