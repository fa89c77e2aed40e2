"""A warm Python inside of the sandbox: it runs cells in one namespace and shows what they end with, pictures and tables too.

`python3 -I _kernel.py FD [DIRECTORY ...]`, where FD is a connected SOCK_SEQPACKET socket to the supervisor and the
directories are searched for modules after the working directory. Each message is one JSON object in one packet of at most
65,536 bytes, with file descriptors beside it:

- in: `{"op": "cell", "id": …}` with a file of UTF-8 source and the write ends of two pipes, for stdout and stderr.
- out: `{"event": "ready"}` once; then for each cell any number of `{"event": "artifact", "id": …, "mime": …, "name": …}` with
  a file of the data, and one `{"event": "done", "id": …, "code": …}` when everything is flushed. The code is 0, 1 after an
  exception, 130 after SIGINT, or what `sys.exit` was given. The end of the socket ends the interpreter.

Pipes need not end with their cell, since what the cell started may hold them. All of this is in the hands of the code in
the cells: whoever reads the socket must trust no message, count nor name.

A cell that ends with an expression shows its value as `python -i` does, on stdout, and as IPython does, by its `_repr_html_`
and the like; so does `display(value, …)` anywhere. A semicolon at the end keeps it quiet. Figures of matplotlib's pyplot are
shown by `plt.show()` and at the end of the cell, and closed. `await` outside of a function is not supported:
use `asyncio.run`. `from __future__` imports last for their cell.

Needs Python 3.9 or later and the standard library. Every module that is imported here costs each interpreter time and memory.
"""

from __future__ import annotations

import _ast
import _socket  # `socket` itself would bring `selectors` and more
import builtins
import contextlib
import json
import linecache
import os
import signal
import sys
import traceback  # up here, where no module of the work area can take its place
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from typing import Any

PACKET_LIMIT = 65536
ARTIFACT_LIMIT = 100
ARTIFACT_BYTES = 64 * 1024 * 1024
MIME_LENGTH = 200

_OWN_FILE = __file__
_CANARY = "_no_object_has_this_method_unless_it_has_all_"
_METHODS = {
    "_repr_html_": "text/html",
    "_repr_markdown_": "text/markdown",
    "_repr_svg_": "image/svg+xml",
    "_repr_png_": "image/png",
    "_repr_jpeg_": "image/jpeg",
    "_repr_latex_": "text/latex",
    "_repr_json_": "application/json",
}
_SUFFIXES = {
    "application/json": ".json",
    "application/pdf": ".pdf",
    "image/gif": ".gif",
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/svg+xml": ".svg",
    "text/html": ".html",
    "text/latex": ".tex",
    "text/markdown": ".md",
}


class Cell:
    """A cell that is running, and what it has shown."""

    def __init__(self, id: str, name: str) -> None:
        self.id = id
        self.name = name
        self.names: set[str] = set()
        self.displays = 0
        self.bytes = 0
        self.full = False
        self.figures: list[Any] = []

    def stem(self, value: object) -> str:
        """What the names of a value's artifacts begin with. Counts the value."""
        if _is_figure(value):
            self.figures.append(value)
            return f"figure-{len(self.figures)}"
        self.displays += 1
        return f"display-{self.displays}"

    def free_name(self, stem: str, mime: str) -> str:
        """A file name that no other artifact of the cell has."""
        suffix = _SUFFIXES.get(mime) or (".json" if mime.endswith("+json") else ".txt" if mime.startswith("text/") else ".bin")
        name = stem + suffix
        if name in self.names:
            name = f"{stem}-{len(self.names)}{suffix}"
        return name


class Kernel:
    """The interpreter: one namespace, and a socket to the supervisor."""

    def __init__(self, control: _socket.socket) -> None:
        self._control = control
        self._pid = os.getpid()
        self._null = os.open(os.devnull, os.O_RDWR)
        self._cell: Cell | None = None
        self._cells = 0
        self._main = types.ModuleType("__main__")
        self._main.__dict__["__builtins__"] = builtins
        self._main.__dict__["display"] = self.display

    def serve(self) -> None:
        """Runs cells until the supervisor closes the socket."""
        sys.modules["__main__"] = self._main
        sys.displayhook = self._show_value
        sys.excepthook = _print_exception
        sys.meta_path.insert(0, PyplotFinder(self.show_figures))
        _shield_from_interrupts()
        self._detach()
        self._send({"event": "ready"})
        while True:
            packet, files = _receive(self._control)
            if not packet:
                return
            self._cells += 1
            self._cell = Cell(json.loads(packet)["id"], f"<cell {self._cells}>")
            code = self._run(self._cell, *files)
            self._send({"event": "done", "id": self._cell.id, "code": code})
            self._cell = None

    def display(self, *values: object) -> None:
        """Shows each value: its text on stdout, its rich representations as artifacts."""
        for value in values:
            bundle = _representations(value)
            text = bundle.pop("text/plain", None)
            sys.stdout.write(f"{text if isinstance(text, str) else repr(value)}\n")
            if bundle and self._cell is not None:
                stem = self._cell.stem(value)
                for mime, data in bundle.items():
                    self._show(stem, mime, data)

    def show_figures(self) -> None:
        """Shows the open figures of pyplot that the cell has not shown yet, and closes all; stands in for `plt.show`."""
        pyplot: Any = sys.modules.get("matplotlib.pyplot")
        if self._cell is None or not hasattr(pyplot, "get_fignums"):
            return
        for number in pyplot.get_fignums():
            figure = pyplot.figure(number)
            if figure not in self._cell.figures:
                stem = self._cell.stem(figure)
                picture = _guarded(figure, _draw, figure)
                if picture is not None:
                    self._show(stem, "image/png", picture)
            pyplot.close(figure)

    def _run(self, cell: Cell, source: int, stdout: int, stderr: int) -> int:
        """The exit code of a cell, after all that it wrote has left this process."""
        _mend_streams()
        _redirect({1: stdout, 2: stderr})
        os.close(stdout)
        os.close(stderr)
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                code = self._execute(cell, source)
            finally:
                if os.getpid() == self._pid:
                    _report_errors(self.show_figures)
        except KeyboardInterrupt:
            code = 130
        _shield_from_interrupts()
        os.close(source)
        _flush()
        if os.getpid() != self._pid:
            os._exit(code)  # a fork that came back from the cell has nothing to do here
        self._detach()
        return code

    def _execute(self, cell: Cell, source: int) -> int:
        """The exit code of the source's code; its errors are printed."""
        try:
            with contextlib.suppress(OSError):
                # The finder of the working directory may have looked before a file came from outside.
                sys.path_importer_cache.pop(os.getcwd(), None)  # noqa: PTH109 - `pathlib` is slow to import
            text = os.pread(source, os.fstat(source).st_size, 0).decode("utf-8-sig")
            for code in _compile(text, cell.name):
                exec(code, self._main.__dict__)  # noqa: S102 - this is what it is for
        except SystemExit as error:
            return _exit_code(error.code)
        except BaseException as error:
            _report_errors(sys.excepthook, type(error), error, error.__traceback__)
            return 130 if isinstance(error, KeyboardInterrupt) else 1
        return 0

    def _show_value(self, value: object) -> None:
        """What the last expression of a cell does with its value."""
        if value is not None:
            self.display(value)
            builtins.__dict__["_"] = value

    def _show(self, stem: str, mime: object, data: object) -> None:
        """Sends an artifact, or says why not."""
        cell = self._cell
        if cell is None or cell.full:
            return
        if os.getpid() != self._pid:
            _note("rich results are shown by the interpreter's own process only")
            return
        if not isinstance(mime, str) or len(mime) > MIME_LENGTH:
            _note("a rich result without a MIME type was dropped")
            return
        encoded = _guarded(data, _encode, mime, data)
        if encoded is None:
            return
        if len(cell.names) >= ARTIFACT_LIMIT or cell.bytes + len(encoded) > ARTIFACT_BYTES:
            cell.full = True
            _note(f"a cell shows at most {ARTIFACT_LIMIT} rich results and {ARTIFACT_BYTES >> 20} MiB: the rest is dropped")
            return
        name = cell.free_name(stem, mime)
        cell.names.add(name)
        cell.bytes += len(encoded)
        with open(os.memfd_create("artifact"), "w+b") as file:  # noqa: PTH123 - it is a descriptor
            file.write(encoded)
            file.seek(0)
            self._send({"event": "artifact", "id": cell.id, "mime": mime, "name": name}, file.fileno())

    def _send(self, message: dict[str, Any], *files: int) -> None:
        """Sends one packet."""
        rights = b"".join(file.to_bytes(4, sys.byteorder) for file in files)
        ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if rights else []
        self._control.sendmsg([json.dumps(message).encode()], ancillary)

    def _detach(self) -> None:
        """Lets go of the pipes of the cell; what threads write between cells is lost."""
        _redirect({0: self._null, 1: self._null, 2: self._null})
        _flush()  # what a closed pipe did not take must not reach the next cell


class PyplotFinder:
    """Gives `matplotlib.pyplot` another `show` when it is imported.

    That of the backend Agg does nothing, so that the second of two plots in a cell would be drawn over the first.
    """

    def __init__(self, show: Callable[[], None]) -> None:
        self._show = show

    def find_spec(self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders say, with a loader that sets `show`; None for any other module."""
        if name != "matplotlib.pyplot":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                # A method would not do: matplotlib sets the signature of `show`.
                module.show = lambda *_, **__: self._show()

            loader.exec_module = exec_module
        return spec


def _receive(control: _socket.socket) -> tuple[bytes, list[int]]:
    """One packet and the files beside it; the packet is empty when the socket has ended."""
    packet, ancillary, _, _ = control.recvmsg(PACKET_LIMIT, _socket.CMSG_SPACE(3 * 4), _socket.MSG_CMSG_CLOEXEC)
    rights = b"".join(data for level, kind, data in ancillary if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS))
    return packet, [int.from_bytes(rights[at : at + 4], sys.byteorder) for at in range(0, len(rights), 4)]


def _compile(text: str, name: str) -> list[types.CodeType]:
    """The code of a cell: its statements, and apart from them an expression that shows its value."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    linecache.cache[name] = (len(text), None, [line + "\n" for line in lines], name)
    # `_ast` and the flag do what `ast.parse` does, without the cost of `ast`.
    tree: Any = compile(text, name, "exec", _ast.PyCF_ONLY_AST, dont_inherit=True)
    body = tree.body
    last = body[-1] if body else None
    if not isinstance(last, _ast.Expr) or _is_quiet(lines, last):
        return [compile(_ast.Module(body, []), name, "exec", dont_inherit=True)]
    return [
        compile(_ast.Module(body[:-1], []), name, "exec", dont_inherit=True),
        compile(_ast.Interactive([last]), name, "single", dont_inherit=True),
    ]


def _is_quiet(lines: list[str], last: _ast.Expr) -> bool:
    """Whether a semicolon follows the expression."""
    end_line, end_column = last.end_lineno or 0, last.end_col_offset or 0
    return lines[end_line - 1].encode()[end_column:].lstrip().startswith(b";")


def _representations(value: object) -> dict[Any, Any]:
    """The rich representations of a value, by MIME type; an error in one of them is said and leaves it out."""
    bundle: dict[Any, Any] = {}
    if isinstance(value, type) or _guarded(value, getattr, value, _CANARY, None) is not None:
        return bundle
    for name in ("_repr_mimebundle_", *_METHODS):
        mime = _METHODS.get(name)
        if mime in bundle:
            continue
        method = _guarded(value, getattr, value, name, None)
        if not callable(method):
            continue
        got = _guarded(value, method) if mime else _guarded(value, method, include=None, exclude=None)
        if isinstance(got, tuple) and got:
            got = got[0]  # the second is metadata
        if mime and got is not None:
            bundle[mime] = got
        elif isinstance(got, dict):
            bundle.update(got)
    if _is_figure(value) and "image/png" not in bundle:
        bundle["image/png"] = _guarded(value, _draw, value)
    return {mime: data for mime, data in bundle.items() if data is not None}


def _is_figure(value: object) -> bool:
    """Whether it is a figure of matplotlib."""
    module = sys.modules.get("matplotlib.figure")
    return module is not None and isinstance(value, module.Figure)


def _draw(figure: Any) -> bytes:
    """The PNG of a figure, cut to what is drawn."""
    from io import BytesIO

    picture = BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    return picture.getvalue()


def _encode(mime: str, data: object) -> bytes:
    """The bytes of a representation. Pictures that are text are Base64, as in a notebook; objects become JSON."""
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    if not isinstance(data, str):
        return json.dumps(data).encode()
    if mime == "application/pdf" or (mime.startswith("image/") and not mime.endswith("+xml")):
        import binascii

        return binascii.a2b_base64(data)
    return data.encode(errors="backslashreplace")


def _guarded(value: object, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns; None, and a line on stderr, where it raises."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        # An error may fail to be text, too.
        reason = "".join(traceback.format_exception_only(type(error), error)).strip()
        _note(f"{getattr(function, '__name__', 'a representation')} of {type(value).__name__}: {reason}")
        return None


def _report_errors(function: Callable[..., object], *args: object) -> None:
    """Calls a function whose own failure is printed, if anything still can be."""
    try:
        function(*args)
    except Exception as error:
        with contextlib.suppress(Exception):
            _print_exception(type(error), error, error.__traceback__)


def _print_exception(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Prints a traceback to stderr without the frames of this file."""
    report = traceback.TracebackException(kind, error, trace)
    pending: list[Any] = [report]
    while pending:
        part = pending.pop()
        part.stack[:] = [frame for frame in part.stack if frame.filename != _OWN_FILE]
        linked = (part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or ()))
        pending += [other for other in linked if other is not None]
    sys.stderr.write("".join(report.format()))


def _note(text: str) -> None:
    """A line of ours on stderr."""
    with contextlib.suppress(Exception):
        sys.stderr.write(f"sandstorm: {text}\n")


def _exit_code(code: object) -> int:
    """The exit status that Python gives a program that raises `SystemExit(code)`."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    with contextlib.suppress(Exception):
        sys.stderr.write(f"{code}\n")
    return 1


def _mend_streams() -> None:
    """Opens the standard streams, also those that a cell closed; the descriptors below them change with every cell.

    Stdout is written line by line, as on a terminal: in the order in which children write, and before the cell ends.
    """
    for descriptor, name, mode, errors in (
        (0, "stdin", "r", "surrogateescape"),
        (1, "stdout", "w", "surrogateescape"),
        (2, "stderr", "w", "backslashreplace"),
    ):
        if getattr(getattr(sys, name), "closed", True):
            stream = open(descriptor, mode, 1, "utf-8", errors, closefd=False)  # noqa: SIM115 - it stays open
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _redirect(targets: dict[int, int]) -> None:
    """Lets each standard descriptor be a copy of another file."""
    for descriptor, file in targets.items():
        os.dup2(file, descriptor)


def _flush() -> None:
    """Empties the buffers of the standard streams, those of C included where something has made them reachable."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(Exception):
            stream.flush()  # type: ignore[union-attr]
    ctypes = sys.modules.get("ctypes")
    if ctypes is not None:
        with contextlib.suppress(Exception):
            ctypes.CDLL(None).fflush(None)


def _shield_from_interrupts() -> None:
    """Takes SIGINT from here on without effect; children that are started have its default, unlike with SIG_IGN."""
    while True:
        try:
            signal.signal(signal.SIGINT, lambda *_: None)
        except KeyboardInterrupt:  # one that came before the handler was in place
            continue
        return


def main() -> None:
    """Serves the socket that the command line names, and leaves whatever is still running behind."""
    control = _socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    sys.path[:0] = ["", *sys.argv[2:]]
    sys.argv[:] = [""]
    os.environ.setdefault("MPLBACKEND", "Agg")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()
    _mend_streams()
    Kernel(control).serve()
    os._exit(0)


if __name__ == "__main__":
    main()
