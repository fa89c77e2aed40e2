"""What is decided without a daemon: offers, errors, frames and lists."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio.testing

from sandstorm.provider import (
    Ambiguous,
    AuthError,
    CapacityError,
    Conflict,
    Declined,
    Environment,
    Facts,
    Gpu,
    InvalidInput,
    InvalidSpec,
    Network,
    Offer,
    ProviderDown,
    SandboxGone,
    SandboxSpec,
    StreamLost,
)
from sandstorm_provider_docker import DockerPlugin, DockerProvider, Settings
from sandstorm_provider_docker._daemon import Daemon
from sandstorm_provider_docker._errors import Refusal, map_docker_errors
from sandstorm_provider_docker._files import entries
from sandstorm_provider_docker._socket import is_configured, socket_path

FACTS = Facts(data={"level": "container", "remedy": "", "detail": "as told", "cpu": 4, "memory": 4096})


def rules(facts: Facts = FACTS, **fields: Any) -> list[str]:
    """The rules that forbid an offer for a spec of these fields."""
    return [made.rule for made in DockerProvider().offers(SandboxSpec(**fields), facts) if isinstance(made, Declined)]


def test_an_offer_is_what_was_asked_for() -> None:
    """An offer has the size of the spec, the level of the facts, and a support for each ability."""
    (offer,) = DockerProvider().offers(SandboxSpec(cpu=2, memory=300, disk=7, ports=(80,), network="open"), FACTS)
    assert isinstance(offer, Offer)
    assert (offer.cpu, offer.memory, offer.disk, offer.isolation) == (2, 300, 7, "container")
    assert {name for name, support in offer.abilities.items() if support.usable} == {
        "Interactive", "Files", "Ports", "Pause", "Detach"
    }  # fmt: skip


def test_what_cannot_be_enforced_is_declined() -> None:
    """Every control that a container cannot give excludes it, by name."""
    assert rules() == []
    assert rules(network=Network(mode="allow", hosts=("a.example",))) == ["network"]
    assert rules(ports=(80,)) == ["ports"]
    assert rules(isolation="gvisor") == ["isolation-floor"]
    assert rules(gpu=Gpu(model="H100")) == ["gpu"]
    assert rules(region="eu") == ["region"]
    assert rules(cpu=5) == rules(memory=5000) == ["size"]
    assert rules(user="root") == ["user"]
    assert rules(workdir="/x") == ["workdir"]
    assert rules(idle_timeout=5) == ["idle-timeout"]
    assert rules(snapshot="s") == ["snapshot"]
    assert rules(environment=Environment(requirements=("numpy",))) == ["requirements"]
    assert rules(environment=Environment(language="cobol")) == ["image-unknown"]
    assert rules(environment=Environment(language="cobol", image="cobol:1")) == []
    nothing = attrs_evolved(level=None, remedy="do this")
    assert DockerProvider().offers(SandboxSpec(), nothing)[0].reason == "do this"  # type: ignore[union-attr]


def attrs_evolved(**data: Any) -> Facts:
    """The facts with other data."""
    return Facts(data={**FACTS.data, **data})


def test_each_socket_is_an_account() -> None:
    """Settings give the account `docker` and one for each further socket, with images laid over the packaged ones."""
    settings = Settings(socket="/a", accounts={"team": "unix:///b"}, images={"python": "mine"}, runtime="runsc")
    providers = DockerPlugin(settings).sandstorm_providers()
    assert [(each.name, each.socket, each.runtime) for each in providers] == [  # type: ignore[attr-defined]
        ("docker", "/a", "runsc"),
        ("docker:team", "unix:///b", "runsc"),
    ]
    assert providers[0].images["python"] == "mine"  # type: ignore[attr-defined]
    assert "node" in providers[0].images["javascript"]  # type: ignore[attr-defined]


def test_which_socket_is_used(tmp_path: Any) -> None:
    """The settings win over the environment, that over known places, and what is no socket is refused."""
    own = tmp_path / "podman" / "podman.sock"
    own.parent.mkdir()
    own.touch()
    environ = {"DOCKER_HOST": "unix:///from-env", "XDG_RUNTIME_DIR": str(tmp_path)}
    assert socket_path("/set", environ) == "/set"
    assert socket_path(None, environ) == "/from-env"
    assert socket_path(None, {"XDG_RUNTIME_DIR": str(tmp_path)}) == str(own)
    assert is_configured("/set", {})
    assert is_configured(None, environ)
    assert is_configured(None, {"XDG_RUNTIME_DIR": str(tmp_path)})
    assert not is_configured(None, {"XDG_RUNTIME_DIR": str(tmp_path / "empty")}) or Path("/run/podman/podman.sock").exists()
    with pytest.raises(InvalidInput, match="unix://"):
        socket_path(None, {"DOCKER_HOST": "tcp://10.0.0.1:2375"})


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (Refusal(404, "No such image: x"), InvalidSpec),
        (Refusal(404, "no container with name x: no such container"), SandboxGone),
        (Refusal(500, "does not exist in database: no such container"), SandboxGone),
        (Refusal(409, "Conflict. The container name is already in use"), Conflict),
        (Refusal(500, "the container name x is already in use by y"), Conflict),
        (Refusal(409, "container x is not running"), SandboxGone),
        (Refusal(500, "write /x: no space left on device"), CapacityError),
        (Refusal(400, "invalid value"), InvalidSpec),
        (Refusal(403, "denied"), AuthError),
        (Refusal(503, "starting"), ProviderDown),
        (Refusal(500, "something else"), Ambiguous),
        (httpx.ConnectError("refused"), ProviderDown),
        (httpx.ReadTimeout("late"), Ambiguous),
        (httpx.RemoteProtocolError("cut"), Ambiguous),
        (FileNotFoundError("socket"), ProviderDown),
        (PermissionError("socket"), AuthError),
        (trio.BrokenResourceError("cut"), StreamLost),
    ],
)
def test_what_went_wrong_has_one_class(raised: Exception, expected: type[Exception]) -> None:
    """Each answer and each failure of the connection is the error of the contract that it means."""
    with pytest.raises(expected) as caught, map_docker_errors():
        raise raised
    assert caught.value.__cause__ is raised


def test_a_list_is_read_exactly() -> None:
    """Names with line breaks are told apart, files without a line have gone, and a cut list is an error."""
    evil = b"./x\n81a4 7 1 ./forged"
    told = b"./a\0" + evil + b"\0./gone\0\0" + b"81a4 3 9 ./a\n81a4 5 9 " + evil + b"\n\0./d\0\x0041ed 60 9 ./d\n\0"
    assert [(info.path, info.kind, info.size) for info in entries(told)] == [
        ("a", "file", 3),
        (os.fsdecode(evil)[2:], "file", 5),
        ("d", "directory", 0),
    ]
    assert entries(b"") == []
    with pytest.raises(StreamLost):
        entries(told[:-1])


async def talk(path: str, answer: list[bytes], nursery: trio.Nursery) -> None:
    """A server at a socket that takes one connection, answers in these pieces and closes."""
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(path)
    listener.listen()

    async def serve() -> None:
        with listener:
            connection, _ = await listener.accept()
            with connection, suppress(BrokenPipeError):
                await connection.recv(65536)
                for piece in answer:
                    await connection.send(piece)
                    await trio.testing.wait_all_tasks_blocked()

    nursery.start_soon(serve)


_HEAD = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\n\r\n"
_FRAMES = b"\1\0\0\0\0\0\0\3abc" + b"\2\0\0\0\0\0\0\0" + b"\2\0\0\0\0\0\0\2de"


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_frames_are_read_however_they_are_cut(tmp_path: Any, size: int) -> None:
    """The two streams come out exactly wherever the bytes were divided, and a cut within a frame is no end."""
    for cut, lost in ((0, False), (1, True), (len(_FRAMES) - 15, True)):
        data = _HEAD + _FRAMES[: len(_FRAMES) - cut]
        path = str(tmp_path / f"{size}-{cut}")
        async with trio.open_nursery() as nursery:
            await talk(path, [data[at : at + size] for at in range(0, len(data), size)], nursery)
            daemon = Daemon(path)
            stream = await daemon.upgraded("/x", {}, terminal=False)
            got = {"stdout": b"", "stderr": b""}
            ended = False
            try:
                while (piece := await stream.receive()) is not None:
                    got[piece[0]] += piece[1]
                ended = True
            except StreamLost:
                pass
            await stream.close()
            await daemon.close()
        assert ended is not lost
        assert got == {"stdout": b"abc", "stderr": b"" if cut > 1 else b"de"[: 2 - cut]}


async def test_a_refused_upgrade_says_why(tmp_path: Any) -> None:
    """An answer other than an upgrade becomes the error that its body names."""
    body = json.dumps({"message": "container x is not running"}).encode()
    answer = b"HTTP/1.1 409 Conflict\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with trio.open_nursery() as nursery:
        await talk(str(tmp_path / "s"), [answer], nursery)
        daemon = Daemon(str(tmp_path / "s"))
        with pytest.raises(SandboxGone, match="not running"):
            await daemon.upgraded("/x", {}, terminal=False)
        await daemon.close()
