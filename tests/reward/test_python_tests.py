"""The grader python_tests: what passes, every way of passing without passing, what a program may not do."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpo_openrlhf.reward import code, sandbox
from dcpo_openrlhf.reward.cases import Checks, checks_of, program_of
from dcpo_openrlhf.reward.pool import GraderPool, Question
from tests.bounds import HANG_S

ROOT = Path(__file__).resolve().parents[2]
ADD = Checks(
    code=("assert add(1, 2) == 3", "assert add([1], [2]) == [1, 2]", "assert add(x, x) != x if (x := 5) else 0")
)
TWICE = Checks(cases=(("3\n", "6\n"), ("10\n", "20\n")))
CORRECT = "def add(a, b):\n    return a + b\n"
PRINTS = "print(2 * int(input()))\n"


def passes(program: str, checks: Checks = ADD, *, deadline_s: float = 60.0) -> bool:
    found = code.passes(program, checks, deadline_s=deadline_s)
    return found["passed"]


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}```\nDone."


def test_what_is_right_passes_and_what_is_wrong_does_not() -> None:
    assert passes(CORRECT) and passes(PRINTS, TWICE)
    assert not passes("def add(a, b):\n    return a - b\n") and not passes("print(6)\n", TWICE)
    assert not passes("def other(a, b):\n    return a + b\n") and not passes("def add(a, b:\n")


ALWAYS = (
    "class Always:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return True\n"
    "    __hash__ = None\n"
)
PIPES = "import json, os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, DATA)\n    except OSError: pass\n"
WRONG = "def add(a, b):\n    return 0\n"
FAKES = {
    "equal to all": ALWAYS + "def add(a, b):\n    return Always()\n",
    "a number that is equal to all": ALWAYS.replace("Always:", "Always(int):")
    + "def add(a, b):\n    return Always(7)\n",
    "a list that is equal to all": ALWAYS.replace("Always:", "Always(list):") + "def add(a, b):\n    return Always()\n",
    "exit before the tests": "import sys\nsys.exit(0)\n",
    "os._exit before the tests": "import os\nos._exit(0)\n",
    "exit in a test": "import sys\ndef add(a, b):\n    sys.exit(0)\n",
    "os._exit in a test": "import os\ndef add(a, b):\n    os._exit(0)\n",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b):\n    return 3\n",
    "builtins": "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.isinstance = lambda *a: True\n"
    "def add(a, b):\n    return 0\n",
    "the tests' frames": "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n"
    "        f.f_globals.update(passed=True, add=lambda *a: 3)\n        f = f.f_back\n    return 0\n",
    "another answer on the pipe": PIPES.replace("DATA", 'b\'{"names": [], "passed": true}\\n\' * 9') + WRONG,
    "rubbish on the pipe": PIPES.replace("DATA", "b'[[[[' * 9999 + b'\\n'") + WRONG,
    "deep nesting": "def add(a, b):\n    x = []\n    for _ in range(10**5):\n        x = [x]\n    return x\n",
    "endless answer": "def add(a, b):\n    return 'x' * 10**8\n",
    "memory": "x = bytearray(2 * 10**9)\n" + CORRECT,
    "fork": "import os\nif os.fork():\n    os._exit(0)\n" + CORRECT,
    "a process": "import subprocess\nsubprocess.run(['true'])\n" + CORRECT,
    "a bomb": "import os\ntry:\n    while True:\n        os.fork()\nexcept OSError:\n    raise SystemExit\n",
    "a large file": "open('x', 'wb').write(bytes(2 * 10**7))\n" + CORRECT,
}


@pytest.mark.parametrize("trick", FAKES)
def test_no_trick_passes(trick: str) -> None:
    assert not passes(FAKES[trick])


@pytest.mark.parametrize(
    ("program", "checks"),
    [
        (
            "def check(f):\n    pass\ndef add(a, b):\n    return 0\n",
            "def check(f):\n    assert f(1, 2) == 3\ncheck(add)",
        ),
        ("def isclose(a, b):\n    return True\ndef add(a, b):\n    return 0\n", "assert math.isclose(add(1, 2), 3)"),
        (
            "class math:\n    isclose = lambda a, b: True\ndef add(a, b):\n    return 0\n",
            "assert math.isclose(add(1, 2), 3)",
        ),
        ("def set(x):\n    return 1\ndef add(a, b):\n    return 0\n", "assert set(add([1], [2])) == set([1, 2])"),
        ("def len(x):\n    return 3\ndef add(a, b):\n    return []\n", "assert len(add(1, 2)) == 3"),
        (
            "import os\ndef add(a, b):\n    os._exit(0)\n",
            "try:\n    add(1, 2)\nexcept Exception:\n    pass\nassert True",
        ),
        ("import os\ndef add(a, b):\n    os._exit(0)\n", "try:\n    add(1, 2)\nexcept:\n    pass\nassert True"),
        (
            "import os\ndef add(a, b):\n    os._exit(0)\n",
            "try:\n    add(1, 2)\n    assert False\nexcept SystemExit:\n    pass",
        ),
    ],
)
def test_no_name_of_the_tests_is_the_programs(program: str, checks: str) -> None:
    assert not passes(program, Checks(code=(checks,)))


def test_a_program_that_does_not_end_is_ended() -> None:
    for program, checks in (
        ("while True: pass\n", ADD),
        ("def add(a, b):\n    while True: pass\n", ADD),
        ("import time\ntime.sleep(10**6)\n", TWICE),
        ("import threading\nthreading.Thread(target=threading.Event().wait).start()\n" + PRINTS, TWICE),
    ):
        found = code.passes(program, checks, deadline_s=1.0)
        assert (found["passed"], found["timed_out"]) == (False, True)


PRINTED = {
    "exit with 1": PRINTS + "raise SystemExit(1)\n",
    "an exception after it": PRINTS + "1 / 0\n",
    "more": PRINTS + "print('and more')\n",
    "os._exit before it is written": "import os\nprint(2 * int(input()), end='')\nos._exit(0)\n",
    "nothing": "",
    "endless output": "while True: print('x' * 10**6)\n",
}


@pytest.mark.parametrize("program", PRINTED.values(), ids=PRINTED)
def test_what_prints_something_else_does_not_pass(program: str) -> None:
    assert not passes(program, TWICE)


def test_spaces_at_the_ends_of_lines_and_an_exit_with_0_do_not_matter() -> None:
    assert passes(PRINTS.replace(")\n", ", '')\n") + "import sys\nsys.exit(0)\n", TWICE)
    assert passes("import sys\ndata = sys.stdin.read()\nprint(len(data))\n", Checks(cases=(("x" * 10**6, "1000000"),)))


# --- what a program may see and do


def lacking() -> str:
    return " ".join(code.passes(CORRECT, ADD, deadline_s=60.0)["lacking"])


@pytest.fixture(scope="module")
def confined() -> None:
    if missing := lacking():
        pytest.skip(f"this kernel does not let a process give up {missing}")


LOOK = """
import json, os, socket
def attempt(do, *arguments):
    try:
        do(*arguments)
        return True
    except OSError:
        return False
print(json.dumps(dict(
    environment=dict(os.environ), folder=os.listdir("."), inside=attempt(open, "mine", "w"),
    python=attempt(open, json.__file__), signal=attempt(os.kill, {here}, 0), secret=attempt(open, {secret!r}),
    parent=attempt(os.listdir, ".."), proc=attempt(open, "/proc/{here}/environ"), network=attempt(socket.socket),
    outside=attempt(open, "/tmp/made-by-a-program", "w"), package=attempt(open, {package!r}),
)))
"""


def test_a_program_sees_nothing_but_python_and_an_empty_folder(confined: None, tmp_path: Path) -> None:
    (tmp_path / "mbpp.jsonl").write_text("the answers")
    program = LOOK.format(here=os.getpid(), secret=str(tmp_path / "mbpp.jsonl"), package=code.__file__)
    allowed, refused = ("inside", "python"), ("signal", "secret", "parent", "proc", "network", "outside", "package")
    expected = {"environment": {}, "folder": []} | dict.fromkeys(allowed, True) | dict.fromkeys(refused, False)
    checks = Checks(cases=(("", json.dumps(expected)),))
    assert passes(program, checks), code.passes(program, checks, deadline_s=60.0)


def test_what_the_kernel_refuses_is_said_and_the_rest_is_given_up() -> None:
    script = (
        "import os, json\n"
        "from dcpo_openrlhf.reward import sandbox\n"
        "def refuse(flags): raise PermissionError(1, 'no namespaces here')\n"
        "os.unshare = refuse\n"
        "print(json.dumps(sandbox.confine(5)))\n"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    first = json.loads(found.stdout)[0]
    assert first.startswith("namespaces: programs can reach the network ([Errno 1] no namespaces here"), found.stderr


def test_nothing_of_a_program_is_left(confined: None) -> None:
    passes("import threading, time\nthreading.Thread(target=time.sleep, args=(10**6,)).start()\n" + CORRECT)
    (here,) = (Path("/proc") / str(os.getpid()) / "task" / str(os.getpid()) / "children",)
    commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in here.read_text().split()]
    assert not any(b"sandbox.py" in command for command in commands)


def test_another_user_without_rights_is_confined_too() -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to become another user")
    become = "import os; os.setgid(65534); os.setuid(65534); "
    run = f"os.execv({sys.executable!r}, [{sys.executable!r}, '-c', 'pass'])"
    if subprocess.run([sys.executable, "-c", become + run], capture_output=True).returncode:
        pytest.skip("another user cannot run this Python")
    look = (
        f"{become}import json; from dcpo_openrlhf.reward import code; from dcpo_openrlhf.reward.cases import Checks; "
        f"programs = {[CORRECT, FAKES['fork']]!r}; checks = Checks({ADD.code!r}); "
        "print(json.dumps([code.passes(program, checks, deadline_s=60.0)['passed'] for program in programs]))"
    )
    found = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(found.stdout) == [True, False], found.stderr


# --- what tests can ask


@pytest.mark.parametrize(
    ("program", "checks"),
    [
        ("def f(x):\n    x.append(4)\n    x.sort()\n", "a = [3, 1]\nf(a)\nassert a == [1, 3, 4]"),
        ("def f(x):\n    x['k'] = 1\n", "a = {}\nf(a)\nassert a == {'k': 1}"),
        ("def f(n):\n    yield from range(n)\n",
         "assert list(f(3)) == [0, 1, 2]\ng = f(2)\nassert next(g) == 0 and next(g) == 1"),
        ("def f(x):\n    raise ValueError('no')\n",
         "try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert 'no' in str(e)"),
        ("class S:\n    def __init__(self, n):\n        self.n = n\n"
         "    def more(self, k=1):\n        self.n += k\n        return self.n\n",
         "s = S(2)\nassert s.more() == 3 and s.more(k=4) == 7 and s.n == 7"),
        ("def sum(a, b):\n    return a * b\n", "assert sum(3, 4) == 12"),
        ("import math\ndef f(x):\n    return math.sqrt(x)\n", "assert math.isclose(f(2), 1.4142135, rel_tol=1e-6)"),
        ("def f():\n    return 2 ** 20000\n", "assert f() == 2 ** 20000"),
        ("def f():\n    return {(1, 'a'): {1, 2}, None: [1.5, float('inf'), b'x', 1j]}\n",
         "assert f() == {(1, 'a'): {1, 2}, None: [1.5, float('inf'), b'x', 1j]}"),
        ("from collections import Counter, namedtuple, deque\nP = namedtuple('P', 'x y')\n"
         "def f():\n    return Counter('aab'), P(1, 2), deque([1])\n",
         "from collections import deque\nassert f() == ({'a': 2, 'b': 1}, (1, 2), deque([1]))"),
        ("def f(x):\n    print('words')\n    return not x\n", "assert f(0) is True and f(1) is False"),
    ],
)  # fmt: skip
def test_what_tests_ask_is_answered(program: str, checks: str) -> None:
    found = code.passes(program, Checks(code=(checks,)), deadline_s=60.0)
    assert found["passed"], found["why"]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(plain)
def test_values_cross_the_border_unchanged(value: Any) -> None:
    form = json.loads(json.dumps(sandbox.encode(value)))
    found = sandbox.decode(form)
    assert found == value and repr(found) == repr(value)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=8))
def test_what_is_no_form_is_refused(form: Any) -> None:
    try:
        sandbox.decode(["list", [form]])
    except ValueError:
        return


# --- problems and responses


@pytest.mark.parametrize(
    ("metadata", "answer", "expected"),
    [
        ({"tests": ["assert f(1) == 2", "assert f(2) == 3"]}, "-", Checks(("assert f(1) == 2", "assert f(2) == 3"))),
        ({"tests": "assert f(1) == 2"}, "-", Checks(("assert f(1) == 2",))),
        ({"tests": [{"input": "1", "output": "2"}]}, "-", Checks(cases=(("1", "2"),))),
        ({"tests": {"inputs": ["1"], "outputs": ["2"]}}, "-", Checks(cases=(("1", "2"),))),
        (
            {"test_list": ["assert f(1) == 2"], "test_setup_code": "x = 1", "test_imports": ["import math"]},
            "-",
            Checks(("x = 1", "import math", "assert f(1) == 2")),
        ),
        (
            {"test": "def check(c):\n    assert c(1) == 2", "entry_point": "f"},
            "-",
            Checks(("def check(c):\n    assert c(1) == 2", "check(f)")),
        ),
        ({"input_output": '{"inputs": ["1"], "outputs": ["2"]}'}, "-", Checks(cases=(("1", "2"),))),
        ({}, '{"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}', Checks(("assert add(*[1, 2]) == 3",))),
        ({}, '{"inputs": ["1\\n[2]"], "outputs": ["3"], "fn_name": "add"}', Checks(("assert add(*[1, [2]]) == [3]",))),
        ({}, "assert f(1) == 2", Checks(("assert f(1) == 2",))),
    ],
)
def test_tests_are_read_as_sets_publish_them(metadata: dict[str, Any], answer: str, expected: Checks) -> None:
    assert checks_of(Question(answer, metadata=metadata)) == expected


@pytest.mark.parametrize(
    ("metadata", "answer"),
    [
        ({}, "7"),
        ({"tests": []}, "-"),
        ({"tests": ["f(1)"]}, "-"),
        ({"tests": ["assert f(1"]}, "-"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, "-"),
        ({"tests": [{"input": 1, "output": "2"}]}, "-"),
        ({"tests": 5}, "-"),
    ],
)
def test_tests_that_cannot_be_read_are_an_error_before_a_run(metadata: dict[str, Any], answer: str) -> None:
    with pytest.raises(ValueError, match=r'grader "python_tests" cannot read the tests .*; give `tests`'):
        checks_of(Question(answer, metadata=metadata))


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na\n```\nbetter:\n```\nb\n```", "b\n"),
        ("```py\n  a\n\n  b\n```", "  a\n\n  b\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("````python\n```\na\n````", "```\na\n"),
        ("no block", None),
        ("```python\na", None),
        ("```python\na\n```\n```python\nb", None),
        ("```python\na\n```\n```bash\nls\n```", None),
    ],
)
def test_the_last_block_is_the_program(response: str, program: str | None) -> None:
    assert program_of(response) == program


def test_reading_a_response_is_linear() -> None:
    assert program_of("```python\n" * 200_000) is None


def test_the_pool_grades_programs(caplog: pytest.LogCaptureFixture) -> None:
    question = Question("-", id="p", metadata={"tests": list(ADD.code)})
    responses = [fenced(CORRECT), fenced("def add(a, b): return 3\n"), "no program", fenced("while True: pass\n")]
    with GraderPool(workers=2, extractor="python_tests", deadline_s=3.0) as pool:
        grades = pool.grade([*responses, fenced("import os\nos.kill(os.getppid(), 9)\n" + CORRECT)], [question] * 5)
        assert [g.reward for g in grades] == [g.success for g in grades] == [1.0, 0.0, 0.0, 0.0, 0.0]
        assert [g.timed_out for g in grades] == [False, False, False, True, False]
        assert (grades[0].extracted, grades[2].extracted) == (CORRECT, None)
        assert (pool.timeouts, pool.crashes) == (1, 0)
        assert {worker.process.poll() for worker in pool._workers.active} == {None}, "workers live on"
        pool._tell(["namespaces: x", "namespaces: x"])
        pool._tell(["namespaces: x"])
    assert caplog.text.count("this kernel lets no process give up namespaces: x") == 1


def test_a_worker_that_is_killed_takes_its_program_along() -> None:
    question = Question("-", metadata={"tests": list(ADD.code)})
    with GraderPool(workers=1, extractor="python_tests", deadline_s=HANG_S) as pool:
        grades: list[Any] = []
        grade = threading.Thread(target=lambda: grades.extend(pool.grade([fenced("while True: pass\n")], [question])))
        grade.start()
        programs: list[psutil.Process] = []
        while len(programs) < 2:  # the one that waits, and the one that runs
            time.sleep(0.05)
            workers = [psutil.Process(worker.process.pid) for worker in pool._workers.active]
            programs = [program for worker in workers for program in worker.children(recursive=True)]
        workers[0].kill()
        grade.join()
        assert grades[0].crashed and psutil.wait_procs(programs, timeout=HANG_S)[1] == []
