"""Mutation testing: one small change of the code at a time, and whether a test fails.

    python scripts/mutants.py                                  # all modules of tests/mutants.toml
    python scripts/mutants.py vdm_hub/training/parts/weights.py      # one

The changes are mutmut's, and three kinds of our own: a statement left out, a condition that always or never holds, one
reduction for another. Strings, refusals and what is printed are left alone, as no number or step depends on them. Each
mutant runs in a process forked from one that has collected the tests, of which those that come by the mutant's line go
first; what stands outside functions is imported with its change by a process that has not imported the project yet. No
code is written to a file, so tests that start processes of their own see it as it is. mutmut's own runner passes over
whatever is decorated and over all that stands outside functions, where this project has many of its numbers.

A mutant that no test fails on is printed with its line. tests/mutants.toml says which tests are aimed at which module
and lists those that change nothing, each with its reason; any other that survives makes the exit status 1.

All modules take hours. tests/mutants.lock keeps a fingerprint of each that was found whole, of its code, its tests,
with what these import of the tests, and its entry: it is passed over until one of these changes; --all tries it again.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import gc
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.machinery import SourceFileLoader
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, cast

import coverage
import libcst as cst
import libcst.matchers as m
import pytest
from libcst.metadata import MetadataWrapper
from mutmut.mutation import mutators

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "mutants.toml"
LOCK = ROOT / "tests" / "mutants.lock"
SCOPE = [f"vdm_hub/{folder}" for folder in ("diffusion", "objectives", "likelihood", "training")]
SPEAKS = {"warn", "print", "write", "log", "info", "debug", "warning"}
REDUCTIONS = {"mean": "sum", "sum": "mean", "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
REDUCTIONS |= {"amin": "amax", "amax": "amin", "floor": "ceil", "ceil": "floor", "all": "any", "any": "all"}
REDUCTIONS |= {"sqrt": "square", "exp": "expm1", "log": "log1p", "std": "var", "log_softmax": "softmax"}
HOW = {"device", "non_blocking", "foreach", "fused", "strict"}  # where, how fast, and what is refused: no number
HOW |= {"at_least", "at_most", "above", "below", "choices", "only_with"}  # the range of an option: the same
LEFT_ALONE = m.Annotation() | m.Decorator() | m.Raise() | m.Assert() | m.Import() | m.ImportFrom() | m.BaseString()
LIBRARIES = ("accelerate", "datasets", "diffusers", "hypothesis", "torch", "transformers")  # once, not in every fork
TESTS_PASS, TESTS_FAIL = 0, 1
MOST_MEMORY = 12 << 30  # bytes of addresses; importing torch takes 3 GiB of them. More fails, which is noticed


@dataclass(frozen=True)
class Mutant:
    """One change: where it is, how the line reads before and after, and the whole module with it."""

    line: int
    lines: range
    before: str
    after: str
    code: str
    within_function: bool


def changes(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """What may stand in a node's place."""
    if isinstance(node, cst.BaseNumber):
        yield from mutators.operator_number(node)
    elif isinstance(node, cst.Name):
        yield from mutators.operator_name(node)
    elif isinstance(node, cst.IfExp):
        yield from mutators.operator_if_exp(node)
    elif isinstance(node, cst.UnaryOperation):
        yield from mutators.operator_remove_unary_ops(node)
    elif isinstance(node, cst.Call):
        for i, argument in enumerate(node.args):  # an argument by name is one that may have a default
            if argument.keyword is not None and argument.keyword.value not in HOW:
                yield node.with_changes(args=[*node.args[:i], *node.args[i + 1 :]])
        name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
        if isinstance(name, cst.Name) and name.value in REDUCTIONS:
            yield node.with_deep_changes(name, value=REDUCTIONS[name.value])
    elif isinstance(node, cst.If | cst.CompIf):
        yield from (node.with_changes(test=cst.Name(always)) for always in ("True", "False"))
    elif isinstance(node, cst.SimpleStatementLine) and len(node.body) == 1 and is_a_step(node.body[0]):
        yield node.with_changes(body=[cst.Pass()])
    yield from mutators.operator_swap_op(node)
    yield from mutators.operator_keywords(node)


def is_a_step(statement: cst.CSTNode) -> bool:
    """Whether a statement does something that can be left out without leaving a name unbound."""
    if isinstance(statement, cst.Expr):
        return not isinstance(statement.value, cst.BaseString)
    return m.matches(statement, m.AugAssign() | m.Assign([m.AssignTarget(m.Subscript())]))


def is_left_alone(node: cst.CSTNode) -> bool:
    """Whether no number and no step depends on it."""
    if isinstance(node, cst.SimpleStatementLine) and isinstance(node.body[0], cst.Expr):
        call = node.body[0].value
        if isinstance(call, cst.Call):
            name = call.func.attr if isinstance(call.func, cst.Attribute) else call.func
            return isinstance(name, cst.Name) and name.value in SPEAKS
    if isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value in HOW:
        return True
    if isinstance(node, cst.If) and m.matches(node.test, m.Name("TYPE_CHECKING")):
        return True
    # A refusal: its condition is held by the tests of what is refused.
    if isinstance(node, cst.If) and node.orelse is None:
        return m.matches(node.body, m.IndentedBlock(body=[m.SimpleStatementLine([m.Raise()])]))
    return m.matches(node, LEFT_ALONE)


class Changes(cst.CSTVisitor):
    """Gathers all changes of a module."""

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, bool]] = []
        self._above: list[cst.CSTNode] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Gather those of one node, and go on within it, unless it is left alone."""
        if is_left_alone(node):
            return False
        # A default value is computed where the function is defined.
        inner = any(isinstance(above, cst.FunctionDef) for above in self._above)
        inner = inner and not any(isinstance(above, cst.Parameters) for above in self._above)
        self.found += [(node, new, inner) for new in changes(node)]
        self._above.append(node)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        """Go on outside of it."""
        if self._above and self._above[-1] is original_node:
            self._above.pop()


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a module."""
    module = MetadataWrapper(cst.parse_module(source)).module
    visitor = Changes()
    module.visit(visitor)
    made = []
    for old, new, inner in visitor.found:
        code = cast(cst.Module, module.deep_replace(old, cast(Any, new))).code
        lines = list(difflib.unified_diff(source.splitlines(), code.splitlines(), lineterm="", n=0))[2:]
        if not lines:
            continue
        first, _, many = lines[0].split()[1].lstrip("-").partition(",")
        before, after = (" ".join(x[1:].strip() for x in lines if x[0] == sign) for sign in "-+")
        where = range(int(first), int(first) + int(many or 1))
        made.append(Mutant(where.start, where, before, after, code, inner))
    return made


def code_by_name(code: CodeType) -> dict[str, list[CodeType]]:
    """All functions of a module by their qualified names, in the order in which they stand."""
    found: dict[str, list[CodeType]] = defaultdict(list)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found[constant.co_qualname].append(constant)
            for name, inner in code_by_name(constant).items():
                found[name] += inner
    return found


class Tests:
    """The tests aimed at one module; as a plugin of pytest, what runs them once they are collected.

    Each run is a fork. Those that come by a mutant's line go first, the quickest before the others, and the first that
    fails is the last: which mutants are noticed does not depend on the order, and most are by the first test.
    """

    def __init__(self, module: Path, files: Sequence[str], tried: Sequence[Mutant], jobs: int) -> None:
        self.path, self.files, self.tried, self.jobs = str(module), list(files), tried, jobs
        self.old = code_by_name(compile(module.read_text(), self.path, "exec"))
        self.functions: list[FunctionType] = []  # of the module, that are in use
        self.alive: list[Mutant] = []
        self.later: list[Mutant] = []  # what is known only once the module is imported with it
        self.wrong = ""
        self.limit = 3600.0  # seconds of a run
        self.seconds: dict[str, float] = defaultdict(float)  # of each test
        self.by_line: dict[int, list[str]] = {}  # the tests that come by it
        self.mutant: Mutant | None = None  # in a fork
        self.coverage: coverage.Coverage | None = None  # in the fork that runs the code as it is
        self.in_fork = False
        self.out = os.fdopen(os.dup(1), "w")  # whatever pytest does with what is printed

    def try_all(self) -> list[Mutant]:
        """The mutants that no test fails on."""
        sys.dont_write_bytecode = True
        for library in LIBRARIES:
            importlib.import_module(library)
        # What stands outside of functions is tried by processes that have not imported the project yet: libraries keep
        # classes of it (in their registries, in their modules), beside which a second import would be another project.
        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=self._try_within_functions, args=(sender,))
        process.start()
        sender.close()
        with contextlib.suppress(EOFError):
            self.alive, self.later, self.seconds, self.by_line, self.limit = receiver.recv()
        process.join()
        if process.exitcode:
            sys.exit(1)
        if self.later:
            as_it_is = replace(self.later[0], code=Path(self.path).read_text())
            if self._end_of(self._start(as_it_is, self._import)) != TESTS_PASS:
                sys.exit(f"{self.path}: its tests fail where they are imported with it, without any change")
        self._try(self.later, self._import)
        return self.alive

    def _try_within_functions(self, sender: Connection) -> None:
        """Gather those that no test fails on, and those that are tried later."""
        import_first(Path(self.path))
        with quiet():
            self._pytest()
        if self.wrong:
            sys.exit(f"{self.path}: {self.wrong}")
        sender.send((self.alive, self.later, self.seconds, self.by_line, self.limit))

    def _pytest(self) -> int:
        how = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--assert=plain", "--capture=sys"]
        return int(pytest.main([*how, "--hypothesis-profile=one_failure", *self.files], plugins=[self]))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Fork a run of the tests for each mutant; a fork runs them as pytest does."""
        if self.in_fork:
            self._sort(session.items)
            return None
        if session.testsfailed or not session.items:
            self.wrong = f"pytest can't collect {' '.join(self.files)}"
            return True
        gc.unfreeze()  # what tests/conftest.py freezes is not among all objects
        everything = [function for function in gc.get_objects() if type(function) is FunctionType]
        self.functions = [function for function in everything if function.__code__.co_filename == self.path]

        def run(mutant: Mutant | None) -> int:
            for function, code in self._swaps(mutant) or ():
                function.__code__ = code
            with contextlib.suppress(session.Failed):
                session.config.hook.pytest_runtestloop(session=session)
            return TESTS_FAIL if session.testsfailed else TESTS_PASS

        if self._run_as_it_is(run):
            now = [mutant for mutant in self.tried if self._swaps(mutant) is not None]
            self.later = [mutant for mutant in self.tried if self._swaps(mutant) is None]
            self._try(now, run)
        return True

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Those of a fork that collects them itself are sorted as the others are."""
        if self.in_fork:
            self._sort(items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note which lines a test comes by."""
        if self.coverage is not None:
            self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how long a test takes."""
        self.seconds[report.nodeid] += report.duration

    def _sort(self, items: list[pytest.Item]) -> None:
        """The tests that come by the mutant's line first; those of a file stay together, for what they share."""
        if self.mutant is None:
            return
        above = [line for line in self.by_line if line <= self.mutant.line]
        lines = [line for line in self.mutant.lines if line in self.by_line] or [max(above, default=0)]
        near = {test for line in lines for test in self.by_line.get(line, ())}
        of_file: dict[tuple[bool, Path], float] = defaultdict(float)
        for item in items:
            of_file[item.nodeid in near, item.path] += self.seconds[item.nodeid]

        def rank(item: pytest.Item) -> tuple[Any, ...]:
            far = item.nodeid not in near
            return far, of_file[not far, item.path], str(item.path), self.seconds[item.nodeid]

        items.sort(key=rank)

    def _run_as_it_is(self, run: Callable[[Mutant | None], int]) -> bool:
        """Run the tests on the code as it is; a mutant is given ten times as long, and ten seconds more."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory() as folder:
            notes = Path(folder, "notes.json")

            def noting(mutant: Mutant | None) -> int:
                self.coverage = coverage.Coverage(data_file=None, config_file=False, include=[self.path])
                self.coverage.start()
                status = run(mutant)
                self.coverage.stop()
                notes.write_text(json.dumps([self.seconds, self.coverage.get_data().contexts_by_lineno(self.path)]))
                return status

            if self._end_of(self._start(None, noting)) != TESTS_PASS:
                self.wrong = "its tests fail without any change"
                return False
            seconds, by_line = json.loads(notes.read_text())
        self.seconds.update(seconds)
        self.by_line = {int(line): tests for line, tests in by_line.items()}
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.limit = 10 * (spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime) + 10
        return True

    def _start(self, mutant: Mutant | None, run: Callable[[Mutant | None], int]) -> int:
        """Run the tests in a process of their own; gives its number."""
        if child := os.fork():
            return child
        status = TESTS_FAIL
        try:
            os.setpgid(0, 0)  # not a session of its own, which would leave the priority that this one was given
            with quiet():
                resource.setrlimit(resource.RLIMIT_CPU, (int(self.limit) + 1, int(self.limit) + 5))
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, 5 * self.limit + 60)  # who waits for ever takes no CPU time
                resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
                self.in_fork, self.mutant = True, mutant
                gc.freeze()
                status = run(mutant)
        finally:
            os._exit(status)

    @staticmethod
    def _end_of(child: int) -> int:
        """The exit status of a process, once it ends."""
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _try(self, tried: Sequence[Mutant], run: Callable[[Mutant | None], int]) -> None:
        """Gather those that no test fails on."""
        running: dict[int, tuple[Mutant, float]] = {}
        waiting = list(reversed(tried))
        while waiting or running:
            while waiting and len(running) < self.jobs:
                mutant = waiting.pop()
                running[self._start(mutant, run)] = mutant, time.monotonic()
            for child, (mutant, since) in list(running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    del running[child]
                    if os.waitstatus_to_exitcode(status) == TESTS_PASS:
                        self.alive.append(mutant)
                        where = f"{self.path}:{mutant.line}"
                        print(
                            f"  survives: {where}\n    - {mutant.before}\n    + {mutant.after}",
                            file=self.out,
                            flush=True,
                        )
                elif time.monotonic() - since > 30 * self.limit:  # it waits for something that never comes
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child, signal.SIGKILL)
            time.sleep(0.01)

    def _swaps(self, mutant: Mutant | None) -> list[tuple[FunctionType, CodeType]] | None:
        """The functions that are in use, and a mutant's code for each, if it has what they close over."""
        if mutant is None or not self.functions or not mutant.within_function:
            return None
        new = code_by_name(compile(mutant.code, self.path, "exec"))
        place = {id_of(code): (name, i) for name, codes in self.old.items() for i, code in enumerate(codes)}
        pairs = []
        for function in self.functions:
            name, i = place.get(id_of(function.__code__), ("", 0))
            if name not in new or len(new[name]) <= i:
                return None
            pairs.append((function, new[name][i]))
        alike = all(function.__code__.co_freevars == code.co_freevars for function, code in pairs)
        return pairs if alike else None

    def _import(self, mutant: Mutant | None) -> int:
        """Run the tests as they are imported with the mutant's code."""
        assert mutant is not None
        path, as_written = self.path, SourceFileLoader.get_code

        def get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
            return compile(mutant.code, path, "exec") if loader.path == path else as_written(loader, name)

        SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]
        import_first(Path(path))
        return self._pytest()


def import_first(module: Path) -> None:
    """Before pytest, which reads a module by itself that it is to look for doctests in: its classes would be two."""
    importlib.import_module(".".join(module.relative_to(ROOT).with_suffix("").parts))


def id_of(code: CodeType) -> tuple[str, int]:
    """What tells a function from the others of its module."""
    return code.co_qualname, code.co_firstlineno


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed within."""
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)


def is_listed(mutant: Mutant, one: tuple[str, str | None]) -> bool:
    """Whether it is that change, or any change of that line where none is named."""
    return mutant.before == one[0] and one[1] in (None, mutant.after)


def test_module(module: str, entry: dict[str, Any], jobs: int, lines: Container[int] | None) -> int:
    """Try all mutants of a module; the exit status."""
    began = time.monotonic()
    path = ROOT / module
    tried = [mutant for mutant in mutants(path.read_text()) if lines is None or mutant.line in lines]
    print(f"{module}: {len(tried)} mutants, tests {' '.join(entry['tests'])}", flush=True)
    alive = Tests(path, [module, *entry["tests"]], tried, jobs).try_all()
    listed = [(one["before"], one.get("after")) for one in entry.get("unnoticed", [])]
    new = [mutant for mutant in alive if not any(is_listed(mutant, one) for one in listed)]
    stale = [one for one in listed if lines is None and not any(is_listed(mutant, one) for mutant in alive)]
    print(
        f"{module}: {len(tried)} mutants, {len(tried) - len(alive)} killed, {len(alive) - len(new)} listed with a "
        f"reason, {len(new)} survive; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    for before, after in stale:
        print(f"  {TABLE.name} lists what does not survive:\n    - {before}\n    + {after or '(any change)'}")
    if not (new or stale) and lines is None:
        found_whole(module, entry)
    return int(bool(new or stale))


def helpers(tests: Iterable[str]) -> set[str]:
    """The tests' own modules that these files import, at whatever remove."""
    found, waiting = set[str](), list(tests)
    while waiting:
        names: set[str] = set()
        for node in ast.walk(ast.parse((ROOT / waiting.pop()).read_text())):
            if isinstance(node, ast.Import):
                names |= {one.name for one in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
        paths = (f"tests/{name.replace('.', '/')}.py" for name in names)
        new = {path for path in paths if (ROOT / path).is_file()} - found
        found |= new
        waiting += new
    return found


def fingerprint(module: str, entry: dict[str, Any]) -> str:
    """Of a module, the tests that are aimed at it, with what they import of the tests, and its entry in the table."""
    tests = {test.partition("::")[0] for test in entry["tests"]}
    files = sorted({module, "tests/conftest.py", *tests, *helpers(tests)})
    parts = [json.dumps(entry, sort_keys=True), *((ROOT / file).read_text() for file in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def left_out(table: Mapping[str, Any]) -> list[str]:
    """The modules with something to change that no tests are aimed at."""
    paths = (path for folder in SCOPE for path in sorted((ROOT / folder).rglob("*.py")))
    names = ((str(path.relative_to(ROOT)), path) for path in paths)
    return [name for name, path in names if name not in table and mutants(path.read_text())]


def known_whole() -> dict[str, str]:
    """The fingerprint of each module as it was when no mutant of it survived."""
    known: dict[str, str] = json.loads(LOCK.read_text()) if LOCK.exists() else {}
    return known


def found_whole(module: str, entry: dict[str, Any]) -> None:
    """Note that no mutant of a module survived."""
    known = known_whole() | {module: fingerprint(module, entry)}
    beside = LOCK.with_suffix(".partial")
    beside.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    beside.replace(LOCK)


def _span(words: str) -> range:
    """The lines from one to another, or one."""
    first, _, last = words.partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> int:
    """Test the modules named, each in an interpreter of its own."""
    parser = argparse.ArgumentParser(description="Name the changes of the code that no test notices.")
    parser.add_argument("modules", nargs="*", help="paths of modules (default: all of tests/mutants.toml)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--lines", help="only mutants of these lines, as 10-25,40")
    parser.add_argument("--all", action="store_true", help="those too that were found whole, and have not changed")
    arguments = parser.parse_args()
    table = tomllib.loads(TABLE.read_text())
    modules = arguments.modules or list(table)
    if unknown := set(modules) - set(table):
        parser.error(f"{', '.join(sorted(unknown))}: not in {TABLE}, which says what tests are aimed at a module")
    if not arguments.modules and (missing := left_out(table)):
        parser.error(f"no tests are aimed at {', '.join(missing)}: name them in {TABLE}")
    if not arguments.modules and not arguments.all:
        known = known_whole()
        modules = [name for name in table if known.get(name) != fingerprint(name, table[name])]
        print(f"{len(table) - len(modules)} of {len(table)} modules are as when they were found whole", flush=True)
        if not modules:
            return 0
    if len(modules) > 1:
        command = [sys.executable, __file__, "--jobs", str(arguments.jobs)]
        return max(subprocess.run([*command, module], check=False).returncode for module in modules)
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry != str(ROOT / "scripts"))]
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    lines = None if arguments.lines is None else set(itertools.chain(*map(_span, arguments.lines.split(","))))
    return test_module(modules[0], table[modules[0]], arguments.jobs, lines)


if __name__ == "__main__":
    sys.exit(main())
