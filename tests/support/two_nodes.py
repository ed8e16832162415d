"""Two machines for tests: network namespaces with an interface each, joined by a link, that see one file system.

Each has its own host name, temporary folder and caches.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


def missing() -> str | None:
    """Return why there can be no two nodes here, None where there can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need ip (Debian: iproute2) and unshare"
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True)
    return None if done.returncode == 0 else "network namespaces need root"


@dataclass
class TwoNodes:
    """names: of the namespaces; links: of their interfaces."""

    folder: Path
    names: tuple[str, str]
    links: tuple[str, str]

    def environment(self, rank: int) -> dict[str, str]:
        """Return what a node has of its own, and what docs/cluster.md tells to set on each."""
        own = self.folder / f"node{rank}"
        (own / "tmp").mkdir(parents=True, exist_ok=True)
        return {
            "TMPDIR": str(own / "tmp"),
            "HF_HOME": str(own / "hf"),
            "HF_DATASETS_CACHE": str(own / "datasets"),
            "XDG_CACHE_HOME": str(own / "cache"),
            "GLOO_SOCKET_IFNAME": self.links[rank],
            "PET_LOCAL_ADDR": f"10.99.0.{rank + 1}",  # the nodes do not know each other's names
            "NUM_MACHINES": "2",
            "MACHINE_RANK": str(rank),
            "MASTER_ADDR": "10.99.0.1",
            "MASTER_PORT": "29512",
            "NUM_PROCESSES": "2",
        }

    def start(self, rank: int, command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen:
        """Start a command on a node, its output into `log`."""
        enter = ["ip", "netns", "exec", self.names[rank], "unshare", "--uts"]
        named = ["sh", "-c", f'hostname node{rank}; exec "$@"', "sh"]
        with open(log, "wb") as file:
            return subprocess.Popen(
                [*enter, *named, *command],
                env=os.environ | self.environment(rank) | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def link(self, state: str) -> None:
        """Cut the link (down), or join it again (up)."""
        _ip("-n", self.names[1], "link", "set", self.links[1], state)

    def pids(self, rank: int) -> list[int]:
        """Return what runs on a node."""
        return [int(pid) for pid in _ip("netns", "pids", self.names[rank]).split()]

    def kill(self, rank: int) -> None:
        """Let a node die with all that runs on it."""
        for pid in self.pids(rank):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[TwoNodes]:
    """Make the nodes; at the end nothing runs on them, and they are gone."""
    mark = os.getpid() % 100000
    nodes = TwoNodes(folder, (f"ba{mark}a", f"ba{mark}b"), (f"ve{mark}a", f"ve{mark}b"))
    try:
        for name in nodes.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        peer = ["peer", "name", nodes.links[1], "netns", nodes.names[1]]
        _ip("link", "add", nodes.links[0], "netns", nodes.names[0], "type", "veth", *peer)
        for rank, (name, link) in enumerate(zip(nodes.names, nodes.links, strict=True)):
            _ip("-n", name, "address", "add", f"10.99.0.{rank + 1}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
        yield nodes
    finally:
        for rank, name in enumerate(nodes.names):
            with contextlib.suppress(subprocess.CalledProcessError):
                nodes.kill(rank)
                _ip("netns", "delete", name)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
