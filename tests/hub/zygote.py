"""Commands in processes of their own that need not import anything: a parent that already has forks for each.

The parent is started with the environment of a fresh shell, so that what libraries read from it while they are
imported (``HF_ENDPOINT``, ``HF_HOME``) is what the commands see.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

PRELOADED = (
    "hf_immunize.cli", "hf_immunize.hub", "hf_immunize.hub.signature", "hf_immunize.hub.tables", "hf_immunize.hub.load",
    "hf_immunize.hub.publishing", "hf_immunize.hub.rejudge", "hf_immunize.hub.recheck", "hf_immunize.report",
)
CLIENT = """#!{python} -IS
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
asked = {{"cwd": os.getcwd(), "script": {script}, "words": sys.argv[1:]}}
socket.send_fds(link, [json.dumps(asked).encode()], [0, 1, 2])
link.shutdown(socket.SHUT_WR)
answer = link.recv(1)
sys.exit(answer[0] if answer else 70)
"""


class Zygote:
    """Two programs in ``bin``: ``hf-immunize``, and ``python``, which takes ``-c`` and a program, or ``-m``.

    Args:
        environment: what commands find in ``os.environ``.
        modules: imported beforehand, beside what the verbs of publishing need.
        python: the interpreter; this one by default.
        forks: commands start their own commands, as ``run`` does its stages, as forks too.
    """

    def __init__(self, environment: dict[str, str], *modules: str, python: str = sys.executable,
                 forks: bool = False) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="zygote-")
        self.bin = Path(self._root.name)
        address = str(self.bin / "s")
        for name, script in (("hf-immunize", True), ("python", False)):
            (self.bin / name).write_text(CLIENT.format(python=python, address=address, script=script))
            (self.bin / name).chmod(0o755)
        self.environment = environment | {"PATH": f"{self.bin}:{environment['PATH']}"}
        told = [address, str(self.bin / "python") if forks else python, *PRELOADED, *modules]
        self._process = subprocess.Popen([python, __file__, *told], env=self.environment, stdout=subprocess.PIPE)
        assert self._process.stdout is not None and self._process.stdout.readline() == b"ready\n"

    def run(self, command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """Like ``subprocess.run`` with the two programs on the path."""
        command = [str(self.bin / command[0]) if (self.bin / command[0]).is_file() else command[0], *command[1:]]
        return subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=300)

    def close(self) -> None:
        """End the parent."""
        self._process.terminate()
        self._process.wait()
        self._root.cleanup()


def serve(address: str, executable: str, modules: list[str]) -> None:
    for module in modules:
        __import__(module)
    sys.executable = executable
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    door = socket.socket(socket.AF_UNIX)
    door.bind(address)
    door.listen()
    print("ready", flush=True)
    while True:
        link, _ = door.accept()
        if os.fork() == 0:
            door.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = work(link)
            link.send(bytes([code]))
            os._exit(code)
        link.close()


def work(link: socket.socket) -> int:
    """Run what was asked for in this process; its exit code."""
    data, descriptors, _, _ = socket.recv_fds(link, 1 << 20, 3)
    while more := link.recv(1 << 20):
        data += more
    asked = json.loads(data)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    os.chdir(asked["cwd"])
    try:
        if asked["script"] or asked["words"][:2] == ["-m", "hf_immunize.cli"]:
            sys.argv = ["hf-immunize", *asked["words"][0 if asked["script"] else 2 :]]
            sys.modules["hf_immunize.cli"].app()
        else:
            exec(compile(asked["words"][1], "<documentation>", "exec"), {"__name__": "__main__"})
    except SystemExit as done:
        if isinstance(done.code, str):
            print(done.code, file=sys.stderr)
        return done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], sys.argv[3:])
