"""Python processes in which torch and diffusers are imported already.

Importing them takes several seconds. One process does so, and forks for each program: the fork
has these libraries, nothing of `customize`, and otherwise starts and ends like `python -c`.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

TORCH = "import numpy, safetensors.torch, torch"
DIFFUSERS = "import accelerate, peft, tests.tiny"
#: Runs the command line with the arguments of the process.
COMMAND = "import sys; from customize.cli import main; sys.exit(main())"

SERVER = """
import json, os, sys

def fork():
    while line := sys.stdin.readline():
        request = json.loads(line)
        if not (child := os.fork()):
            return request
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()

exec(sys.argv[1])
assert "customize" not in sys.modules
print("ready", flush=True)
request = fork()
for target, path in enumerate((os.devnull, request["out"], request["err"])):
    os.dup2(os.open(path, os.O_RDWR), target)
os.chdir(request["folder"])
os.environ.clear()
os.environ.update(request["environment"])
sys.argv = ["-c", *request["arguments"]]
exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
"""


#: Lines that have run in a program -> the program, until its end was waited for.
_running: dict[str, Forked] = {}


class Forked:
    """A running program.

    Attributes:
        pid: The process.
        output: The file with its standard output.
    """

    def __init__(
        self,
        code: str,
        *arguments: object,
        folder: Path = ROOT,
        preload: str = DIFFUSERS,
        **env: str,
    ) -> None:
        if before := _running.pop(preload, None):  # a test that failed did not wait for it
            os.kill(before.pid, signal.SIGKILL)
            before.wait()
        self._server = _server(preload)
        self._files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        out, err = (file.name for file in self._files)
        self.output = Path(out)
        request: dict[str, Any] = {"code": code, "arguments": list(map(str, arguments))}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        request |= {"out": out, "err": err, "folder": str(folder), "environment": environment}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        self.pid = int(self._server.stdout.readline())
        self._preload = preload
        _running[preload] = self

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait until the program ends; its exit status and output."""
        status = int(self._server.stdout.readline())
        _running.pop(self._preload, None)
        out, err = (file.read() for file in self._files)
        for file in self._files:
            file.close()
        return subprocess.CompletedProcess([], status, out, err)


def run_forked(
    code: str, *arguments: object, folder: Path = ROOT, preload: str = DIFFUSERS, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Args:
        code: The program.
        *arguments: Its arguments.
        folder: Its current folder.
        preload: Lines that have run in it; they must import nothing of `customize`.
        **env: Changes of its environment. Libraries in `preload` have read theirs before.
    """
    return Forked(code, *arguments, folder=folder, preload=preload, **env).wait()


@functools.cache
def _server(preload: str) -> Any:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, preload],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if server.stdout.readline() != "ready\n":
        raise RuntimeError(server.stderr.read())
    atexit.register(server.communicate)  # it ends with its input
    return server
