"""New Python processes without the seconds that it takes to import torch: forks of a process that has imported it.

After ``install()``, ``subprocess`` starts a program as ever, unless this environment's own Python is to run a module,
a script or ``-c``: that is forked from a server, which has imported the libraries that `LAYERS` names and nothing of
vdm_hub. The fork is a process in every respect (its pid, signals, session, files and exit status are its own), and
finds the arguments, the path, the environment and the folder that a new interpreter finds.

What a library has read from the environment while it was imported stays in it. A server therefore keeps what was read,
and forks for those only who would read the same. There are two, since the libraries of Hugging Face read much; who
agrees with neither gets a new interpreter, and so does who gives Python an option: `NEW` is always new.

Two things differ: the libraries are in ``sys.modules`` at once, and modules are not taken down at the end.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path
from typing import Any

LAYERS = (
    "numpy scipy.stats torch torch._dynamo torch.distributed.run pandas pyarrow.csv pyarrow.dataset pyarrow.parquet "
    "PIL.Image matplotlib.pyplot sklearn.datasets safetensors.torch yaml jinja2 fsspec requests regex lazy_loader "
    "packaging.tags packaging.utils xml.etree.ElementTree",
    "huggingface_hub.hf_api datasets accelerate.commands.launch transformers.modeling_utils tenacity "
    "diffusers.pipelines.pipeline_utils diffusers.models.unets.unet_2d diffusers.models.unets.unet_2d_condition "
    "diffusers.models.autoencoders.autoencoder_kl diffusers.schedulers.scheduling_ddpm diffusers.training_utils "
    "diffusers.optimization diffusers.pipelines.ddpm.pipeline_ddpm",
)
# What is read below Python, or by going through the whole environment; PYTHONPATH alone is carried over.
READ_UNSEEN = ("ARROW_", "FSSPEC_", "GOMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_")
READ_UNSEEN += ("PYTHON", "TQDM_")

# The start of a command for a new interpreter, where a test asks what is imported, or is about the process tree.
NEW = (sys.executable, "-q")


class Popen(subprocess.Popen):
    """``subprocess.Popen``, with a fork for a new interpreter where a server has one."""

    servers: list[str] | None = None  # their sockets, the one that has imported most first
    _server: socket.socket | None = None

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: Any, *rest: Any) -> None:  # fmt: skip
        (*pipes,), (_, *identity, new_session, group) = rest[:6], rest[6:]
        special = executable or preexec_fn or pass_fds or shell or isinstance(args, (str, bytes, os.PathLike))
        if not special and [*identity, group] == [None, None, None, -1, -1]:
            settings = {os.fsdecode(name): os.fsdecode(value) for name, value in (env or os.environ).items()}
            folder = Path(os.fsdecode(cwd or ".")).absolute()
            words = _program([os.fsdecode(word) for word in args], settings, folder) if folder.is_dir() else []
            files = [number if pipe == -1 else pipe for number, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
            if words and self._fork(words, settings, folder, new_session, files):
                self._close_pipe_fds(*pipes)
                return
        before = (args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell)
        super()._execute_child(*before, *rest)

    def _fork(self, words: list[str], settings: dict[str, str], folder: Path, session: bool, files: list[int]) -> bool:
        ignored = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
        for address in Popen.servers or ():
            server = socket.socket(socket.AF_UNIX)
            server.connect(address)
            socket.send_fds(server, [b" "], files)
            server.sendall(
                json.dumps([words, settings, str(folder), None if session else _group(), ignored]).encode() + b"\n"
            )
            if pid := int.from_bytes(server.recv(4), "big"):
                self.pid, self._server, self._child_created = pid, server, True
                return True
            server.close()
        return False

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._server is None:
            return super()._try_wait(wait_flags)
        self._server.setblocking(not wait_flags & os.WNOHANG)
        try:
            status = self._server.recv(4)
        except BlockingIOError:
            return 0, 0
        self._server.close()
        return self.pid, int.from_bytes(status, "big") if status else signal.SIGKILL

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        if self._server is None:
            return super()._internal_poll(_deadstate)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None and (status := self._try_wait(os.WNOHANG))[0]:
                    self._handle_exitstatus(status[1])
            finally:
                self._waitpid_lock.release()
        return self.returncode


def _program(words: list[str], settings: dict[str, str], folder: Path) -> list[str]:
    """What follows the name of Python; empty where something else is to run, or Python is given an option."""
    found = shutil.which(words[0], path=settings.get("PATH"))
    if found is None:
        return []
    if _is_python(found):
        program = words[2:] if words[1:2] == ["-u"] else words[1:]
        return words[1:] if program and (program[0] in ("-c", "-m") or Path(folder, program[0]).is_file()) else []
    with Path(found).open("rb") as file:
        first = file.readline().rstrip()
    return [found, *words[1:]] if first[:2] == b"#!" and _is_python(os.fsdecode(first[2:])) else []


def _is_python(name: str) -> bool:
    """Whether it is this environment's own, by whichever of its names."""
    return Path(name).absolute().parent == Path(sys.executable).parent and Path(name).name.startswith("python")


def install(servers: list[str] | None = None) -> list[str] | None:
    """Let ``subprocess`` fork from now on: from these servers, or from new ones, which end with this process."""
    if hasattr(os, "pidfd_open"):
        Popen.servers = servers or _start()
        subprocess.Popen = Popen
    return Popen.servers


def _start() -> list[str]:
    folder = tempfile.TemporaryDirectory(prefix="forks_")
    atexit.register(folder.cleanup)
    addresses = [str(Path(folder.name, str(number))) for number in range(len(LAYERS))]
    listeners = [socket.create_server(address, family=socket.AF_UNIX, backlog=100) for address in addresses]
    numbers = [listener.fileno() for listener in listeners]
    command = [sys.executable, __file__, *map(str, numbers), *addresses[::-1]]
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Its standard input ends when this process does.
    life = subprocess.Popen(command, env=settings, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=numbers)
    atexit.register(life.communicate)
    return addresses[::-1]


class Noting(type(os.environ)):
    """The environment, which notes the names that it is asked for."""

    read: set[str] = set()

    def __getitem__(self, name: str) -> str:
        if sys._getframe(1).f_globals["__name__"] != "fsspec.config":  # copies all, and looks for its own
            self.read.add(name)
        return str(super().__getitem__(name))

    def items(self) -> Any:
        return {self.decodekey(name): self.decodevalue(value) for name, value in self._data.items()}.items()


def serve(listener: socket.socket, before: dict[str, str]) -> tuple[socket.socket, list[int], Any]:
    """Fork for each request that agrees with ``before``, and pass on how the fork ended; return in the fork."""
    selector = selectors.DefaultSelector()
    for waited_for in (listener, sys.stdin):
        selector.register(waited_for, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                os._exit(0)
            elif key.fileobj is listener:
                connection = listener.accept()[0]
                files = socket.recv_fds(connection, 1, 3)[1]
                with connection.makefile() as lines:
                    request = json.loads(lines.readline())
                pid = os.fork() if _agrees(before, *request[:4]) else None
                if pid == 0:
                    for other in list(selector.get_map().values()):
                        if other.data:
                            other.data[1].close()
                            os.close(other.fd)
                    selector.close()
                    listener.close()
                    return connection, files, request
                for file in files:
                    os.close(file)
                if pid is None:
                    connection.sendall(bytes(4))
                    connection.close()
                else:
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
            else:
                pid, connection = key.data
                selector.unregister(key.fd)
                os.close(key.fd)
                status = os.waitpid(pid, 0)[1]
                with contextlib.suppress(OSError), connection:
                    connection.sendall(status.to_bytes(4, "big"))


def _group() -> list[int]:
    """A process can be forked into no other session and group than the server's own, or into a new one."""
    return [os.getsid(0), os.getpgrp()]


def _agrees(before: dict[str, str], words: list[str], settings: dict[str, str], folder: str, group: Any) -> bool:
    """Whether a new interpreter would have imported the same modules, with the same values in them."""
    if group not in (None, _group()):
        return False
    unseen = {name for name in before | settings if name.startswith(READ_UNSEEN)} - {"PYTHONPATH"}
    after = {name: os.environ.get(name) for name in Noting.read | unseen}  # a library may have given it a value itself
    if any(settings.get(name) not in (before.get(name), after[name]) for name in after):
        return False
    imported = {name.partition(".")[0] for name in sys.modules}
    places = (Path(folder, place) for place in _path(words, settings, folder) if place not in sys.path)
    found = (path for place in places if place.is_dir() for path in place.iterdir())
    modules = (path for path in found if path.suffix in (".py", ".so") or (path / "__init__.py").exists())
    return not any(path.name.partition(".")[0] in imported for path in modules)


def _path(words: list[str], settings: dict[str, str], folder: str) -> list[str]:
    """What stands before the installed packages on ``sys.path``."""
    program = next(word for word in words if word != "-u")
    script = Path(folder, program).resolve().parent
    places = settings.get("PYTHONPATH", "")
    own = [os.path.normpath(Path(folder, place)) for place in places.split(os.pathsep) if places]
    return [{"-c": "", "-m": folder}.get(program, str(script)), *dict.fromkeys(own)]


def become(connection: socket.socket, files: list[int], request: Any) -> list[str]:
    """What a new interpreter finds."""
    words, settings, folder, group, ignored = request
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    if group is None:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(settings)
    sys.orig_argv = [sys.executable, *words]
    sys.path[:0] = _path(words, settings, str(Path.cwd()))
    importlib.invalidate_caches()
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    connection.sendall(os.getpid().to_bytes(4, "big"))
    connection.close()
    return words


def run(words: list[str]) -> int:
    """Run the program as ``__main__``; the exit status of Python."""
    if words[0] == "-u":
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            raw = io.FileIO(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, write_through=True))
            setattr(sys, f"__{name}__", getattr(sys, name))
        words = words[1:]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        if words[0] == "-m":
            sys.argv = ["-m", *words[2:]]
            runpy._run_module_as_main(words[1])
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = words
            main.__file__ = str(Path(words[0]).absolute())
            exec(compile(Path(words[0]).read_bytes(), main.__file__, "exec"), main.__dict__)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def end(status: int) -> None:
    """As Python ends, without taking down the modules."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


def main() -> None:
    """``python fork_server.py LISTENER ... ADDRESS ...``: import, and fork, and begin again."""
    half = len(LAYERS) + 1
    listeners = [socket.socket(fileno=int(number)) for number in sys.argv[1:half]]
    addresses, before = sys.argv[half:], dict(os.environ)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    del sys.path[0]
    subprocess.Popen = Popen  # some keep it by its name
    os.environ.__class__ = Noting
    listener, *others = listeners
    for name in LAYERS[0].split():
        importlib.import_module(name)
    if not os.fork():
        *others, listener = listeners
        for name in LAYERS[1].split():
            importlib.import_module(name)
    os.environ.__class__ = os._Environ
    for other in others:
        other.close()
    gc.collect()
    gc.freeze()
    fork = serve(listener, before)
    signal.signal(signal.SIGINT, interrupt)
    install(addresses)
    end(run(become(*fork)))


if __name__ == "__main__":
    main()
