"""New Python processes without the seconds that it takes to import torch: forks of a process that has imported it.

After ``install()``, ``subprocess`` starts a program as ever, unless this environment's own Python is to run a module,
a script or ``-c``: that is forked from a server, which has imported the libraries that `LAYERS` names and nothing of
vdm_hub. The fork is a process in every respect (its pid, signals, session, files and exit status are its own), and
finds the arguments, the path, the environment and the folder that a new interpreter finds.

What a library has read from the environment while it was imported stays in it. A server therefore keeps what was read,
and forks for those only who would read the same; for who agrees with none there is a new interpreter, and so there is
for who gives Python another option than `OPTIONS`: `NEW` is always new. The first server has imported the first of the
layers, and forks a further server, which imports the second one, for each environment in which the libraries of
Hugging Face differ. The Hub's address and folders are other ones in each test: these libraries are imported with the
`STAND_INS`, and a fork writes its own wherever one of them is kept.

Two things differ: the libraries are in ``sys.modules`` at once, and modules are not taken down at the end.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import itertools
import json
import os
import re
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
from typing import Any, NamedTuple
from urllib.parse import urlsplit

LAYERS = (
    "numpy scipy.stats torch torch._dynamo torch.distributed.run pandas pyarrow.csv pyarrow.dataset pyarrow.parquet "
    "PIL.Image matplotlib.pyplot sklearn.datasets safetensors.torch yaml jinja2 fsspec requests regex lazy_loader "
    "packaging.tags packaging.utils xml.etree.ElementTree sklearn.metrics sklearn.model_selection "
    "torch.utils.tensorboard matplotlib.backends.backend_agg PIL.JpegImagePlugin PIL.PdfImagePlugin "
    "PIL.TiffImagePlugin PIL.WebPImagePlugin",
    "huggingface_hub.hf_api datasets accelerate.commands.launch transformers.modeling_utils tenacity "
    "diffusers.pipelines.pipeline_utils diffusers.models.unets.unet_2d diffusers.models.unets.unet_2d_condition "
    "diffusers.models.autoencoders.autoencoder_kl diffusers.schedulers.scheduling_ddpm diffusers.training_utils "
    "diffusers.optimization diffusers.pipelines.ddpm.pipeline_ddpm diffusers.guiders.classifier_free_guidance",
)
# What is read below Python, or by going through the whole environment; PYTHONPATH alone is carried over.
READ_UNSEEN = ("ARROW_", "FSSPEC_", "GOMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_")
READ_UNSEEN += ("PYTHON", "TQDM_")

STAND_INS = {
    "HF_ENDPOINT": "http://no-such-hub:9",
    "HF_HOME": "/no-such-hub/home",
    "HF_MODULES_CACHE": "/no-such-hub/own",
}
NOWHERE = dict.fromkeys(STAND_INS, "http://nowhere")
LIMIT = 12  # servers of the second layer
OPTIONS = ("-u", "-P")  # of Python, that a fork may be given, too
FIRST = "first"  # the socket of the first server

# The start of a command for a new interpreter, where a test asks what is imported, or is about the process tree.
NEW = (sys.executable, "-q")


class Popen(subprocess.Popen):
    """``subprocess.Popen``, with a fork for a new interpreter where a server has one."""

    servers: str | None = None  # the folder of their sockets
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
        if Popen.servers is None:
            return False
        for address in [*sorted(Path(Popen.servers).glob("hub*")), Path(Popen.servers, FIRST)]:
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(address))
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
        program = words[1 + len(_options(words[1:])) :]
        return words[1:] if program and (program[0] in ("-c", "-m") or Path(folder, program[0]).is_file()) else []
    with Path(found).open("rb") as file:
        first = file.readline().rstrip()
    return [found, *words[1:]] if first[:2] == b"#!" and _is_python(os.fsdecode(first[2:])) else []


def _options(words: list[str]) -> list[str]:
    return list(itertools.takewhile(OPTIONS.__contains__, words))


def _is_python(name: str) -> bool:
    """Whether it is this environment's own, by whichever of its names."""
    return Path(name).absolute().parent == Path(sys.executable).parent and Path(name).name.startswith("python")


def install(servers: str | None = None) -> str | None:
    """Let ``subprocess`` fork from now on: from these servers, or from new ones, which end with this process."""
    if hasattr(os, "pidfd_open"):
        Popen.servers = servers or _start()
        subprocess.Popen = Popen
    return Popen.servers


def _start() -> str:
    folder = tempfile.TemporaryDirectory(prefix="forks_")
    atexit.register(folder.cleanup)
    listener = _listener(Path(folder.name, FIRST))
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command, number = [sys.executable, __file__, folder.name, str(listener.fileno())], listener.fileno()
    # Its standard input ends when this process does.
    life = subprocess.Popen(command, env=settings, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[number])
    atexit.register(life.communicate)
    return folder.name


def _listener(path: Path) -> socket.socket:
    """A socket that has its name when it can be connected to."""
    made = path.with_name(f".{path.name}")
    listener = socket.create_server(str(made), family=socket.AF_UNIX, backlog=100)
    made.rename(path)
    return listener


class Noting(type(os.environ)):
    """The environment, which notes the names that it is asked for."""

    read: set[str] = set()

    def __getitem__(self, name: str) -> str:
        if sys._getframe(1).f_globals["__name__"] != "fsspec.config":  # copies all, and looks for its own
            self.read.add(name)
        return str(super().__getitem__(name))

    def items(self) -> Any:
        return {self.decodekey(name): self.decodevalue(value) for name, value in self._data.items()}.items()


class Request(NamedTuple):
    """A program that is to run, and who waits for it."""

    connection: socket.socket
    files: list[int]
    words: list[str]
    settings: dict[str, str]
    folder: str
    group: list[int] | None
    ignored: list[int]

    @classmethod
    def accept(cls, listener: socket.socket) -> Request:
        connection = listener.accept()[0]
        files = socket.recv_fds(connection, 1, 3)[1]
        with connection.makefile() as lines:
            return cls(connection, files, *json.loads(lines.readline()))

    def close(self, answer: bytes = b"") -> None:
        for file in self.files:
            os.close(file)
        with contextlib.suppress(OSError), self.connection:
            self.connection.sendall(answer)


def serve(listener: socket.socket, before: dict[str, str], *waiting: Request, hubs: int = 0) -> tuple[Request, bool]:
    """Fork for each request that agrees with ``before``, and pass on how the fork ended; return in the fork.

    The first forks, as many as there may be servers of the Hub, are to be such servers, which see to the request.
    """
    selector = selectors.DefaultSelector()
    for waited_for in (listener, sys.stdin):
        selector.register(waited_for, selectors.EVENT_READ)
    requests = list(waiting)
    while True:
        for request in requests:
            if not _agrees(before, request):
                request.close(bytes(4))
            elif (pid := os.fork()) == 0:
                for other in list(selector.get_map().values()):
                    if other.data:
                        other.data[1].close()
                        os.close(other.fd)
                selector.close()
                listener.close()
                return request, hubs > 0
            elif hubs:
                request.close()
                hubs -= 1
            else:
                for file in request.files:
                    os.close(file)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, request.connection))
        requests = []
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                os._exit(0)
            elif key.fileobj is listener:
                requests.append(Request.accept(listener))
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


def _agrees(before: dict[str, str], request: Request) -> bool:
    """Whether a new interpreter would have imported the same modules, with the same values in them."""
    if request.group not in (None, _group()):
        return False
    settings = request.settings | {name: STAND_INS[name] for name in _replaced(request.settings) if name in before}
    unseen = {name for name in before | settings if name.startswith(READ_UNSEEN)} - {"PYTHONPATH"}
    after = {name: os.environ.get(name) for name in Noting.read | unseen}  # a library may have given it a value itself
    if any(settings.get(name) not in (before.get(name), after[name]) for name in after):
        return False
    imported = {name.partition(".")[0] for name in sys.modules}
    places = (Path(request.folder, place) for place in _path(request) if place not in sys.path)
    found = (path for place in places if place.is_dir() for path in place.iterdir())
    modules = (path for path in found if path.suffix in (".py", ".so") or (path / "__init__.py").exists())
    return not any(path.name.partition(".")[0] in imported for path in modules)


def _replaced(settings: dict[str, str]) -> list[str]:
    """Which names a stand-in is imported for: those with a value that no library changes before it keeps it."""
    plain = re.compile(r"https?://[^~$]*[^~$/]|/([^~$/]+/)*[^~$/]+")
    return [name for name in STAND_INS if plain.fullmatch(settings.get(name, ""))]


def _kept() -> list[tuple[Any, Any]]:
    """Where the libraries keep a stand-in, or what they have made of it: how it is written, and the value."""
    kept: list[tuple[Any, Any]] = []
    for holder in gc.get_objects():
        if type(holder) is dict:
            parts, write = holder, dict.__setitem__
        elif type(holder) is types.FunctionType:
            parts, write = {"__defaults__": holder.__defaults__}, setattr
        elif str(type(holder).__module__).startswith("huggingface_hub."):
            parts, write = getattr(holder, "__dict__", {}), setattr
        else:
            continue
        for name, value in parts.items():
            moved = _moved(value, NOWHERE)
            if moved is not value and moved != value:
                kept.append((functools.partial(write, holder, name), value))
    return kept


def _moved(value: Any, settings: dict[str, str]) -> Any:
    """The value that it would be if the settings had been there instead of their stand-ins."""
    kind = type(value)
    if kind is str and "no-such-hub" in value:
        for name, stand_in in STAND_INS.items():
            value = value.replace(stand_in, settings.get(name, stand_in))
        return value.replace("no-such-hub", urlsplit(settings.get("HF_ENDPOINT", "")).hostname or "no-such-hub")
    if issubclass(kind, Path):
        return kind(_moved(str(value), settings))
    if kind is tuple and value == _origin(STAND_INS["HF_ENDPOINT"]):
        return _origin(settings.get("HF_ENDPOINT", STAND_INS["HF_ENDPOINT"]))
    return kind(_moved(part, settings) for part in value) if kind in (tuple, frozenset) else value


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _path(request: Request) -> list[str]:
    """What stands before the installed packages on ``sys.path``."""
    options = _options(request.words)
    program = request.words[len(options)]
    script = Path(request.folder, program).resolve().parent
    places = request.settings.get("PYTHONPATH", "")
    own = [os.path.normpath(Path(request.folder, place)) for place in places.split(os.pathsep) if places]
    first = [] if "-P" in options else [{"-c": "", "-m": request.folder}.get(program, str(script))]
    return [*first, *dict.fromkeys(own)]


def become(request: Request, kept: list[tuple[Any, Any]]) -> list[str]:
    """What a new interpreter finds."""
    for number, file in enumerate(request.files):
        os.dup2(file, number)
        os.close(file)
    if request.group is None:
        os.setsid()
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.settings)
    for write, value in kept:
        write(_moved(value, request.settings))
    kept.clear()
    sys.orig_argv = [sys.executable, *request.words]
    sys.path[:0] = _path(request._replace(folder=str(Path.cwd())))
    importlib.invalidate_caches()
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    for number in request.ignored:
        signal.signal(number, signal.SIG_IGN)
    request.connection.sendall(os.getpid().to_bytes(4, "big"))
    request.connection.close()
    return request.words


def run(words: list[str]) -> int:
    """Run the program as ``__main__``; the exit status of Python."""
    options = _options(words)
    words = words[len(options) :]
    if "-P" in options:
        place = re.findall(r"(\w+)=", str(sys.flags)).index("safe_path")
        ctypes.pythonapi.PyStructSequence_SetItem(ctypes.py_object(sys.flags), place, ctypes.py_object(True))
    if "-u" in options:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            raw = io.FileIO(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, write_through=True))
            setattr(sys, f"__{name}__", getattr(sys, name))
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


def load(layer: str) -> list[tuple[Any, Any]]:
    """Import what is to be there in all forks."""
    os.environ.__class__ = Noting
    for name in layer.split():
        importlib.import_module(name)
    os.environ.__class__ = os._Environ
    kept = _kept()
    gc.collect()
    gc.freeze()
    return kept


def main() -> None:
    """``python fork_server.py FOLDER LISTENER``: import, and fork, and begin again."""
    folder, listener = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    before = dict(os.environ)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    del sys.path[0]
    subprocess.Popen = Popen  # some keep it by its name
    kept = load(LAYERS[0])
    request, hub = serve(listener, before, hubs=LIMIT)
    if hub:
        listener = _listener(Path(folder, f"hub{os.getpid()}"))
        before = request.settings | {name: STAND_INS[name] for name in _replaced(request.settings)}
        os.environ.clear()
        os.environ.update({name: value for name, value in before.items() if name != "PYTHONPATH"})
        kept = load(LAYERS[1])
        request, _ = serve(listener, before, request)
    signal.signal(signal.SIGINT, interrupt)
    install(folder)
    end(run(become(request, kept)))


if __name__ == "__main__":
    main()
