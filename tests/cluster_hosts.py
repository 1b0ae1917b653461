"""Machines of a small cluster on this one, each with its own processes, network, name and files.

    laptop   10.77.0.9      a person's machine, from which `ray up` and `ray job submit` are given
    head     10.77.0.10     three machines in a rack, reached by ssh
    worker1  10.77.0.11
    worker2  10.77.0.12

Each is a set of Linux namespaces with an sshd and a home, /tmp, /data and /dev/shm of its own. They
are plugged into one switch and share the folder /shared, as by NFS. Programs are this machine's.
All of it hangs on one process, the rack: when that ends, every process in it does, and the kernel
takes networks and mounts away. It ends with the process that made it, whatever happens to that.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
TOOLS = ("unshare", "nsenter", "setpriv", "ip", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")
ADDRESSES = {"laptop": 9, "head": 10, "worker1": 11, "worker2": 12}
GATEWAY = "10.77.0.1"
SHARED_MB = 300
OWN_FOLDERS = ("root", "home", "tmp", "data", "run", "shared", "mnt")
"""Folders below / that each machine has for itself."""

_PATH = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_MACHINE = r"""
read -r plugged_in
hostname $NAME
mount -t tmpfs -o mode=755 rootfs $FILES/new
for path in /*; do
  name=${path#/}
  case " $OWN proc dev sys " in *" $name "*) continue ;; esac
  if [ -L $path ]; then cp -P $path $FILES/new/; continue; fi
  [ -d $path ] && mkdir $FILES/new/$name && mount --rbind $path $FILES/new/$name
done
for name in $OWN; do mkdir $FILES/new/$name; done
mount --bind $FILES/root $FILES/new/root
mount --bind $FILES/tmp $FILES/new/tmp
mount --bind $FILES/data $FILES/new/data
mount --bind $SHARED $FILES/new/shared
for path in $VISIBLE; do
  if ! [ -e $FILES/new$path ]; then mkdir -p $FILES/new$path; mount --bind $path $FILES/new$path; fi
done
mkdir $FILES/new/proc $FILES/new/dev $FILES/new/sys $FILES/new/run/sshd $FILES/new/old
mount --rbind /dev $FILES/new/dev
mount -t tmpfs -o mode=1777,size=4g shm $FILES/new/dev/shm
mount --rbind /sys $FILES/new/sys
pivot_root $FILES/new $FILES/new/old
cd /
mount -t proc proc /proc
umount -l /old
ip link set lo up
eval "$ONLINE"
exec /usr/sbin/sshd -D -e -f /root/.ssh/sshd_config < /dev/null
"""


def missing() -> str:
    """Why no machines can be made here, or ""."""
    if os.geteuid() != 0:
        return "only root can make them"
    absent = [tool for tool in TOOLS if not shutil.which(tool)]
    if absent:
        return f"{', '.join(absent)}: not installed (Debian: iproute2 openssh-server rsync)"
    trial = "ip link add name b0 type bridge && ip link add v0 type veth peer name v1"
    made = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "sh", "-c", trial],
        capture_output=True,
        text=True,
    )
    return "" if made.returncode == 0 else f"no namespaces: {made.stderr.strip()}"


class Machine:
    """One of the machines; `run` gives it a command as its user root would."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.files = name, folder / name
        self.address = f"10.77.0.{ADDRESSES[name]}"
        self.online = (
            f"ip link set eth0 up && ip address add {self.address}/24 dev eth0 && "
            f"ip route add default via {GATEWAY}"
        )
        """Commands that bring its network card up."""
        self.pid = 0
        self.started: list[subprocess.Popen[Any]] = []

    def start(self, command: str, log: Path | None = None) -> subprocess.Popen[str]:
        """`command` as a process that prints into `log`, or into a pipe."""
        inside = _inside(self.pid, "-m", "-n", "-p", "-u", "-i")
        clean = ("env", "-i", "HOME=/root", "USER=root", "LANG=C.UTF-8", f"PATH={_PATH}")
        with contextlib.ExitStack() as files:
            output: Any = files.enter_context(log.open("w")) if log else subprocess.PIPE
            process = subprocess.Popen(
                [*inside, *clean, "bash", "-c", f"cd; {command}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.started.append(process)
        return process

    def run(self, command: str, seconds: float = 60) -> str:
        """What `command` prints. Raises AssertionError with that where it fails."""
        with self.start(command) as process:
            try:
                printed = process.communicate(timeout=seconds)[0]
            except subprocess.TimeoutExpired:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                printed = f"{process.communicate()[0]}\n(ended after {seconds:g} s)"
        assert process.returncode == 0, f"{self.name}: {command}\n{printed}"
        return printed

    def processes(self, word: str) -> list[psutil.Process]:
        """Its processes that have `word` in their command lines."""
        return [
            p
            for p in psutil.Process(self.pid).children(recursive=True)
            if any(word in part for part in _command_line(p))
        ]


class Rack:
    """The machines, by name, and the folder that they share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pid = 0
        self.machines = {name: Machine(name, folder) for name in ADDRESSES}

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    @property
    def shared(self) -> Path:
        """What the machines have as /shared: a small disk, mounted where only they are."""
        return Path(f"/proc/{self._pid}/root{self.folder}/shared")

    @contextlib.contextmanager
    def running(self) -> Iterator[Rack]:
        """Make the machines; end them, and delete their files, afterwards."""
        shared = self.folder / "shared"
        shared.mkdir(parents=True)
        new = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        rack = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *new, "sleep", "infinity"])
        try:
            self._pid = _descendant(rack.pid, 1)
            disk = ("mount", "-t", "tmpfs", "-o", f"size={SHARED_MB}m", "disk", str(shared))
            subprocess.run([*_inside(self._pid, "-m"), *disk], check=True)
            self._on_switch("link set lo up")
            self._on_switch("link add switch type bridge")
            self._on_switch("link set switch up")
            self._on_switch(f"address add {GATEWAY}/24 dev switch")
            key = str(self.folder / "key")
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
            for machine in self.machines.values():
                self._make(machine)
            for machine in self.machines.values():
                self._until_it_answers(machine)
            yield self
        finally:
            rack.kill()
            for process in (rack, *(p for m in self.machines.values() for p in m.started)):
                process.wait()
            shutil.rmtree(self.folder, ignore_errors=True)

    def cut(self, name: str) -> None:
        """Pull the network cable of a machine."""
        self._on_switch(f"link set port-{name} down")

    def mend(self, name: str) -> None:
        """Put the cable back."""
        self._on_switch(f"link set port-{name} up")

    @contextlib.contextmanager
    def bad_line(self, name: str, seconds: float, loss: float) -> Iterator[None]:
        """Give a machine a cable that takes `seconds` each way and loses a share of all frames.

        The addresses stay, so that connections do.
        """
        machine = self[name]
        command = (sys.executable, ROOT / "tests/bad_line.py", self._pid, machine.pid, "bad")
        relay = subprocess.Popen(
            [*map(str, (*command, seconds, loss))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert relay.stdin and relay.stdout
        with relay:
            assert relay.stdout.readline() == b"there\n"
            card = json.loads(machine.run("ip --json link show eth0"))[0]["address"]
            machine.run("ip address flush dev eth0; ip link set eth0 down name good")
            machine.run(f"ip link set bad name eth0 address {card}; {machine.online}")
            self._on_switch("link set bad master switch up")
            yield
            relay.stdin.close()
        machine.run(f"ip link set good name eth0; {machine.online}")

    def _on_switch(self, command: str) -> None:
        subprocess.run([*_inside(self._pid, "-n"), "ip", *command.split()], check=True)

    def _make(self, machine: Machine) -> None:
        _own_files(machine, self.folder / "key")
        settings = {
            "PATH": _PATH,
            "NAME": machine.name,
            "ONLINE": machine.online,
            "FILES": str(machine.files),
            "SHARED": str(self.folder / "shared"),
            "OWN": " ".join(OWN_FOLDERS),
            "VISIBLE": " ".join(sorted({sys.prefix, sys.base_prefix, str(ROOT)})),
        }
        new = ("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc")
        with (self.folder / f"{machine.name}.log").open("w") as log:
            shell = subprocess.Popen(
                [*_inside(self._pid, "-m", "-n", "-p"), *new, "bash", "-ec", _MACHINE],
                env=settings,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        machine.started.append(shell)
        machine.pid = _descendant(shell.pid, 2)
        card = f"type veth peer name eth0 netns {machine.pid}"
        self._on_switch(f"link add port-{machine.name} {card}")
        self._on_switch(f"link set port-{machine.name} master switch up")
        assert shell.stdin
        with shell.stdin:
            shell.stdin.write(b"plugged in\n")

    def _until_it_answers(self, machine: Machine) -> None:
        knock = f"exec 3<>/dev/tcp/{machine.address}/22 && read -r banner <&3"
        deadline = time.monotonic() + 60
        while subprocess.run(
            [*_inside(self._pid, "-n"), "bash", "-c", knock], capture_output=True
        ).returncode:
            log = self.folder / f"{machine.name}.log"
            assert time.monotonic() < deadline, f"{machine.name}: {log.read_text()}"
            time.sleep(0.2)


def cluster_yaml(rack: Rack, cpus: int = 1) -> dict[str, Any]:
    """cluster.yaml of this repository, for the machines of the rack instead of AWS.

    Kept are all commands, mounts, variables and limits. Other than there, no container is started,
    all workers are, and each has `cpus` CPUs.
    """
    settings: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    workers = [m.address for name, m in rack.machines.items() if name.startswith("worker")]
    settings["provider"] = {
        "type": "local",
        "head_ip": rack["head"].address,
        "worker_ips": workers,
    }
    settings["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    settings["min_workers"] = settings["max_workers"] = len(workers)
    options = settings.pop("docker")["run_options"]
    variables = [o.removeprefix("--env ") for o in options if o.startswith("--env ")]
    variables = [v for v in variables if "<" not in v]
    types, head = settings.pop("available_node_types"), settings.pop("head_node_type")
    del settings["initialization_commands"]  # /data is there
    for kind, resources in (("head", types[head]["resources"]), ("worker", {"CPU": cpus})):
        # For nodes of the cloud the autoscaler sets this variable itself.
        given = f"RAY_OVERRIDE_RESOURCES='{json.dumps(resources)}'"
        key = f"{kind}_start_ray_commands"
        settings[key] = [f"export {' '.join(variables)} {given}; {c}" for c in settings[key]]
    return settings


# --- pieces ---------------------------------------------------------------------------------------


def _inside(pid: int, *namespaces: str) -> list[str]:
    return ["nsenter", "-t", str(pid), *namespaces, "--"]


def _descendant(pid: int, generations: int) -> int:
    """The only child of the only child ... of `pid`, which may still have to come."""
    deadline = time.monotonic() + 60
    for _ in range(generations):
        while not (children := psutil.Process(pid).children()):
            assert time.monotonic() < deadline, f"process {pid} has no child"
            time.sleep(0.05)
        pid = children[0].pid
    return pid


def _command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def _own_files(machine: Machine, key: Path) -> None:
    """The machine's folders, with one key for all, as its owner would have laid them out."""
    ssh = machine.files / "root/.ssh"
    for folder in (ssh, machine.files / "tmp", machine.files / "data", machine.files / "new"):
        folder.mkdir(parents=True)
    ssh.chmod(0o700)
    (machine.files / "tmp").chmod(0o1777)
    shutil.copy(key, ssh / "id_ed25519")
    shutil.copy(key.with_suffix(".pub"), ssh / "authorized_keys")
    (ssh / "sshd_config").write_text(
        "HostKey /root/.ssh/id_ed25519\nStrictModes no\nUsePAM no\nPidFile none\n"
    )
    (machine.files / "root/.bashrc").write_text(f"export PATH={_PATH}\n")
