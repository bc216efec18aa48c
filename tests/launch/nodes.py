"""Several nodes on one machine: namespaces with a network, a host name and processes of their own, joined by a switch.

A node is a process, the first of its namespaces of processes, mounts, host name and network. Killing that process kills
all others of the node at once, as a power cut does. The kernel then removes the namespaces and their network devices:
nothing is left behind however a test ends. The nodes see one file system.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv", "hostname", "mount")
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
SUBNET = "10.231.{pid}.{host}"


def why_no_nodes() -> str:
    """Reason why this machine cannot have nodes; empty if it can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install iproute2 util-linux hostname"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True, check=False)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else ""


class Node:
    """One node: its name, its address, and programs on it."""

    def __init__(self, name: str, address: str, parent: subprocess.Popen[bytes]) -> None:
        self.name, self.address = name, address
        self._parent = parent
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        _wait_for(lambda: children.read_text().split(), f"the first process of {name}")
        self.first_process = int(children.read_text().split()[0])

    def command(self, words: Sequence[object]) -> list[str]:
        """The command that runs `words` on this node."""
        return ["nsenter", "--target", str(self.first_process), *NAMESPACES, "--", *map(str, words)]

    def start(self, words: Sequence[object], log: Path, **settings: object) -> subprocess.Popen[bytes]:
        """Start a program whose output goes to a file. `settings` are those of Popen, such as env and cwd."""
        with log.open("ab") as file:
            return subprocess.Popen(self.command(words), stdout=file, stderr=file, stdin=subprocess.DEVNULL, **settings)

    def run(self, *words: object) -> str:
        """Run a program to its end and return its output."""
        done = subprocess.run(self.command(words), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{self.name}: {words}: {done.stdout}{done.stderr}"
        return done.stdout

    def kill(self) -> None:
        """Cut the power: every process of the node gets SIGKILL, and its network is gone."""
        self._parent.kill()
        self._parent.wait()
        _wait_for(lambda: not Path(f"/proc/{self.first_process}").exists(), f"the end of {self.name}")


class Nodes:
    """Nodes on one switch."""

    def __init__(self, nodes: list[Node], switch: Node) -> None:
        self._nodes, self._switch = nodes, switch

    def __getitem__(self, index: int) -> Node:
        return self._nodes[index]

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes)

    def link(self, index: int, state: str) -> None:
        """Set a node's port of the switch "up" or "down"; packets are then lost without an error on either side."""
        self._switch.run("ip", "link", "set", f"port{index}", state)

    def slow_down(self, index: int) -> str:
        """Make what a node sends slow, and return how: 50 ms later, or 4 Mbit/s where the kernel has no netem."""
        for way in ("netem delay 50ms", "tbf rate 4mbit burst 32kbit latency 400ms"):
            with contextlib.suppress(AssertionError):
                self._nodes[index].run("tc", "qdisc", "add", "dev", "eth0", "root", *way.split())
                return way
        raise AssertionError("this kernel can slow no link down: neither netem nor tbf")


@contextlib.contextmanager
def nodes_on_a_switch(count: int, folder: Path) -> Iterator[Nodes]:
    """Nodes named node0, node1, ... that reach each other by name, until the context ends."""
    subnet = os.getpid() % 250
    names = {f"node{index}": f"10.231.{subnet}.{index + 1}" for index in range(count)}
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items()))
    begin = f'hostname "$0"; mount --bind {hosts} /etc/hosts; ip link set lo up; exec sleep infinity'
    with contextlib.ExitStack() as stack:

        def node(name: str, address: str) -> Node:
            dies_with_us = ["setpriv", "--pdeathsig", "KILL"]
            words = [
                *dies_with_us,
                "unshare",
                *NAMESPACES,
                "--fork",
                "--kill-child",
                "--mount-proc",
                "bash",
                "-c",
                begin,
                name,
            ]
            parent = stack.enter_context(subprocess.Popen(words))
            stack.callback(parent.kill)
            made = Node(name, address, parent)
            _wait_for(lambda: name in made.run("hostname"), f"the host name of {name}")
            return made

        switch = node("switch", "")
        switch.run("ip", "link", "add", "bridge", "type", "bridge")
        switch.run("ip", "link", "set", "bridge", "up")
        made = [node(name, address) for name, address in names.items()]
        for index, each in enumerate(made):
            ours, theirs = f"x{os.getpid()}p{index}", f"x{os.getpid()}e{index}"
            _ip("link", "add", ours, "type", "veth", "peer", "name", theirs)
            _ip("link", "set", ours, "netns", str(switch.first_process))
            _ip("link", "set", theirs, "netns", str(each.first_process))
            switch.run("ip", "link", "set", ours, "name", f"port{index}", "master", "bridge", "up")
            each.run("ip", "link", "set", theirs, "name", "eth0", "up")
            each.run("ip", "address", "add", f"{each.address}/24", "dev", "eth0")
        yield Nodes(made, switch)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30)


def _wait_for(condition, what: str, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.02)
