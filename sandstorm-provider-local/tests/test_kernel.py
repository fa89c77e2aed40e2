"""The interpreter kernel, driven as its supervisor does. What runs in it here is trusted, so it needs no sandbox."""

from __future__ import annotations

import ast
import base64
import importlib.util
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

import sandstorm_provider_local

SCRIPT = Path(sandstorm_provider_local.__file__).parent / "_inside" / "_kernel.py"
PATIENCE = 30.0  # seconds after which a test fails that would otherwise wait for ever
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed: it is what this test is about"
)


@attrs.frozen(kw_only=True)
class Shown:
    """An artifact, with its data read."""

    mime: str
    name: str
    data: bytes


@attrs.frozen(kw_only=True)
class Ran:
    """What came of a cell."""

    code: int
    stdout: str
    stderr: str
    shown: list[Shown]


@attrs.define
class Driver:
    """A kernel, and the supervisor's side of its protocol."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    cells: int = 0

    def receive(self) -> tuple[dict[str, Any] | None, list[int]]:
        """The next message and its files; None at the end of the socket."""
        packet, files, _, _ = socket.recv_fds(self.control, 65536, 4)
        return (json.loads(packet) if packet else None), files

    def run(self, code: str, *, during: Callable[[bytes], None] = lambda stdout: None) -> Ran:
        """What came of a cell; `during` is told all of stdout whenever more has come."""
        self.cells += 1
        cell = f"c{self.cells}"
        source = os.memfd_create("cell")
        os.write(source, textwrap.dedent(code).encode())
        pipes = {"stdout": os.pipe(), "stderr": os.pipe()}
        sent = [source, pipes["stdout"][1], pipes["stderr"][1]]
        socket.send_fds(self.control, [json.dumps({"op": "cell", "id": cell}).encode()], sent)
        for file in sent:
            os.close(file)
        streams = {"stdout": b"", "stderr": b""}
        shown = []
        status = None
        with selectors.DefaultSelector() as selector:
            selector.register(self.control, selectors.EVENT_READ)
            for name, (read_end, _) in pipes.items():
                os.set_blocking(read_end, False)
                selector.register(read_end, selectors.EVENT_READ, name)
            while status is None:
                ready = selector.select(PATIENCE)
                assert ready, f"the kernel says nothing; so far: {streams}"
                for key, _ in ready:
                    if key.data:
                        piece = _read(key.fd)
                        streams[key.data] += piece
                        if not piece:
                            selector.unregister(key.fd)
                        during(streams["stdout"])
                        continue
                    message, files = self.receive()
                    assert message is not None, f"the kernel has ended: {streams}"
                    assert message.pop("id") == cell
                    if message.pop("event") == "done":
                        status = message["code"]
                    else:
                        with os.fdopen(files[0], "rb") as data:
                            shown.append(Shown(data=data.read(), **message))
        for name, (read_end, _) in pipes.items():
            while piece := _read(read_end):
                streams[name] += piece
            os.close(read_end)
        texts = {name: data.decode() for name, data in streams.items()}
        return Ran(code=status, shown=shown, **texts)

    def interrupt(self) -> None:
        """Sends SIGINT."""
        self.process.send_signal(signal.SIGINT)


def _read(file: int) -> bytes:
    """What a pipe holds now; empty at its end and where there is no more for now."""
    try:
        return os.read(file, 1 << 20)
    except BlockingIOError:
        return b""


@contextmanager
def started(work: Path, *arguments: str, **env: str) -> Iterator[Driver]:
    """A kernel that is ready. It is ended as the supervisor does, and must then end at once and well."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", str(SCRIPT), str(theirs.fileno()), *arguments],
            pass_fds=[theirs.fileno()],
            cwd=work,
            env={"PATH": os.environ["PATH"], "HOME": str(work), **env},
            stdin=subprocess.DEVNULL,
        )
    try:
        with ours:
            driver = Driver(process, ours)
            assert driver.receive() == ({"event": "ready"}, [])
            yield driver
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Driver]:
    """A kernel that works in a directory of its own."""
    with started(tmp_path) as driver:
        yield driver


def test_state_is_kept_between_cells(kernel: Driver) -> None:
    """Names, imports and functions of a cell are there in the next."""
    assert kernel.run("import math\nx = 20\ndef more(): return x + math.floor(1.5)") == Ran(
        code=0, stdout="", stderr="", shown=[]
    )
    assert kernel.run("x += 1\nprint(more())").stdout == "22\n"


def test_the_last_expression_is_shown_as_python_does(kernel: Driver) -> None:
    """A value is printed as its repr, `_` holds it, and None, a statement or a semicolon print nothing."""
    assert kernel.run("x = 1\n'a' + 'é'").stdout == "'aé'\n"
    assert kernel.run("_ * 2").stdout == "'aéaé'\n"
    assert kernel.run("None").stdout == ""
    assert kernel.run("y = 2").stdout == ""
    assert kernel.run("(1 +\n 1) ; # quiet").stdout == ""
    assert kernel.run("'é;' # not; quiet").stdout == "'é;'\n"
    assert kernel.run("").stdout == ""
    assert kernel.run("if True:\n    5").stdout == ""
    assert kernel.run("_").stdout == "'é;'\n"


def test_an_exception_prints_only_the_callers_frames_and_keeps_the_state(kernel: Driver) -> None:
    """A traceback has the cells' lines and none of ours, for causes and for code that our display calls too."""
    kernel.run("kept = 7\ndef divide(by):\n    return kept / by\n")
    ran = kernel.run("try:\n    divide(0)\nexcept ZeroDivisionError as error:\n    raise ValueError('no') from error")
    assert ran.code == 1
    assert ran.stdout == ""
    lines = [line.strip() for line in ran.stderr.splitlines() if "^" not in line and "~" not in line]
    assert lines == [
        "Traceback (most recent call last):",
        'File "<cell 2>", line 2, in <module>',
        "divide(0)",
        'File "<cell 1>", line 3, in divide',
        "return kept / by",
        "ZeroDivisionError: division by zero",
        "",
        "The above exception was the direct cause of the following exception:",
        "",
        "Traceback (most recent call last):",
        'File "<cell 2>", line 4, in <module>',
        "raise ValueError('no') from error",
        "ValueError: no",
    ]
    ran = kernel.run("class Bad:\n    def __repr__(self): raise OSError('cannot')\nBad()")
    assert (ran.code, ran.stderr.count("File"), "_kernel" in ran.stderr) == (1, 2, False)
    assert kernel.run("kept").stdout == "7\n"


def test_a_syntax_error_is_shown_with_its_line(kernel: Driver) -> None:
    """Source that does not compile runs not at all, and top-level `await` is such source."""
    ran = kernel.run("print('never')\nx = = 1")
    assert (ran.code, ran.stdout) == (1, "")
    assert ran.stderr.startswith('  File "<cell 1>", line 2\n    x = = 1\n')
    assert ran.stderr.endswith("SyntaxError: invalid syntax\n")
    assert "'await' outside function" in kernel.run("import asyncio\nawait asyncio.sleep(0)").stderr
    assert kernel.run("'\0'").code == 1
    assert kernel.run("1").stdout == "1\n"


@pytest.mark.parametrize(
    ("argument", "code", "stderr"),
    [("", 0, ""), ("0", 0, ""), ("3", 3, ""), ("-1", 255, ""), ("True", 1, ""), ("'sorry'", 1, "sorry\n")],
)
def test_sys_exit_ends_the_cell_with_its_code(kernel: Driver, argument: str, code: int, stderr: str) -> None:
    """`sys.exit` gives the code that it gives a program, and the interpreter stays."""
    assert kernel.run(f"import sys; x = 1; sys.exit({argument})") == Ran(code=code, stdout="", stderr=stderr, shown=[])
    assert kernel.run("x").stdout == "1\n"


def test_exit_of_the_site_module_does_not_break_input(kernel: Driver) -> None:
    """`exit()` closes `sys.stdin`; the next cell has one again, and it is empty."""
    assert kernel.run("exit(4)").code == 4
    assert kernel.run("input()").stderr.endswith("EOFError: EOF when reading a line\n")


def test_interrupt_ends_the_cell_and_not_the_interpreter(kernel: Driver) -> None:
    """SIGINT raises KeyboardInterrupt in a cell, code 130, and the state stays."""

    def interrupt(stdout: bytes) -> None:
        if stdout == b"started\n":
            kernel.interrupt()

    ran = kernel.run("import time\nx = 1\nprint('started')\ntime.sleep(60)", during=interrupt)
    assert ran.code == 130
    assert ran.stderr.endswith("KeyboardInterrupt\n")
    assert kernel.run("x").stdout == "1\n"


def test_interrupt_between_cells_is_ignored(kernel: Driver) -> None:
    """SIGINT without a cell does nothing, and does not reach the next cell."""
    for _ in range(20):
        kernel.interrupt()
        time.sleep(0.005)
    assert kernel.run("1") == Ran(code=0, stdout="1\n", stderr="", shown=[])


def test_interrupts_at_any_moment_leave_a_working_interpreter(kernel: Driver) -> None:
    """SIGINTs around the end of short cells, when handlers are changed, end at most those cells."""
    for _ in range(200):
        ran = kernel.run("print('x')", during=lambda stdout: kernel.interrupt())
        assert ran.code in {0, 130}
    time.sleep(0.05)
    assert kernel.run("'alive'").stdout == "'alive'\n"


def test_children_may_be_interrupted(kernel: Driver) -> None:
    """A child that a thread starts between cells does not ignore SIGINT."""
    kernel.run("""
        import subprocess, threading, time
        statuses = []
        def later():
            go.wait()
            statuses.append(subprocess.run(["sh", "-c", "kill -INT $$; exit 5"]).returncode)
        go = threading.Event(); thread = threading.Thread(target=later); thread.start()
        threading.Timer(0.1, go.set).start()
    """)
    time.sleep(0.3)
    assert kernel.run("thread.join()\nstatuses").stdout == "[-2]\n"


def test_all_writers_reach_the_pipes_in_order(kernel: Driver) -> None:
    """`print`, `os.write` and children are captured in the order in which they wrote, also without a newline at the end."""
    ran = kernel.run("""
        import os, subprocess, sys
        print("one"); os.write(1, b"two\\n"); subprocess.run(["echo", "three"]); print("four", end="")
        print("err", file=sys.stderr); subprocess.run("echo child >&2", shell=True); sys.stderr.write("end");
    """)
    assert (ran.stdout, ran.stderr) == ("one\ntwo\nthree\nfour", "err\nchild\nend")


def test_c_code_is_captured(kernel: Driver) -> None:
    """What C has in its own buffers belongs to the cell that wrote it."""
    assert kernel.run("import ctypes; ctypes.CDLL(None).puts(b'from C');").stdout == "from C\n"


def test_output_is_seen_before_the_cell_ends(kernel: Driver) -> None:
    """A line arrives while the cell runs: this one ends only because its line was seen."""
    flag = f"/proc/{kernel.process.pid}/cwd/go"

    def answer(stdout: bytes) -> None:
        if stdout == b"ask\n":
            Path(flag).touch()

    assert kernel.run("import os, time\nprint('ask')\nwhile not os.path.exists('go'): time.sleep(0.001)", during=answer).code == 0


def test_a_work_area_that_is_gone_does_not_fail_cells(kernel: Driver) -> None:
    """A cell may remove its own working directory, and the next one can go elsewhere."""
    kernel.run("import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')")
    assert kernel.run("os.chdir('/'); os.getcwd()") == Ran(code=0, stdout="'/'\n", stderr="", shown=[])


def test_all_line_ends_are_understood(kernel: Driver) -> None:
    """Source with the line ends of other systems and a byte order mark runs, and its lines are counted as Python does."""
    assert kernel.run("\ufeffx = 1\r\nx;\r\n").stdout == ""
    assert kernel.run("x\r\r'a\u2028b'").stdout == "'a\\u2028b'\n"
    assert "line 2, in <module>\n    1 / 0" in kernel.run("x\r1 / 0\r").stderr


def test_large_output_is_complete(kernel: Driver) -> None:
    """More than a pipe holds arrives, before `done`."""
    assert kernel.run("print('x' * 3_000_000)").stdout == "x" * 3_000_000 + "\n"


def test_stdin_is_empty(kernel: Driver) -> None:
    """Neither a cell nor its children can wait for input; nothing is held open before the first cell."""
    assert {str(Path(f"/proc/{kernel.process.pid}/fd/{n}").readlink()) for n in range(3)} == {"/dev/null"}
    ran = kernel.run("import subprocess, sys\nsys.stdin.read(), subprocess.run(['cat'], capture_output=True).stdout")
    assert ran.stdout == "('', b'')\n"


def test_a_thread_may_write_between_cells(kernel: Driver) -> None:
    """What is written between cells is lost: it neither fails its thread nor shows up in the next cell."""
    kernel.run("""
        import threading, time
        done = []
        def late():
            time.sleep(0.1)
            print("lost"); display(1)
            done.append(True)
        thread = threading.Thread(target=late); thread.start()
    """)
    time.sleep(0.3)
    assert kernel.run("thread.is_alive(), done") == Ran(code=0, stdout="(False, [True])\n", stderr="", shown=[])


def test_a_closed_pipe_is_the_cells_own_problem(kernel: Driver) -> None:
    """A cell whose stdout is gone gets BrokenPipeError, and nothing of it comes out of the next one."""
    ran = kernel.run(
        "import os, sys\nkeep = os.dup(1)\nr, w = os.pipe(); os.close(r); os.dup2(w, 1)\nsys.stdout.write('stale')\nprint()"
    )
    assert (ran.code, ran.stdout) == (1, "")
    assert ran.stderr.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")
    assert kernel.run("print('fresh')").stdout == "fresh\n"


def test_closed_streams_are_mended(kernel: Driver) -> None:
    """Closing the standard streams and their descriptors costs only the cell that does so its output."""
    kernel.run("import os, sys\nsys.stdout.close(); sys.stderr.close(); os.close(0); os.close(1); os.close(2)")
    assert kernel.run("import sys\nprint('out'); print('err', file=sys.stderr)") == Ran(
        code=0, stdout="out\n", stderr="err\n", shown=[]
    )
    assert kernel.run("os.readlink('/proc/self/fd/0')").stdout == "'/dev/null'\n"


def test_a_handler_of_an_earlier_cell_writes_to_the_current_one(kernel: Driver) -> None:
    """The stream objects are the same in all cells, as a logging handler of the first expects."""
    kernel.run("import logging; logging.basicConfig(format='%(message)s')")
    assert kernel.run("logging.warning('seen')").stderr == "seen\n"


def test_the_namespace_is_a_main_module(kernel: Driver) -> None:
    """Pickle, dataclasses and `if __name__ == '__main__'` find what the cells define, and nothing of the kernel."""
    ran = kernel.run("""
        import dataclasses, pickle, sys
        @dataclasses.dataclass
        class Point:
            x: int
        if __name__ == "__main__":
            print(pickle.loads(pickle.dumps(Point(1))), sys.modules["__main__"].Point is Point, Point.__annotations__, sys.argv)
    """)
    assert (ran.stdout, ran.stderr) == ("Point(x=1) True {'x': <class 'int'>} ['']\n", "")
    names = kernel.run("sorted(name for name in globals() if not name.startswith('__'))").stdout
    assert ast.literal_eval(names) == ["Point", "dataclasses", "display", "pickle", "sys"]


def test_future_imports_last_for_their_cell(kernel: Driver) -> None:
    """Neither the kernel's own `from __future__` import nor that of a cell reaches another cell."""
    assert kernel.run("from __future__ import annotations\ndef f(x: int): ...\nf.__annotations__").stdout == "{'x': 'int'}\n"
    assert kernel.run("def f(x: int): ...\nf.__annotations__").stdout == "{'x': <class 'int'>}\n"


def test_source_lines_are_known_to_inspect(kernel: Driver) -> None:
    """`inspect.getsource` works for functions of earlier cells."""
    kernel.run("def twice(x):\n    return 2 * x\n")
    assert kernel.run("import inspect; print(inspect.getsource(twice), end='')").stdout == "def twice(x):\n    return 2 * x\n"


def test_modules_of_the_work_area_and_of_directories_are_found(tmp_path: Path) -> None:
    """Files that are put into the work area at any time are importable, and those of further directories after them."""
    for folder in ("work", "packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "both.py").write_text(f"here = {folder!r}")
    (tmp_path / "packages" / "package.py").write_text("here = 'packages'")
    with started(tmp_path / "work", str(tmp_path / "packages")) as driver:
        assert driver.run("import both, package; both.here, package.here").stdout == "('work', 'packages')\n"
        assert driver.run("import late").code == 1
        before = (tmp_path / "work").stat()
        (tmp_path / "work" / "late.py").write_text("x = 5")
        os.utime(tmp_path / "work", ns=(before.st_atime_ns, before.st_mtime_ns))  # as within one tick of a coarse clock
        assert driver.run("import late; late.x").stdout == "5\n"
        assert driver.run("import sys; str(sys.path[0]), any('_inside' in path for path in sys.path)").stdout == "('', False)\n"


def test_modules_of_the_work_area_cannot_break_the_kernel(tmp_path: Path) -> None:
    """Files named like the modules that print errors and send messages are not used by the kernel."""
    for name in ("traceback", "json", "linecache", "binascii", "contextlib", "io"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken over')")
    with started(tmp_path) as driver:
        assert driver.run("1 / 0").stderr.endswith("ZeroDivisionError: division by zero\n")
        assert driver.run("1").stdout == "1\n"


def test_a_fork_that_comes_back_ends_there(kernel: Driver) -> None:
    """A forked child that leaves the cell by its end or an error exits with that code and says nothing to the supervisor."""
    ran = kernel.run("""
        import os
        def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        pid = os.fork()
        if pid: print("child", wait(pid))
        else: print("in child")
    """)
    assert (ran.code, ran.stdout) == (0, "in child\nchild 0\n")
    ran = kernel.run("pid = os.fork()\nif not pid: raise ValueError('child')\nprint(wait(pid))")
    assert (ran.code, ran.stdout, ran.stderr.count("ValueError: child")) == (0, "1\n", 1)
    assert kernel.run("pid = os.fork()\nif not pid: raise SystemExit(9)\nwait(pid)").stdout == "9\n"
    ran = kernel.run("""
        class Rich:
            def _repr_html_(self): return "<b>"
        pid = os.fork()
        if not pid: display(Rich())
        else: wait(pid);
    """)
    assert (ran.code, ran.shown) == (0, [])
    assert ran.stderr == "sandstorm: rich results are shown by the interpreter's own process only\n"


def test_multiprocessing_and_asyncio_work(kernel: Driver) -> None:
    """A forked worker pool runs functions of the cells, and `asyncio.run` runs coroutines, more than once."""
    ran = kernel.run("""
        import asyncio, multiprocessing
        def square(x): return x * x
        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(pool.map(square, range(4)))
        async def nothing():
            await asyncio.sleep(0)
            return 5
        asyncio.run(nothing()) + asyncio.run(nothing())
    """)
    assert (ran.code, ran.stdout) == (0, "[0, 1, 4, 9]\n10\n")


def test_descriptors_of_the_kernel_do_not_reach_children(kernel: Driver) -> None:
    """A child has the three standard descriptors, and none leaks from cell to cell."""
    ran = kernel.run(
        "import subprocess; print(subprocess.run('ls /proc/$$/fd', shell=True, capture_output=True, close_fds=False))"
    )
    assert r"b'0\n1\n2\n'" in ran.stdout
    count = "import os; len(os.listdir('/proc/self/fd'))"
    assert kernel.run(count).stdout == kernel.run(count).stdout


def test_the_end_of_the_socket_ends_everything(tmp_path: Path) -> None:
    """The interpreter exits with 0 when its supervisor is gone, whatever threads still run."""
    with started(tmp_path) as driver:
        driver.run("import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()")


def rich(**methods: str) -> str:
    """Source of an object `rich` whose methods return these expressions."""
    body = "".join(f"    def {name}(self, **kwargs): return {value}\n" for name, value in methods.items())
    return f"class Rich:\n    def __repr__(self): return 'plain'\n{body}rich = Rich()\n"


@pytest.mark.parametrize(
    ("method", "value", "mime", "name", "data"),
    [
        ("_repr_html_", "'<b>é</b>'", "text/html", "display-1.html", "<b>é</b>".encode()),
        ("_repr_markdown_", "'*a*', {'meta': 1}", "text/markdown", "display-1.md", b"*a*"),
        ("_repr_svg_", "'<svg/>'", "image/svg+xml", "display-1.svg", b"<svg/>"),
        ("_repr_png_", r"b'\x89PNG'", "image/png", "display-1.png", b"\x89PNG"),
        ("_repr_jpeg_", repr(base64.b64encode(b"\xff\xd8").decode()), "image/jpeg", "display-1.jpg", b"\xff\xd8"),
        ("_repr_latex_", "'$x$'", "text/latex", "display-1.tex", b"$x$"),
        ("_repr_json_", "{'a': [1, None]}", "application/json", "display-1.json", b'{"a": [1, null]}'),
        ("_repr_mimebundle_", "{'a/b+json': {'a': 1}}, {}", "a/b+json", "display-1.json", b'{"a": 1}'),
        ("_repr_mimebundle_", "{'text/x': 'y'}", "text/x", "display-1.txt", b"y"),
        ("_repr_mimebundle_", "{'a/b': bytearray(b'y')}", "a/b", "display-1.bin", b"y"),
    ],
)
def test_each_representation_is_an_artifact(kernel: Driver, method: str, value: str, mime: str, name: str, data: bytes) -> None:
    """A value's rich representation arrives beside its text, as bytes of its type, whichever way it gives them."""
    ran = kernel.run(rich(**{method: value}) + "rich")
    assert ran == Ran(code=0, stdout="plain\n", stderr="", shown=[Shown(mime=mime, name=name, data=data)])


def test_a_bundle_goes_before_methods_and_may_hold_the_text(kernel: Driver) -> None:
    """As in IPython: what the bundle has is not asked for again, and its plain text is the one that is printed."""
    ran = kernel.run(
        rich(_repr_mimebundle_="{'text/plain': 'mine', 'text/html': 'bundle'}", _repr_html_="1 / 0", _repr_latex_="'$'") + "rich"
    )
    assert (ran.stdout, ran.stderr) == ("mine\n", "")
    assert [(shown.mime, shown.data) for shown in ran.shown] == [("text/html", b"bundle"), ("text/latex", b"$")]


def test_representations_of_one_type_have_names_of_their_own(kernel: Driver) -> None:
    """Two results of a cell never share a file name."""
    ran = kernel.run(rich(_repr_mimebundle_="{'a/b+json': 1, 'c/d+json': 2}") + "display(rich, 5, rich)")
    assert [shown.name for shown in ran.shown] == ["display-1.json", "display-1-1.json", "display-2.json", "display-2-3.json"]


def test_a_representation_that_fails_does_not_fail_the_cell(kernel: Driver) -> None:
    """An error, data that is no JSON and bad Base64 are said on stderr, and the other representations arrive."""
    ran = kernel.run(
        rich(_repr_html_="1 / 0", _repr_json_="object()", _repr_png_="'a'", _repr_svg_="None", _repr_latex_="'$'") + "rich"
    )
    assert (ran.code, ran.stdout, [shown.mime for shown in ran.shown]) == (0, "plain\n", ["text/latex"])
    assert ran.stderr.splitlines()[0] == "sandstorm: _repr_html_ of Rich: ZeroDivisionError: division by zero"
    assert "_encode of object: TypeError" in ran.stderr
    ran = kernel.run(
        "class E(Exception):\n    def __str__(self): raise self\ndef fail(): raise E\n" + rich(_repr_html_="fail()") + "rich"
    )
    assert (ran.code, ran.stdout) == (0, "plain\n")


def test_objects_that_have_every_attribute_and_classes_show_text_only(kernel: Driver) -> None:
    """A mock answers to every method and a class has methods without an instance: neither is a rich result."""
    ran = kernel.run(rich(_repr_html_="'x'") + "from unittest.mock import MagicMock\ndisplay(MagicMock(name='m'), Rich)")
    assert (ran.code, ran.shown, ran.stderr) == (0, [], "")


def test_display_shows_several_objects_anywhere(kernel: Driver) -> None:
    """`display` prints the text of each object, strings as their repr, and sends what is rich of them."""
    ran = kernel.run(rich(_repr_html_="'x'") + "display('text', rich)\nprint('after')")
    assert (ran.stdout, [shown.name for shown in ran.shown]) == ("'text'\nplain\nafter\n", ["display-1.html"])


def test_a_display_hook_of_the_caller_is_used(kernel: Driver) -> None:
    """`sys.displayhook` may be replaced, as libraries for the plain interpreter do."""
    kernel.run("import sys; sys.displayhook = lambda value: print('mine', value)")
    assert kernel.run("1").stdout == "mine 1\n"


def test_too_many_artifacts_are_dropped_with_one_line(kernel: Driver) -> None:
    """A cell shows at most 100 rich results; the next cell starts again."""
    ran = kernel.run(rich(_repr_html_="'x'") + "for _ in range(150): display(rich)")
    assert (ran.code, len(ran.shown), ran.stdout.count("plain")) == (0, 100, 150)
    assert ran.stderr == "sandstorm: a cell shows at most 100 rich results and 64 MiB: the rest is dropped\n"
    assert len(kernel.run("rich").shown) == 1


def test_too_large_artifacts_are_dropped_with_one_line(kernel: Driver) -> None:
    """A cell shows at most 64 MiB of rich results."""
    ran = kernel.run(rich(_repr_png_="b'x' * (40 << 20)") + "display(rich, rich, rich)")
    assert (ran.code, [len(shown.data) for shown in ran.shown]) == (0, [40 << 20])
    assert ran.stderr.count("the rest is dropped") == 1


def test_a_long_mime_type_is_dropped(kernel: Driver) -> None:
    """No value can make a message larger than a packet."""
    ran = kernel.run(rich(_repr_mimebundle_="{'x' * 100_000: 'y', 5: 'z'}") + "rich")
    assert (ran.code, ran.shown, ran.stderr.count("without a MIME type")) == (0, [], 2)


@needs_matplotlib
def test_open_figures_are_shown_and_closed(kernel: Driver) -> None:
    """Figures of pyplot are PNG artifacts at the end of their cell, also of one that fails, and do not come again."""
    ran = kernel.run("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.figure()\nplt.title('second')\n1 / 0")
    assert (ran.code, [(shown.mime, shown.name) for shown in ran.shown]) == (
        1,
        [("image/png", "figure-1.png"), ("image/png", "figure-2.png")],
    )
    assert all(shown.data.startswith(b"\x89PNG\r\n") for shown in ran.shown)
    assert kernel.run("plt.get_fignums(), plt.get_backend().lower()").stdout == "([], 'agg')\n"


@needs_matplotlib
def test_show_separates_plots_and_does_not_warn(tmp_path: Path) -> None:
    """`plt.show()` shows and closes what is open, so that a loop makes a picture each, and says nothing, with a DISPLAY too."""
    with started(tmp_path, DISPLAY=":0") as driver:
        ran = driver.run(
            "import matplotlib.pyplot as plt\nfor n in range(3):\n    plt.plot([n])\n    plt.show()\n    print(plt.get_fignums())"
        )
        assert (ran.code, ran.stdout, ran.stderr) == (0, "[]\n" * 3, "")
        assert [shown.name for shown in ran.shown] == ["figure-1.png", "figure-2.png", "figure-3.png"]


@needs_matplotlib
def test_a_figure_as_value_is_shown_once(kernel: Driver) -> None:
    """A figure that is displayed is a picture, with pyplot or without, and not once more at the end of the cell."""
    ran = kernel.run(
        "import matplotlib.pyplot as plt\nfrom matplotlib.figure import Figure\ndisplay(Figure())\nfig, ax = plt.subplots()\nfig"
    )
    assert (ran.stderr, [shown.name for shown in ran.shown]) == ("", ["figure-1.png", "figure-2.png"])


@needs_matplotlib
def test_a_fork_does_not_show_the_open_figures(kernel: Driver) -> None:
    """A forked child that leaves the cell has no part in its figures."""
    ran = kernel.run("import os\nimport matplotlib.pyplot as plt\nplt.plot([1])\nif pid := os.fork(): os.waitpid(pid, 0)")
    assert (ran.code, ran.stderr, [shown.name for shown in ran.shown]) == (0, "", ["figure-1.png"])


@needs_matplotlib
def test_a_figure_that_cannot_be_drawn_does_not_fail_the_cell(kernel: Driver) -> None:
    """A figure with an error in it is named on stderr, and closed."""
    ran = kernel.run("import matplotlib.pyplot as plt\nplt.title('$\\\\frac{$');")
    assert (ran.code, ran.shown) == (0, [])
    assert ran.stderr.startswith("sandstorm: _draw of Figure: ValueError: ")
    assert kernel.run("plt.get_fignums()").stdout == "[]\n"


@needs_matplotlib
def test_pictures_of_pillow_are_shown(kernel: Driver) -> None:
    """An image of PIL, which comes with matplotlib, is a PNG."""
    ran = kernel.run("from PIL import Image; Image.new('RGB', (2, 2))")
    assert [shown.mime for shown in ran.shown][:1] == ["image/png"]
    assert ran.shown[0].data.startswith(b"\x89PNG")


def test_the_backend_of_the_caller_is_kept(tmp_path: Path) -> None:
    """MPLBACKEND is Agg for the cells and their children unless the sandbox has another."""
    for env, expected in (({}, "Agg"), ({"MPLBACKEND": "svg"}, "svg")):
        with started(tmp_path, **env) as driver:
            assert driver.run("import subprocess; subprocess.run('echo $MPLBACKEND', shell=True);").stdout == f"{expected}\n"


def test_the_kernel_is_for_older_pythons_too() -> None:
    """The source has no syntax that is younger than 3.9, and imports what costs little."""
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 9))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    froms = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert names | froms <= {
        *("_ast", "_socket", "builtins", "contextlib", "json", "linecache", "os", "signal", "sys", "traceback", "types"),
        "__future__",
    }
