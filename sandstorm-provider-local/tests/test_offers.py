"""What is offered, what is declined with which rule, and on which facts."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import attrs
import pytest

from sandstorm import AsyncSandstorm, SandboxSpec, SettingsError
from sandstorm import provider as contract
from sandstorm.provider import ABILITIES, Declined, Environment, Facts, InvalidSpec, Offer, Prepare
from sandstorm_provider_local import LocalPlugin, LocalProvider, Settings
from sandstorm_provider_local._box import Box
from sandstorm_provider_local._boxprocess import BoxProcess
from sandstorm_provider_local._plainbox import PlainBox
from sandstorm_provider_local._process import LocalProcess
from sandstorm_provider_local._session import LocalSession
from sandstorm_provider_local._survey import namespaces_remedy

FACTS = Facts(
    data={
        "level": "namespaces",
        "verified": ["files hidden"],
        "failed": [],
        "remedy": "",
        "bwrap": "0.11.0",
        "groups": None,
        "seccomp": True,
        "runtimes": {"python3": "/usr/bin/python3"},
        "cpu": 2,
        "memory": 4096,
    }
)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("isolation-floor", {"isolation": "microvm"}),
        ("runtime-missing", {"environment": {"language": "javascript"}}),
        ("image", {"environment": {"image": "debian"}}),
        ("requirements", {"environment": {"requirements": ("numpy",)}}),
        ("network", {"network": "open"}),
        ("gpu", {"gpu": {"model": "H100"}}),
        ("region", {"region": "eu"}),
        ("size", {"cpu": 3}),
        ("size", {"memory": 8192}),
        ("size", {"disk": 3000}),
        ("user", {"user": "root"}),
        ("workdir", {"workdir": "/srv"}),
    ],
)
def test_what_cannot_be_enforced_is_declined(rule: str, fields: dict[str, Any]) -> None:
    """Each wish that cannot be met is declined under a rule of its own."""
    from sandstorm.provider import Environment, Gpu

    made = {"environment": lambda value: Environment(**value), "gpu": lambda value: Gpu(**value)}
    spec = SandboxSpec(**{name: made.get(name, lambda value: value)(value) for name, value in fields.items()})
    answers = LocalProvider().offers(spec, FACTS)
    assert [answer.rule for answer in answers if isinstance(answer, Declined)] == [rule]


def test_no_isolation_is_no_offer() -> None:
    """A machine that cannot isolate says what to do about it."""
    facts = Facts(data={**FACTS.data, "level": None, "failed": ["there is no bubblewrap"], "remedy": "install bubblewrap"})
    (answer,) = LocalProvider().offers(SandboxSpec(), facts)
    assert isinstance(answer, Declined)
    assert (answer.rule, "install bubblewrap" in answer.reason) == ("isolation-unavailable", True)
    assert LocalProvider().offers(SandboxSpec(), Facts())


def test_an_offer_says_what_was_verified() -> None:
    """An offer has the exact size, the verified level, and says that the kernel is shared."""
    (offer,) = LocalProvider().offers(SandboxSpec(), FACTS)
    assert isinstance(offer, Offer)
    assert (offer.memory, offer.isolation, offer.can("OneShot"), offer.can("Ports")) == (512, "namespaces", True, True)
    assert "shared host kernel" in offer.isolation_detail


def test_an_ability_that_this_machine_lacks_says_so() -> None:
    """What needs a freezer, tar or control groups is impossible without them, and everything declared not full has a reason."""
    (bare,) = LocalProvider().offers(SandboxSpec(), FACTS)
    full_facts = {**FACTS.data, "groups": "cgroup-v2", "freezer": True, "tar": True, "installers": {"uv": "/uv", "npm": "/npm"}}
    (full,) = LocalProvider().offers(SandboxSpec(), Facts(data=full_facts))
    assert isinstance(bare, Offer)
    assert isinstance(full, Offer)
    for ability in ("Pause", "Snapshot", "Fork", "Metered"):
        assert (bare.can(ability), full.can(ability)) == (False, True)
    assert (bare.abilities["Prepare"].level, full.abilities["Prepare"].level) == ("partial", "full")
    assert {"LiveRates", "Gpu"} == {name for name, support in full.abilities.items() if support.level == "impossible"}


ALL = {**FACTS.data, "groups": "cgroup-v2", "freezer": True, "tar": True, "installers": {"uv": "/uv", "npm": "/npm"}}
LEVELS = {
    "namespaces+cgroup": (Box, BoxProcess),
    "namespaces": (Box, BoxProcess),
    "namespaces-noproc": (Box, BoxProcess),
    "process": (PlainBox, LocalProcess),
    "none": (PlainBox, LocalProcess),
    "gvisor": (PlainBox, LocalProcess),
}


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_level_declares_it_has(level: str) -> None:
    """At each level, an ability is declared usable exactly where its methods are there, and has a reason where it is not full."""
    own = {"level": level, "version": "1", "platform": "systrap", "without_namespaces": ""}
    (offer,) = LocalProvider().offers(SandboxSpec(isolation=level), Facts(data={**ALL, **own}))
    assert isinstance(offer, Offer)
    assert list(offer.abilities) == list(ABILITIES)
    box, process = LEVELS[level]
    for name, support in offer.abilities.items():
        assert (support.level == "full") == (support.reason == "")
        protocol = getattr(contract, name, None)
        if protocol is None or not getattr(protocol, "_is_protocol", False):
            continue  # it is no method
        holder = process if name == "Interactive" else LocalSession if name in ("OneShot", "Prepare", "LiveRates") else box
        if name == "Prepare":
            assert support.usable == (box is Box)
        else:
            assert support.usable == issubclass(holder, protocol), name
    assert offer.can("Detach") == offer.extendable == (box is Box)
    assert (offer.workdir is None) == (level in ("process", "none"))


@pytest.mark.parametrize("level", ["process", "none", "gvisor"])
@pytest.mark.parametrize(
    ("rule", "fields"), [("ports", {"ports": (80,)}), ("idle-timeout", {"idle_timeout": 60.0}), ("workdir", {"workdir": "/srv"})]
)
def test_what_needs_a_supervisor_is_declined_without(level: str, rule: str, fields: dict[str, Any]) -> None:
    """Levels whose boxes have no supervisor do not take what only that could do."""
    own = {"level": level, "version": "1", "platform": "systrap", "without_namespaces": ""}
    (declined,) = LocalProvider().offers(SandboxSpec(isolation=level, **fields), Facts(data={**ALL, **own}))
    assert isinstance(declined, Declined)
    assert declined.rule == rule


def test_a_snapshot_goes_into_a_box() -> None:
    """What begins with a snapshot is not offered as a one-shot, so that it is run in a box."""
    (offer,) = LocalProvider().offers(SandboxSpec(snapshot="local/snap"), Facts(data=ALL))
    assert isinstance(offer, Offer)
    assert (offer.can("OneShot"), offer.can("Snapshot")) == (False, True)


async def test_every_line_of_the_isolation_is_verified(machine: Any) -> None:
    """The self-test finds nothing amiss on a machine that passes these tests."""
    assert machine.facts.data["failed"] == []
    assert {"files hidden", "network off", "no privileges", "unprivileged user"} <= set(machine.facts.data["verified"])


async def test_what_cannot_run_is_not_offered(machine: Any) -> None:
    """With a bubblewrap that does not confine, the default floor is declined, and the remedy is named."""
    async with LocalProvider(state_dir=str(machine.state), bwrap="/bin/true").connect() as session:
        (declined,) = LocalProvider().offers(SandboxSpec(), await session.refresh())
        assert isinstance(declined, Declined)
        assert declined.rule == "isolation-floor"
        assert "could not be set up" in declined.reason
        assert "allow unprivileged user namespaces" in declined.reason


@pytest.mark.parametrize(
    ("level", "language", "fix"),
    [
        *[("namespaces-noproc", language, "systempaths=unconfined") for language in ("rust", "java", "csharp")],
        ("process", "csharp", "ask for namespaces"),
    ],
)
def test_a_language_that_needs_proc_is_declined_without(level: str, language: str, fix: str) -> None:
    """Where there is no /proc, what does not start without it is declined with the way to get one, and python is not."""
    tools = {name: f"/usr/bin/{name}" for name in ("python3", "rustc", "gcc", "javac", "java", "mcs", "mono")}
    facts = Facts(data={**FACTS.data, "level": level, "runtimes": tools})

    def declined(language: str, level: str) -> list[str]:
        spec = SandboxSpec(environment=Environment(language=language), isolation="process")
        answers = LocalProvider().offers(spec, Facts(data={**facts.data, "level": level}))
        return [answer.reason for answer in answers if isinstance(answer, Declined)]

    (reason, *_) = declined(language, level)
    assert reason.startswith(f"{language} needs /proc")
    assert fix in reason
    assert declined("python", level) == declined(language, "namespaces") == []


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("user/max_user_namespaces", "0", "user.max_user_namespaces=10000"),
        ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor profile for bwrap"),
        ("user/max_user_namespaces", "10000", "unmask=ALL"),
    ],
)
def test_the_remedy_is_for_what_forbids_namespaces(tmp_path: Path, name: str, value: str, fix: str) -> None:
    """The setting of the kernel that forbids user namespaces is named, and the container's options where none does."""
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(f"{value}\n")
    remedy = namespaces_remedy(tmp_path)
    assert fix in remedy
    assert ("unmask=ALL" in remedy) == (fix == "unmask=ALL")


def test_the_plugin_gives_one_provider() -> None:
    """The entry point's class makes the provider without any I/O, and is light to import."""
    (provider,) = LocalPlugin(Settings()).sandstorm_providers()
    assert provider.name == "local"
    code = "import sys, sandstorm_provider_local; print([m for m in ('trio', 'asyncio', 'pluggy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"image_disk": 0}, r"plugins\.local\.image_disk: expected MiB, at least 1, got 0"),
        ({"environments_disk": "much"}, r"plugins\.local\.environments_disk"),
        ({"uv": 1}, r"plugins\.local\.uv"),
        ({"vu": "/usr/bin/uv"}, r"plugins\.local\.vu"),
    ],
)
async def test_a_setting_that_cannot_be_used_is_located(table: dict[str, Any], said: str) -> None:
    """An error in the settings names its table and key."""
    with pytest.raises(SettingsError, match=said):
        async with AsyncSandstorm(settings={"store": "sqlite://", "plugins": {"local": table}}):
            pass


async def test_settings_of_environments_are_obeyed(machine: Any, tmp_path: Path) -> None:
    """The uv and the sizes of the settings are those that prepare environments."""
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\n")
    uv.chmod(0o755)
    state = machine.state / "state"
    settings = Settings(state_dir=str(state), uv=str(uv), environments_disk=20, image_disk=10)
    (provider,) = LocalPlugin(settings).sandstorm_providers()
    async with provider.connect() as session:
        facts = await session.refresh()
        assert facts.data["installers"]["uv"] == str(uv)
        image = tmp_path / "image.tar"
        with tarfile.open(image, "w") as archive:
            member = tarfile.TarInfo("usr/big")
            member.size = 11 << 20
            archive.addfile(member, io.BytesIO(bytes(member.size)))
        assert isinstance(session, Prepare)
        with pytest.raises(InvalidSpec, match="image_disk in the settings"):
            await session.prepare(Environment(image=str(image)), "prepared")
    settings = Settings(state_dir=str(state), uv=str(tmp_path / "missing"))
    (provider,) = LocalPlugin(settings).sandstorm_providers()
    async with provider.connect() as session:
        assert "uv" not in (await session.refresh()).data["installers"]


def test_the_readme_names_every_setting_and_ability() -> None:
    """What can be set, with its default where that is a figure, and what can be asked for stands in the README."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    for field in attrs.fields(Settings):
        shown = f" {field.default} |" if isinstance(field.default, int) and not isinstance(field.default, bool) else ""
        assert f"| `{field.name}` |{shown}" in text
    for name in ABILITIES:
        assert f"`{name}`" in text
