"""Secrets: where they are looked up, what is said when one is missing, and what is left of them in what is recorded."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from trio.testing import MockClock

from sandstorm import AsyncSandstorm, Constraints, InvalidInput, InvalidSpec, Outcome, PluginError, RunResult, SandboxSpec, Task
from sandstorm._converter import decode
from sandstorm._journal import Recorder
from sandstorm._masker import MASK, SHORTEST, Masker
from sandstorm._plan import Plan, Request
from sandstorm._result import Artifact, Exit
from sandstorm._secrets import EnvironmentSource, FileSource, SecretsPlugin, SecretsSettings, resolve
from sandstorm._sqlite import SqliteStore
from sandstorm.policy import SecretSource
from sandstorm.provider import Order
from sandstorm.testing import ReferenceProvider, plugin_for

SECRET = "s3cr3t+Zu/ä w%"
ODD = 'ä"b\\c\nd'
KEY = "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END KEY-----\n"


# --- masking: whole ---------------------------------------------------------------------------------------

values = st.text("ab0 \n\"'%é", min_size=1, max_size=9)
"""Few letters, so that secrets overlap; no asterisk, since a mask next to one would look like a secret."""


@st.composite
def texts_with(draw: st.DrawFn, secrets: list[str]) -> bytes:
    """Bytes that consist of secrets, parts of them, their encodings and other letters."""
    encoded = [value.encode() for value in secrets]
    parts = [part for value in encoded for part in (value, value[:-1], value[1:], base64.b64encode(value), value.hex().encode())]
    pieces = st.sampled_from(parts) if parts else st.nothing()
    return b"".join(draw(st.lists(pieces | st.binary(max_size=4) | values.map(str.encode), max_size=8)))


cases = st.lists(values, max_size=3).flatmap(lambda secrets: st.tuples(st.just(secrets), texts_with(secrets)))


def by_marking(masker: Masker, data: bytes) -> bytes:
    """The same as `Masker.data`, by marking every byte of every occurrence."""
    marked = [False] * len(data)
    for form in masker._forms:
        for at in range(len(data)):
            if data.startswith(form, at):
                marked[at : at + len(form)] = [True] * len(form)
    ends = [at for at in range(len(data)) if marked[at] and not (at and marked[at - 1])]
    return b"".join(MASK if at in ends else data[at : at + 1] for at in range(len(data)) if at in ends or not marked[at])


@given(cases)
@example((["abcd", "cdef"], b"-abcdef-"))
@example((["aaaa"], b"aaaaaaaaab"))
@example((["abcd"], b"abcdabcd abcd"))
def test_every_byte_of_every_secret_is_masked(case: tuple[list[str], bytes]) -> None:
    """Masking replaces exactly the bytes that belong to some form of some secret, however these overlap."""
    secrets, data = case
    masker = Masker(secrets)
    assert masker.data(data) == by_marking(masker, data)


@given(cases)
def test_no_secret_survives(case: tuple[list[str], bytes]) -> None:
    """No secret of at least four bytes is in what was masked."""
    secrets, data = case
    masked = Masker(secrets).data(data)
    assert not [secret for secret in secrets if len(secret.encode()) >= SHORTEST and secret.encode() in masked]


@given(
    st.lists(st.text("xyz", max_size=9), max_size=3),
    st.binary().map(lambda data: data.translate(None, b"xyzXYZ0123456789abcdefABCDEF=")),
)
def test_other_bytes_stay(secrets: list[str], data: bytes) -> None:
    """Bytes in which no form of a secret can stand come back as they are."""
    masker = Masker(secrets)
    assert masker.data(data) == by_marking(masker, data)
    assert Masker(["never printed"]).data(data) == data


@given(st.text(st.characters()), values)
def test_text_is_masked_like_bytes(text: str, secret: str) -> None:
    """Any text, lone surrogates included, is masked as its UTF-8 is, and without a secret in it stays as it is."""
    masker = Masker([secret])
    for given_text in (text, text + secret + text):
        masked = masker.text(given_text)
        assert masked.encode("utf-8", "surrogatepass") == masker.data(given_text.encode("utf-8", "surrogatepass"))
    assert Masker(["never printed"]).text(text) == text


@pytest.mark.parametrize("before", [b"", b"u", b"us", b"user:"])
@pytest.mark.parametrize("after", [b"", b"\n", b"ab"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64_at_any_offset(before: bytes, after: bytes, encode: Any) -> None:
    """Base64 of a text around the secret leaves at most one letter on each side that it shares with the secret."""
    secret = SECRET.encode()
    encoded = encode(before + secret + after)
    masked = Masker([SECRET]).data(b"Authorization: Basic " + encoded + b"\r\n")
    assert masked.startswith(b"Authorization: Basic ")
    assert masked.endswith(b"\r\n")
    left, mask, right = masked[21:-2].partition(MASK)
    assert mask
    # Beside those, the letters of the other text stay.
    assert len(left) <= -(-len(before) * 8 // 6) + 1
    assert len(right.rstrip(b"=")) <= -(-len(after) * 8 // 6) + 1


@pytest.mark.parametrize(
    "written",
    [
        SECRET,
        json.dumps({"token": SECRET}),
        json.dumps({"token": SECRET}, ensure_ascii=False),
        repr({"token": SECRET}),
        "?token=" + quote(SECRET),
        "?token=" + quote(SECRET, safe=""),
        "?token=" + quote_plus(SECRET),
        SECRET.encode().hex(),
        SECRET.encode().hex().upper(),
        json.dumps({"token": ODD}),
        json.dumps({"token": ODD}, ensure_ascii=False),
        repr({"token": ODD}),
    ],
)
def test_common_encodings(written: str) -> None:
    """A secret is masked in the encodings in which programs print it."""
    masked = Masker([SECRET, ODD]).text(written)
    assert masked in {"***", '{"token": "***"}', "{'token': '***'}", "?token=***"}


@pytest.mark.parametrize(
    "printed", [KEY, KEY.strip(), KEY.replace("\n", "\r\n"), "  " + KEY.replace("\n", "\n  "), json.dumps(KEY)]
)
def test_secret_of_several_lines(printed: str) -> None:
    """No line of a key is left, whatever the terminal made of the line ends."""
    masked = Masker([KEY]).text(printed)
    assert not [line for line in KEY.split() if len(line) >= 8 and line in masked]


def test_secret_with_a_line_end() -> None:
    """A secret from a file is masked without its line end too, which programs cut off."""
    assert Masker(["hunter\n"]).text("token=hunter, 68756e746572") == "token=***, ***"


def test_short_and_empty_secrets() -> None:
    """Secrets of up to three bytes are left, since masking them would destroy the output; four bytes are masked."""
    assert Masker(["", "a", "ab", "abc", "\n"]).data(b"abc a\n") == b"abc a\n"
    assert Masker(["", "abcd"]).data(b"abcd a\n") == b"*** a\n"


def test_a_flood_of_one_letter() -> None:
    """Millions of overlapping occurrences cost no more than their bytes: this would take minutes otherwise."""
    assert Masker(["aaaa"]).data(b"-" + b"a" * 8_000_000 + b"-") == b"-***-"


def test_masker_shows_no_secret() -> None:
    """Neither the masker nor its stream shows what it masks."""
    masker = Masker([SECRET])
    stream = masker.stream()
    stream.feed(SECRET.encode())
    assert "s3cr3t" not in repr((masker, stream))


# --- masking: in pieces -----------------------------------------------------------------------------------


@given(cases, st.lists(st.integers(0, 60), max_size=8))
@example((["abcd", "cdef"], b"abcdef"), [1, 2, 3, 4, 5])
@example((["abcd"], b"abcdabcd"), [4])
@example((["abcd"], b"61626364"), [7])
def test_pieces_are_masked_like_the_whole(case: tuple[list[str], bytes], cuts: list[int]) -> None:
    """For any split into pieces, empty ones included, the masked pieces together are the masked whole."""
    secrets, data = case
    masker = Masker(secrets)
    stream = masker.stream()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [stream.feed(data[start:end]) for start, end in pairwise(edges)]
    assert b"".join(pieces) + stream.end() == masker.data(data)


@given(st.lists(values, max_size=3), st.lists(st.binary(max_size=40), max_size=8))
def test_little_is_held_back(secrets: list[str], pieces: list[bytes]) -> None:
    """A stream holds back less than the longest form of a secret, and nothing where there is no secret."""
    masker = Masker(secrets)
    longest = max(map(len, masker._forms), default=1)
    stream = masker.stream()
    given_out = b""
    for piece in pieces:
        given_out += stream.feed(piece)
        assert len(stream._held) <= longest - 1
    whole = b"".join(pieces)
    if not masker._forms or by_marking(masker, whole) == whole:
        assert len(given_out) >= len(whole) - longest + 1


# --- the environment --------------------------------------------------------------------------------------


async def test_no_variable_is_readable_unless_it_is_meant_to_be() -> None:
    """Without settings only variables with the prefix are secrets; the host's others are not there."""
    source = EnvironmentSource(environ={"TOKEN": "host", "SANDSTORM_SECRET_TOKEN": "meant", "AWS_SECRET_ACCESS_KEY": "host"})
    assert await source.lookup("TOKEN") == "meant"
    assert await source.lookup("AWS_SECRET_ACCESS_KEY") is None
    assert await source.lookup("PATH") is None


@pytest.mark.parametrize("listed", [["TOKEN", "EMPTY"], {"TOKEN": "TOKEN", "DB": "PGPASSWORD"}])
async def test_variables_of_the_settings(listed: Any) -> None:
    """The settings list variables, or name the variable that holds a secret; an empty one counts as missing."""
    settings = decode(SecretsSettings, {"environment": listed}, "plugins.secrets")
    source = EnvironmentSource(settings.environment, {"TOKEN": "one", "PGPASSWORD": "two", "EMPTY": ""})
    assert await source.lookup("TOKEN") == "one"
    assert await source.lookup("DB") == ("two" if "DB" in listed else None)
    assert await source.lookup("EMPTY") is None


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ({"environment": "hunter2"}, "environment"),
        ({"environment": ["TOKEN=hunter2"]}, "environment"),
        ({"environment": {"TOKEN": "hunter2/="}}, "environment.TOKEN"),
        ({"environment": {"TOKEN": ["hunter2"]}}, "environment.TOKEN"),
        ({"TOKEN": "hunter2"}, "TOKEN"),
    ],
)
def test_a_value_in_the_settings_is_refused_unseen(table: dict[str, Any], field: str) -> None:
    """Who writes the value where its variable belongs is told where, and the value is not repeated."""
    with pytest.raises(InvalidInput) as caught:
        decode(SecretsSettings, table, "plugins.secrets")
    assert caught.value.field == f"plugins.secrets.{field}"
    assert "hunter2" not in shown(caught.value)


async def test_a_value_that_looks_like_a_variable_is_not_shown() -> None:
    """Where the settings name a variable that is not set, the error does not repeat it: it may be the value by mistake."""
    sources = SecretsPlugin(decode(SecretsSettings, {"environment": {"TOKEN": "hunter2"}})).sandstorm_secrets()
    with pytest.raises(InvalidInput, match=r"set the variable that plugins\.secrets\.environment gives for TOKEN") as caught:
        await resolve(["TOKEN"], sources)
    assert "hunter2" not in shown(caught.value)
    assert "hunter2" not in repr(sources)


# --- the file ---------------------------------------------------------------------------------------------


def secrets_file(directory: Path, content: str | bytes, mode: int = 0o600) -> Path:
    """A file of secrets."""
    path = directory / "secrets.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def shown(error: BaseException) -> str:
    """All that a log would show of an error, causes and contexts included."""
    return "".join(traceback.format_exception(error)) + repr(error) + repr(error.__context__)


async def test_file(tmp_path: Path) -> None:
    """Names and values of a TOML file, lines and quotes included; an empty or absent one is missing; changes are seen."""
    path = secrets_file(tmp_path, 'TOKEN = "hunter2"\nEMPTY = ""\nKEY = """a\nb"""\n')
    source = FileSource(path)
    assert [await source.lookup(name) for name in ("TOKEN", "EMPTY", "KEY", "OTHER")] == ["hunter2", None, "a\nb", None]
    secrets_file(tmp_path, 'TOKEN = "hunter3"')
    assert await source.lookup("TOKEN") == "hunter3"
    assert "hunter" not in repr(source)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o777])
async def test_file_that_others_can_use(tmp_path: Path, mode: int) -> None:
    """A file that others may read or write is refused with the command that mends it."""
    path = secrets_file(tmp_path, 'TOKEN = "hunter2"', mode)
    with pytest.raises(InvalidInput, match=rf"run chmod 600 {path}, got 'mode {mode:o}'"):
        await FileSource(path).lookup("TOKEN")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('A = "1"\nTOKEN=hunter2\n', "got 'an error at line 2, column 7'"),
        ('TOKEN = "hunter2', "got 'an error at end of document'"),
        ('TOKEN = "hunter2\n', "got 'an error at line 1, column 17'"),
        (b'TOKEN = "hunter2\xff"', "got 'another encoding at byte 16'"),
        ('TOKEN = ["hunter2"]', "secrets.toml: TOKEN: expected text in quotes, got 'list'"),
        ("[TOKEN]\nvalue = 'hunter2'", "secrets.toml: TOKEN: expected text in quotes, got 'dict'"),
        ("# hunter2\n" + "#" * 1024 * 1024, "at most 1048576 bytes"),
    ],
)
async def test_file_that_is_wrong(tmp_path: Path, content: str | bytes, said: str) -> None:
    """What is wrong with a file is located, and nothing of its content is shown or kept by the error."""
    path = secrets_file(tmp_path, content)
    with pytest.raises(InvalidInput) as caught:
        await FileSource(path).lookup("TOKEN")
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "hunter2" not in shown(caught.value)


async def test_file_that_is_none(tmp_path: Path) -> None:
    """A path without a file is an error that says so, and a pipe or a directory is not waited for."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "directory").mkdir(mode=0o700)
    for name, said in (("absent", "No such file"), ("pipe", "a regular file"), ("directory", "directory")):
        with pytest.raises(InvalidInput, match=said):
            await FileSource(tmp_path / name).lookup("TOKEN")


def test_path_of_the_file() -> None:
    """The path is absolute or below the home directory: what it means must not depend on the working directory."""
    assert decode(SecretsSettings, {"file": "/run/secrets.toml"}).file == Path("/run/secrets.toml")
    assert decode(SecretsSettings, {"file": "~/secrets.toml"}).file == Path.home() / "secrets.toml"
    assert SecretsSettings().file is None
    for wrong in ("secrets.toml", "", "./a", 3, "/a\0b"):
        with pytest.raises(InvalidInput, match="an absolute path"):
            decode(SecretsSettings, {"file": wrong})


# --- several sources --------------------------------------------------------------------------------------


@attrs.frozen
class Vault:
    """A source of a plugin that answers, or raises, the same for every name."""

    answer: Any
    name: str = "vault"

    async def lookup(self, secret: str) -> str | None:
        """The answer."""
        if isinstance(self.answer, Exception):
            raise self.answer
        answer: str | None = self.answer
        return answer


async def test_first_source_wins(tmp_path: Path) -> None:
    """The environment comes before the file, and the file before a source that is asked later."""
    path = secrets_file(tmp_path, 'BOTH = "of the file"\nFILE = "of the file"')
    environment = EnvironmentSource(environ={"SANDSTORM_SECRET_BOTH": "of the environment"})
    found = await resolve(["BOTH", "FILE", "REST"], [environment, FileSource(path), Vault("of the vault")])
    assert found == {"BOTH": "of the environment", "FILE": "of the file", "REST": "of the vault"}
    settings = decode(SecretsSettings, {"file": str(path)})
    assert [type(source) for source in SecretsPlugin(settings).sandstorm_secrets()] == [EnvironmentSource, FileSource]


async def test_missing_secret(tmp_path: Path) -> None:
    """Who misses a secret is told its name, every place where it was looked for, and what to do in each."""
    path = secrets_file(tmp_path, 'OTHER = "hunter2"')
    with pytest.raises(InvalidInput) as caught:
        await resolve(["TOKEN"], [EnvironmentSource(environ={}), FileSource(path), Vault(None)])
    assert str(caught.value) == (
        "spec.secrets: expected the name of a secret that a source has: looked in the environment (set "
        "SANDSTORM_SECRET_TOKEN, or list TOKEN in plugins.secrets.environment), "
        f"the file '{path}' (add TOKEN = \"...\"), vault, got 'TOKEN'"
    )
    with pytest.raises(InvalidInput, match="expected no secrets without a source, got 'TOKEN'"):
        await resolve(["TOKEN"], [])


@pytest.mark.parametrize("name", ["", "A=B"])
async def test_name_that_is_no_variable(name: str) -> None:
    """A name that no environment variable can have is refused before any source is asked."""
    with pytest.raises(InvalidInput, match="names of environment variables"):
        await resolve([name], [Vault(ValueError("asked"))])


@pytest.mark.parametrize("value", ["hunter2\0", "hunter2\udcff"])
async def test_value_that_no_variable_can_have(value: str) -> None:
    """A value with NUL or of another encoding is refused without being shown."""
    with pytest.raises(InvalidInput, match="valid Unicode without NUL, unlike the one in vault, got 'TOKEN'") as caught:
        await resolve(["TOKEN"], [Vault(value)])
    assert "hunter2" not in shown(caught.value)


@pytest.mark.parametrize(
    ("answer", "said"),
    [(b"hunter2", "its value of TOKEN is bytes, not text"), (OSError("no route to the vault"), "OSError: no route to the vault")],
)
async def test_source_that_fails(answer: Any, said: str) -> None:
    """A source that raises, or answers something else, ends the run by its name, and no later source is asked."""
    with pytest.raises(PluginError, match=rf"plugin 'vault' \(secrets\): {said}") as caught:
        await resolve(["TOKEN"], [Vault(answer), Vault("later")])
    assert "hunter2" not in shown(caught.value)


async def test_short_secret_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    """A secret that is too short to be masked is given to the program, and a warning names it without its value."""
    with caplog.at_level(logging.WARNING, "sandstorm"):
        assert await resolve(["PIN", "TOKEN"], [EnvironmentSource({"PIN": "P", "TOKEN": "T"}, {"P": "739", "T": "hunter2"})])
    (record,) = caplog.records
    assert record.getMessage() == "the secret PIN has fewer than 4 bytes: it is not masked in what is recorded"


# --- what is recorded -------------------------------------------------------------------------------------


def result_of(plan: Plan) -> RunResult:
    """A result whose every part has the secret in it."""
    data = f"<{SECRET}>".encode()
    return RunResult(
        id="r",
        stdout=data,
        stderr=base64.b64encode(data),
        exit=Exit(code=0),
        outputs={"out": data},
        artifacts=(Artifact(mime="text/plain", data=data, name=SECRET),),
        outcome=Outcome.FINISHED,
        provider="only",
        isolation="none",
        total_seconds=1.0,
        run_seconds=1.0,
        cost=Decimal(0),
        cost_open=Decimal(0),
        attempts=(),
        plan=plan,
    )


IN_BASE64 = base64.b64encode(f"<{SECRET}>".encode()).decode()[4:12]


def leaks(text: str | None) -> bool:
    """Whether the secret is in a text, as it is or in base64."""
    return text is not None and any(form in text for form in ("s3cr3t", IN_BASE64))


@pytest.mark.parametrize("keep", ["everything", "results", "nothing"])
@pytest.mark.parametrize(
    "task", [Task(code=SECRET, language="python", stdin=SECRET), Task(argv=["echo", SECRET], args=[SECRET]), None]
)
def test_nothing_recorded_has_a_secret(keep: str, task: Task | None) -> None:
    """No column of a run's row has the secret, wherever the caller, the program or a vendor wrote it; the result keeps it."""
    spec = SandboxSpec(
        secrets=["TOKEN"],
        env={"A": SECRET},
        labels={"a": SECRET},
        files={"a": SECRET.encode()},
        provider_options={"only": {"a": [{"b": SECRET}, 1, None]}},
    )
    request = Request(
        id="r", task=task, spec=spec, constraints=Constraints(), strategy="cheapest", tenant="default", lifetime=60.0
    )
    plan = Plan(request=request, candidates=(), exclusions=(), strategy="cheapest", at=0.0)
    recorder = Recorder(keep)
    planned = recorder.planned(plan, [SECRET])
    result = result_of(plan)
    finished = recorder.finished(planned, result, [SECRET])
    error = recorder.error(ValueError(f"bad request: { ({'token': SECRET}) }"), [SECRET])
    assert not [text for text in (planned.title, planned.request, planned.plan, finished.result, error) if leaks(text)]
    assert ("<***>" in (finished.result or "")) == (keep != "nothing")
    assert result == result_of(plan)


@asynccontextmanager
async def opened(store: SqliteStore, **secrets: Any) -> AsyncIterator[AsyncSandstorm]:
    """A client over the reference provider, with these settings of the plugin."""
    settings = {"plugins": {"secrets": secrets}}
    provider = ReferenceProvider("only")
    async with AsyncSandstorm(settings=settings, plugins=[("testing", plugin_for(provider))], store=store) as client:
        yield client


async def test_a_run_with_secrets(autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program and the caller get the exact values, looked up for each run anew; the journal gets neither of them."""
    monkeypatch.setenv("SANDSTORM_SECRET_TOKEN", "hunter2-first")
    path = secrets_file(tmp_path, 'DB = "correct horse"')
    store = SqliteStore("sqlite://", inline=True)
    async with opened(store, file=str(path)) as client:
        spec = SandboxSpec(secrets=["TOKEN", "DB"])
        first = await client.run("env TOKEN\nenv DB\nout fine", "python", spec=spec)
        monkeypatch.setenv("SANDSTORM_SECRET_TOKEN", "hunter2-second")
        second = await client.run("env TOKEN", "python", spec=spec)
        assert (first.stdout, second.stdout) == (b"hunter2-first\ncorrect horse\nfine\n", b"hunter2-second\n")
        stored = repr([await store.run(result.id) for result in (first, second)])
        assert "***\\n***\\nfine" in stored.replace("\\\\", "\\")
        assert "hunter2" not in stored
        assert "horse" not in stored
        assert not [value for value in ("hunter2", "horse") if value in repr((first.plan, client))]


class Quoting(ReferenceProvider):
    """A provider whose errors quote the secrets that it was given, as vendors do that echo the request."""

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        async with super().connect() as session:

            class Echoing:
                refresh, check = session.refresh, session.check

                async def create(self, order: Order) -> None:
                    said = ValueError("x" * 490 + order.secrets["TOKEN"])
                    raise InvalidSpec(f"bad request: {order.secrets['TOKEN']}") from said

            yield Echoing()


async def test_an_error_that_quotes_a_secret(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the error that the caller gets, with all that led to it, nor the journal has it."""
    monkeypatch.setenv("SANDSTORM_SECRET_TOKEN", "hunter2-first")
    store = SqliteStore("sqlite://", inline=True)
    plugins = [("testing", plugin_for(Quoting("only")))]
    async with AsyncSandstorm(plugins=plugins, store=store) as client:
        with pytest.raises(InvalidSpec) as caught:
            await client.run("out a", "python", spec=SandboxSpec(secrets=["TOKEN"]))
        assert str(caught.value) == "bad request: ***"
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
        (run,) = await store.runs()
        assert "hunter2" not in repr(await store.run(run.id))


async def test_a_command_that_quotes_a_secret(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller wrote into the command itself is masked in the journal too."""
    monkeypatch.setenv("SANDSTORM_SECRET_TOKEN", "hunter2-first")
    store = SqliteStore("sqlite://", inline=True)
    async with opened(store) as client:
        await client.run(argv=["out", "hunter2-first"], spec=SandboxSpec(secrets=["TOKEN"]))
        (run,) = await store.runs()
        assert "hunter2" not in repr(await store.run(run.id))


async def test_missing_secret_of_a_run(autojump_clock: MockClock) -> None:
    """A run that names a secret without a source ends before anything is written or created, with the remedy."""
    store = SqliteStore("sqlite://", inline=True)
    async with opened(store) as client:
        with pytest.raises(InvalidInput, match=r"spec\.secrets: .*set SANDSTORM_SECRET_TOKEN, .*, got 'TOKEN'"):
            await client.run("out a", "python", spec=SandboxSpec(secrets=["TOKEN"]))
        assert await store.runs() == []


def test_users_do_not_load_it() -> None:
    """Importing the user namespace loads neither the sources nor the masker."""
    code = "import sys, sandstorm; print([name for name in sys.modules if name in ('sandstorm._secrets', 'sandstorm._masker')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "[]\n"


def test_names_of_the_sources() -> None:
    """The built-in sources have the names by which errors show them, as the protocol of sources asks."""
    sources: list[SecretSource] = [EnvironmentSource(), FileSource(Path("/a"))]
    assert [source.name for source in sources] == ["the environment", "the file '/a'"]
