"""Does a program pass its tests? They run here, in a grading worker; the program runs in a sandbox (sandbox.py).

Checks see the program's functions as proxies: arguments and results cross as values of plain types. So a program that
ends its process, patches a comparison or redefines a builtin does so among its own.
"""

import ast
import builtins
import contextlib
import importlib
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcpo_openrlhf.reward import sandbox
from dcpo_openrlhf.reward.cases import Checks

MOST_BYTES = 2**24
"""Of one answer, and of what a program prints beyond what is expected."""
MODULES = frozenset(
    {"bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools"}
    | {"json", "math", "operator", "random", "re", "statistics", "string", "typing"}
)
"""What tests may use without importing it; never the program's own of that name."""


class Failed(BaseException):
    """The program did not do what a test asks, or cannot be asked any more: no Exception, which a test may catch."""


class TimedOut(Failed):
    """Its time is over."""


def passes(program: str, tests: Checks, *, deadline_s: float) -> dict[str, Any]:
    """{"passed", "timed_out", "why", "lacking"} of a program, all of its tests within deadline_s seconds.

    lacking: what the kernel does not let the sandbox give up.
    """
    lacking: list[str] = []
    ends = time.monotonic() + deadline_s
    try:
        for case in tests.cases:
            _prints(program, *case, ends=ends, lacking=lacking)
        if tests.code:
            _survives(program, tests.code, ends=ends, lacking=lacking)
    except TimedOut:
        return {"passed": False, "timed_out": True, "why": "timed out", "lacking": lacking}
    except (Exception, SystemExit, Failed) as error:  # mostly a test's own: what it asserts does not hold
        return {
            "passed": False,
            "timed_out": False,
            "why": f"{type(error).__name__}: {error}"[:300],
            "lacking": lacking,
        }
    return {"passed": True, "timed_out": False, "why": "", "lacking": lacking}


class Program:
    """A running sandbox: requests and answers are lines of JSON. `output` is read where `stdin` was given."""

    def __init__(self, process: "subprocess.Popen[Any]", requests: int, replies: int, ends: float) -> None:
        self.process, self.requests, self.replies, self.ends = process, requests, replies, ends
        self._read = b""

    def send(self, request: Any) -> None:
        data = memoryview(json.dumps(request).encode() + b"\n")
        os.set_blocking(self.requests, False)
        while data:
            _wait([], [self.requests], self.ends)
            try:
                data = data[os.write(self.requests, data) :]
            except BrokenPipeError:
                raise Failed("the program has ended") from None

    def reply(self) -> dict[str, Any]:
        while b"\n" not in self._read:
            _wait([self.replies], [], self.ends)
            part = os.read(self.replies, 1 << 16)
            self._read += part
            if not part or len(self._read) > MOST_BYTES:
                raise Failed("the program has ended" if not part else "an answer is too long")
        line, _, self._read = self._read.partition(b"\n")
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise Failed("an answer is none") from None
        if not isinstance(found, dict):
            raise Failed("an answer is none")
        return found

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; what the program raised is raised here, as a builtin exception of that name."""
        self.send(request)
        found = self.reply()
        if "raised" in found:
            raise _exception(*found["raised"])
        return found


def _exception(name: str, message: str) -> BaseException:
    kind = getattr(builtins, str(name), None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):  # some want more than a message
            return kind(message)
    return RuntimeError(f"{name}: {message}")


@contextlib.contextmanager
def running(program: str, *, serve: bool, ends: float, **pipes: Any) -> Iterator[Program]:
    """A sandbox with the program, in an empty folder; it has ended, and the folder is gone, afterwards."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True))
        (theirs_in, requests), (replies, theirs_out) = os.pipe(), os.pipe()
        stack.callback(os.close, requests)
        stack.callback(os.close, replies)
        cpu_s = math.ceil(max(ends - time.monotonic(), 0)) + 1
        config = {"cpu_s": cpu_s, "serve": serve, "requests": theirs_in, "replies": theirs_out}
        process = subprocess.Popen(
            [sys.executable, "-I", str(Path(sandbox.__file__).resolve()), json.dumps(config)],
            # what the interpreter may need to start, and then lets go of
            env={name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"},
            cwd=folder,
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
            **pipes,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            running = Program(process, requests, replies, ends)
            running.send(program)
            yield running
        finally:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            process.wait()


def _wait(read: list[Any], write: list[Any], ends: float) -> tuple[list[Any], list[Any]]:
    found = select.select(read, write, [], max(0.0, ends - time.monotonic()))
    if not found[0] and not found[1]:
        raise TimedOut
    return found[0], found[1]


# --- programs that print


def _prints(program: str, given: str, expected: str, *, ends: float, lacking: list[str]) -> None:
    """Raises Failed unless the program prints what is expected, up to spaces at the ends of lines, and ends with 0."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running(program, serve=False, ends=ends, **pipes) as found:
        lacking[:] = found.reply().get("lacking", [])
        process, data, printed = found.process, memoryview(given.encode()), b""
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        while True:
            readable, writable = _wait([process.stdout], [process.stdin] if data else [], ends)
            if writable:
                try:
                    data = data[os.write(process.stdin.fileno(), data) :]
                except BrokenPipeError:  # it reads no more
                    data = memoryview(b"")
            if not data:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            if readable:
                part = os.read(process.stdout.fileno(), 1 << 16)
                printed += part
                if not part:
                    break
                if len(printed) > MOST_BYTES + len(expected):
                    raise Failed("endless output")
        try:
            code = process.wait(timeout=max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimedOut from None
    if code != 0:
        raise Failed(f"it ended with {code}")
    if _lines(printed.decode(errors="replace")) != _lines(expected):
        raise Failed("it printed something else")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


# --- programs that are called


def _survives(program: str, code: tuple[str, ...], *, ends: float, lacking: list[str]) -> None:
    """Runs the statements with the program's names as proxies. Raises whatever they raise."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with running(program, serve=True, ends=ends, **quiet) as found:
        lacking[:] = found.reply().get("lacking", [])
        loaded = found.reply()
        if "names" not in loaded:
            raise Failed(f"it does not run: {loaded.get('raised')}")
        namespace = _namespace(found, loaded["names"], code)
        for part in code:
            exec(compile(part, "tests", "exec"), namespace)
        found.ask(of=None, name=None)  # it is still there: no test has taken its end for something else


def _namespace(program: Program, names: list[str], code: tuple[str, ...]) -> dict[str, Any]:
    """What the tests find: the program's functions that they call, and modules of the standard library.

    A builtin is the program's only where the tests call nothing else of it, as those of a function named `sum`.
    """
    used, own = set[str](), set[str]()
    for node in (node for part in code for node in ast.walk(ast.parse(part))):
        if isinstance(node, ast.Name):
            (own if isinstance(node.ctx, ast.Store) else used).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            own |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    asked = (used - own - MODULES).intersection(names)
    unknown = {name for name in used - own - MODULES if not hasattr(builtins, name)}
    if unknown or len(asked) > 1:
        asked = {name for name in asked if not hasattr(builtins, name)}
    return {
        "__name__": "tests",
        **{name: _Function(program, name) for name in asked},
        **{name: importlib.import_module(name) for name in used & MODULES - own},
    }


class _Function:
    """A function or a class of the program's."""

    __slots__ = ("_call",)

    def __init__(self, program: Program, of: str | int, name: str | None = None) -> None:
        self._call = (program, of, name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        program, of, name = self._call
        reply = program.ask(of=of, name=name, arguments=sandbox.encode((arguments, keywords)))
        for argument, changed in zip(arguments, reply.get("changed") or (), strict=False):
            if changed is not None:
                _become(argument, _value(program, changed))
        return _value(program, reply.get("value"))


class _Object:
    """Something of the program's that has no plain form: equal to nothing but itself."""

    __slots__ = ("_at",)

    def __init__(self, program: Program, number: int) -> None:
        self._at = (program, number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        program, number = self._at
        value = _value(program, program.ask(of=number, name=name).get("value"))
        return _Function(program, number, name) if isinstance(value, _Object) else value


def _value(program: Program, form: Any) -> Any:
    try:
        return sandbox.decode(form, remote=lambda number: _Object(program, number))
    except ValueError as error:
        raise Failed(str(error)) from None


def _become(argument: Any, changed: Any) -> None:
    """What the program made of a list, a set or a dict that it was given."""
    if type(argument) is not type(changed):
        return
    if isinstance(argument, list | bytearray):
        argument[:] = changed
    elif isinstance(argument, set | dict):
        argument.clear()
        argument.update(changed)
