"""A program that nobody has read, in a process that can do little: run as a script, `python -I sandbox.py CONFIG`.

The process limits itself before the program's first line: CPU, memory, file size, processes, no environment, an empty
folder; where the kernel allows them, namespaces (no network, no other process in sight), Landlock (no file but
Python's own) and seccomp (no fork, exec, socket, signal). It knows no test: it answers calls with values made of plain
types alone (`encode`, `decode`), so that nothing it says can be more than a wrong value. Standard library only.
"""

import builtins
import collections
import collections.abc
import contextlib
import ctypes
import decimal
import fractions
import itertools
import json
import os
import platform
import resource
import struct
import sys
import types
from typing import Any

MEMORY_BYTES, FILE_BYTES, FOLDER_BYTES = 2**30, 2**24, 2**26
PROCESSES, OPEN_FILES = 64, 64
MOST_ITEMS = 10_000  # of an iterator, which is worked off before it is sent
DEPTH = 100

# --- values that cross the border


class Unsendable(TypeError):
    """A value without a plain form."""


def encode(value: Any, *, objects: list[Any] | None = None, depth: int = 0) -> list[Any]:
    """The value as JSON, its type named; one of no plain type is kept in `objects` and sent as its number."""
    if depth > DEPTH:
        raise Unsendable(f"a value nested more than {DEPTH} deep")

    def inner(values: Any) -> list[Any]:
        return [encode(v, objects=objects, depth=depth + 1) for v in values]

    if value is None or isinstance(value, bool):
        return ["const", value]
    if isinstance(value, int):
        return ["int", hex(int(value))]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, str):
        return ["str", str.__str__(value)]
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", [value.real.hex(), value.imag.hex()]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, inner(value)]
    if isinstance(value, dict):
        return ["dict", inner(value.items())]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), objects=objects, depth=depth + 1)
    if isinstance(value, fractions.Fraction | decimal.Decimal):
        return [type(value).__name__, str(value)]
    if isinstance(value, collections.deque):
        return ["deque", inner(value)]
    if hasattr(value, "__next__"):
        return ["iterator", inner(itertools.islice(value, MOST_ITEMS))]
    if isinstance(value, collections.abc.KeysView | collections.abc.ValuesView | collections.abc.ItemsView):
        return ["list", inner(value)]
    if objects is None:
        raise Unsendable(f"{type(value).__name__} has no plain form")
    objects.append(value)
    return ["object", len(objects) - 1]


def decode(form: Any, *, remote: Any = None) -> Any:
    """The value, of exactly a plain type; remote(n) stands for the n-th object. Raises ValueError for no form."""

    def inner(values: Any) -> list[Any]:
        return [decode(v, remote=remote) for v in values]

    try:
        kind, body = form
        match kind:
            case "const" if body is None or body is True or body is False:
                return body
            case "int":
                return int(body, 16)
            case "float":
                return float.fromhex(body)
            case "str" if isinstance(body, str):
                return body
            case "bytes" | "bytearray":
                return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(body)
            case "complex":
                return complex(*map(float.fromhex, body))
            case "list" | "tuple" | "set" | "frozenset" | "deque":
                return (getattr(builtins, kind, None) or collections.deque)(inner(body))
            case "Fraction":
                return fractions.Fraction(body)
            case "Decimal":
                return decimal.Decimal(body)
            case "iterator":
                return iter(inner(body))
            case "dict":
                return dict(inner(body))
            case "range":
                return range(*map(int, body))
            case "object" if remote is not None:
                return remote(int(body))
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"no value ({type(error).__name__})") from None
    raise ValueError("no value")


# --- what the process gives up

# fork vfork execve execveat ptrace process_vm_readv process_vm_writev setpgid setsid kill tkill tgkill
# socket unshare setns mount umount2 pivot_root chroot bpf keyctl add_key perf_event_open userfaultfd
_REFUSED = {  # by machine, in this order; aarch64 has no fork and vfork
    "x86_64": {57, 58, 59, 322, 101, 310, 311, 109, 112, 62, 200, 234}
    | {41, 272, 308, 165, 166, 155, 161, 321, 250, 248, 298, 323},
    "aarch64": {221, 281, 117, 270, 271, 154, 157, 129, 130, 131}
    | {198, 97, 268, 40, 39, 41, 51, 280, 219, 217, 241, 282},
}
_REFUSED_EVERYWHERE = {424, 425, 434, 438}  # pidfd_send_signal io_uring_setup pidfd_open pidfd_getfd
_MACHINES = {"x86_64": (0xC000003E, 56), "aarch64": (0xC00000B7, 220)}
"""The kernel's name of the machine in a filter, and the number of clone."""
_CLONE3, _CLONE_THREAD, _X32 = 435, 0x10000, 0x40000000
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 4, 38, 22
_READ = 0b1101  # Landlock: execute, read a file, read a folder
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _syscall(number: int, *arguments: Any) -> int:
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments))


def prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)))


def hide_memory() -> None:
    """No other process of this user may read this one's memory or environment under /proc."""
    prctl(_PR_SET_DUMPABLE, 0)


def _set_limits(cpu_s: int) -> None:
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for what, limit in limits.items():
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))


def _leave() -> None:
    """Namespaces of its own: no network, no other process; the folder is a small file system of its own."""
    user, group = os.getuid(), os.getgid()
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWIPC | os.CLONE_NEWNS)
    for name, text in (("setgroups", "deny"), ("gid_map", f"{group} {group} 1"), ("uid_map", f"{user} {user} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    private, nosuid_nodev = ctypes.c_ulong(0x44000), ctypes.c_ulong(0b110)
    with contextlib.suppress(OSError):  # without it, the bound is that of each file
        _checked(_libc.mount(None, b"/", None, private, None))
        size = f"size={FOLDER_BYTES}".encode()
        _checked(_libc.mount(b"tmpfs", os.getcwd().encode(), b"tmpfs", nosuid_nodev, size))
        os.chdir(os.getcwd())


def _close_files() -> None:
    """Landlock: Python's own files to read, the folder to write, nothing else."""
    version = _syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    rights = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("QQQ", rights, 0b11, 0b11)[:size]  # TCP; signals and abstract sockets to others
    rules = _syscall(444, attributes, ctypes.c_size_t(size), ctypes.c_uint(0))
    readable = {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"}
    allowed = dict.fromkeys(readable, _READ) | {"/dev/null": 0b110, "/dev/urandom": 0b100, os.getcwd(): rights}
    for path, right in allowed.items():
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        right &= rights if os.path.isdir(path) else 0b111 | rights & 1 << 14
        _syscall(445, ctypes.c_int(rules), ctypes.c_int(1), struct.pack("=Qi", right, handle), ctypes.c_uint(0))
        os.close(handle)
    _syscall(446, ctypes.c_int(rules), ctypes.c_uint(0))
    os.close(rules)


def _close_calls() -> None:
    """seccomp: no process but this one, no other program, no socket, no signal; threads are allowed."""
    audit, clone = _MACHINES[platform.machine()]
    refused = _REFUSED[platform.machine()] | _REFUSED_EVERYWHERE
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    steps += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _EPERM), (_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ENOSYS)]
    for number in refused:
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    steps += [(_EQUAL, 0, 3, clone), (_LOAD, 0, 0, 16), (_ANY_BIT, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, _EPERM)]
    steps += [(_RETURN, 0, 0, _ALLOW)]
    program = b"".join(struct.pack("HBBI", *step) for step in steps)
    code = ctypes.create_string_buffer(program, len(program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    _checked(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), filter_, ctypes.c_ulong(0), ctypes.c_ulong(0)))


def confine(cpu_s: int) -> list[str]:
    """Give up what can be given up, for good; returns in the confined process what the kernel does not allow."""
    lacking = []

    def attempt(step: Any, what: str) -> None:
        try:
            step()
        except (OSError, KeyError, AttributeError) as error:
            lacking.append(f"{what} ({error})")

    attempt(_leave, "namespaces: programs can reach the network")
    prctl(_PR_SET_PDEATHSIG, 9)
    child = os.fork()  # the first process of the new namespace: what it leaves behind ends with it
    if child:
        status = os.waitpid(child, 0)[1]
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    prctl(_PR_SET_PDEATHSIG, 9)
    _set_limits(cpu_s)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    attempt(_close_files, "Landlock: programs can read every file of this user")
    attempt(_close_calls, "seccomp: programs can start processes")
    os.environ.clear()
    return lacking


# --- the program


class _Server:
    """Answers calls on what the program defined, until the other side closes its end."""

    def __init__(self, requests: Any, replies: Any, namespace: dict[str, Any]) -> None:
        self.requests, self.replies, self.namespace = requests, replies, namespace
        self.objects: list[Any] = []

    def names(self) -> list[str]:
        """The functions and classes that the program defines."""
        return [name for name, value in self.namespace.items() if callable(value) and not name.startswith("__")]

    def serve(self) -> None:
        for line in self.requests:
            request = json.loads(line)
            try:
                reply = self._answer(request)
            except BaseException as error:
                reply = {"raised": [type(error).__name__, str(error)[:500]]}
            self.send(reply)

    def send(self, reply: dict[str, Any]) -> None:
        self.replies.write(json.dumps(reply).encode() + b"\n")
        self.replies.flush()

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        target = request["of"]
        if target is None:
            return {}
        found = self.namespace[target] if isinstance(target, str) else self.objects[target]
        if request["name"] is not None:
            found = getattr(found, request["name"])
        if "arguments" not in request:
            return {"value": encode(found, objects=self.objects)}
        arguments, keywords = decode(request["arguments"], remote=self.objects.__getitem__)
        value = found(*arguments, **keywords)
        changed = [
            encode(a, objects=self.objects) if isinstance(a, list | dict | set | bytearray) else None for a in arguments
        ]
        return {"value": encode(value, objects=self.objects), "changed": changed}


def main() -> None:
    """CONFIG: {"cpu_s", "serve", "requests", "replies"}; the two are descriptors, the program is the first request."""
    config = json.loads(sys.argv[1])
    requests, replies = os.fdopen(config["requests"], "rb"), os.fdopen(config["replies"], "wb")
    program = json.loads(requests.readline())
    lacking = confine(config["cpu_s"])
    sys.argv = ["program.py"]
    module = types.ModuleType("__main__" if not config["serve"] else "program")
    sys.modules[module.__name__] = module
    server = _Server(requests, replies, module.__dict__)
    server.send({"lacking": lacking})
    if not config["serve"]:
        requests.close()
        replies.close()
        exec(compile(program, "program.py", "exec"), module.__dict__)
        return
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
    except BaseException as error:
        server.send({"raised": [type(error).__name__, str(error)[:500]]})
        return
    server.send({"names": server.names()})
    server.serve()


if __name__ == "__main__":
    main()
