"""Mutation testing: one small change of the code at a time, and whether a test fails.

    python scripts/mutants.py                                  # all modules of tests/mutants.toml
    python scripts/mutants.py vdm_hub/training/parts/weights.py      # one

The changes are mutmut's, and three kinds of our own: a statement left out, a condition that always or never holds, one
reduction for another. Strings, refusals and what is printed are left alone, as no number or step depends on them. Each
mutant runs in a process forked from one that has imported torch and the tests; its code is never written to a file, so
tests that start processes of their own see the code as it is. mutmut's own runner passes over whatever is decorated
and over all that stands outside functions, where this project has many of its numbers.

A mutant that no test fails on is printed with its line. tests/mutants.toml says which tests are aimed at which module
and lists those that change nothing, each with its reason; any other that survives makes the exit status 1.

All modules take hours. tests/mutants.lock keeps a fingerprint of each that was found whole, of its code, its tests and
its entry: it is passed over until one of these changes; --all tries it again.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import hashlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, cast

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper
from mutmut.mutation import mutators

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "mutants.toml"
LOCK = ROOT / "tests" / "mutants.lock"
SPEAKS = {"warn", "print", "write", "log", "info", "debug", "warning"}
REDUCTIONS = {"mean": "sum", "sum": "mean", "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
REDUCTIONS |= {"amin": "amax", "amax": "amin", "floor": "ceil", "ceil": "floor", "all": "any", "any": "all"}
REDUCTIONS |= {"sqrt": "square", "exp": "expm1", "log": "log1p", "std": "var", "log_softmax": "softmax"}
HOW = {"device", "non_blocking", "foreach", "fused", "strict"}  # where, how fast, and what is refused: no number
HOW |= {"at_least", "at_most", "above", "below", "choices", "only_with"}  # the range of an option: the same
LEFT_ALONE = m.Annotation() | m.Decorator() | m.Raise() | m.Assert() | m.Import() | m.ImportFrom() | m.BaseString()
TESTS_PASS, TESTS_FAIL = 0, 1
MOST_MEMORY = 12 << 30  # bytes of addresses; importing torch takes 3 GiB of them. More fails, which is noticed


@dataclass(frozen=True)
class Mutant:
    """One change: where it is, how the line reads before and after, and the whole module with it."""

    line: int
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
        line = int(lines[0].split()[1].lstrip("-").partition(",")[0])
        before, after = (" ".join(x[1:].strip() for x in lines if x[0] == sign) for sign in "-+")
        made.append(Mutant(line, before, after, code, inner))
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
    """The tests aimed at one module, imported once; each run of them is a fork."""

    def __init__(self, module: Path, files: Sequence[str]) -> None:
        import pytest

        self.path, self.files = str(module), list(files)
        self.source = module.read_text()
        self.pytest = pytest.main
        sys.dont_write_bytecode = True
        import_first(module)
        with quiet():
            collected = self._pytest("--collect-only")
        if collected != TESTS_PASS:
            sys.exit(f"pytest can't collect {' '.join(files)}")
        self.old = code_by_name(compile(self.source, self.path, "exec"))
        gc.unfreeze()  # what tests/conftest.py freezes is not among all objects
        self.functions = [
            function
            for function in gc.get_objects()
            if type(function) is FunctionType and function.__code__.co_filename == self.path
        ]

    def _pytest(self, *arguments: str) -> int:
        how = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--assert=plain", "--hypothesis-profile=one_failure"]
        return int(self.pytest([*how, *arguments, *self.files]))

    def start(self, mutant: Mutant | None, seconds: float, loud: bool = False) -> int:
        """Run them in a process of their own on a mutant, or on the code as it is; gives the process's number."""
        if child := os.fork():
            return child
        status = TESTS_FAIL
        try:
            os.setpgid(0, 0)  # not a session of its own, which would leave the priority that this one was given
            with contextlib.nullcontext() if loud else quiet():
                resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 5))
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, 5 * seconds + 60)  # one that waits for ever takes no CPU time
                resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
                if mutant is not None:
                    self._become(mutant)
                gc.freeze()
                status = self._pytest()
        finally:
            os._exit(status)

    def _become(self, mutant: Mutant) -> None:
        new = code_by_name(compile(mutant.code, self.path, "exec"))
        if not mutant.within_function or not self._swap(new):
            self._import_anew(mutant)

    def _swap(self, new: dict[str, list[CodeType]]) -> bool:
        """Give the functions that are in use the mutant's code, if they have what it closes over."""
        if not self.functions:
            return False
        place = {id_of(code): (name, i) for name, codes in self.old.items() for i, code in enumerate(codes)}
        pairs = []
        for function in self.functions:
            name, i = place.get(id_of(function.__code__), ("", 0))
            if name not in new or len(new[name]) <= i:
                return False
            pairs.append((function, new[name][i]))
        if any(function.__code__.co_freevars != code.co_freevars for function, code in pairs):
            return False
        for function, code in pairs:
            function.__code__ = code
        return True

    def _import_anew(self, mutant: Mutant) -> None:
        """Forget the project and its tests: they are imported again, with the mutant's code."""
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(f"{ROOT}{os.sep}") and name != "__main__":
                del sys.modules[name]
        path, as_written = self.path, SourceFileLoader.get_code

        def get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
            return compile(mutant.code, path, "exec") if loader.path == path else as_written(loader, name)

        SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
        import_first(Path(path))


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


def survivors(tests: Tests, tried: Sequence[Mutant], jobs: int) -> list[Mutant]:
    """Those that no test fails on. One that runs ten times as long as the code as it is is noticed, too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if os.waitstatus_to_exitcode(os.waitpid(tests.start(None, 3600, loud=True), 0)[1]) != TESTS_PASS:
        sys.exit(f"{tests.path}: its tests fail without any change")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    limit = 10 * (spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime) + 10
    running: dict[int, tuple[Mutant, float]] = {}
    waiting, alive = list(reversed(tried)), []
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[tests.start(mutant, limit)] = mutant, time.monotonic()
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            mutant, _ = running.pop(child)
            if os.waitstatus_to_exitcode(status) == TESTS_PASS:
                alive.append(mutant)
                where = f"{tests.path}:{mutant.line}"
                print(f"  survives: {where}\n    - {mutant.before}\n    + {mutant.after}", flush=True)
            continue
        for child, (_, since) in running.items():
            if time.monotonic() - since > 30 * limit:  # it waits for something that never comes
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    return alive


def is_listed(mutant: Mutant, one: tuple[str, str | None]) -> bool:
    """Whether it is that change, or any change of that line where none is named."""
    return mutant.before == one[0] and one[1] in (None, mutant.after)


def test_module(module: str, entry: dict[str, Any], jobs: int, lines: range | None) -> int:
    """Try all mutants of a module; the exit status."""
    began = time.monotonic()
    path = ROOT / module
    tried = [mutant for mutant in mutants(path.read_text()) if lines is None or mutant.line in lines]
    print(f"{module}: {len(tried)} mutants, tests {' '.join(entry['tests'])}", flush=True)
    alive = survivors(Tests(path, [module, *entry["tests"]]), tried, jobs)
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


def fingerprint(module: str, entry: dict[str, Any]) -> str:
    """Of a module, the tests that are aimed at it, and its entry in the table."""
    files = sorted({module, *(test.partition("::")[0] for test in entry["tests"])})
    parts = [json.dumps(entry, sort_keys=True), *((ROOT / file).read_text() for file in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


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


def main() -> int:
    """Test the modules named, each in an interpreter of its own."""
    parser = argparse.ArgumentParser(description="Name the changes of the code that no test notices.")
    parser.add_argument("modules", nargs="*", help="paths of modules (default: all of tests/mutants.toml)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--lines", help="only mutants of these lines, as 10-25")
    parser.add_argument("--all", action="store_true", help="those too that were found whole, and have not changed")
    arguments = parser.parse_args()
    table = tomllib.loads(TABLE.read_text())
    modules = arguments.modules or list(table)
    if unknown := set(modules) - set(table):
        parser.error(f"{', '.join(sorted(unknown))}: not in {TABLE}, which says what tests are aimed at a module")
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
    first, _, last = (arguments.lines or "").partition("-")
    lines = range(int(first), int(last or first) + 1) if first else None
    return test_module(modules[0], table[modules[0]], arguments.jobs, lines)


if __name__ == "__main__":
    sys.exit(main())
