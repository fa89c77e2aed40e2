"""What is offered, what is declined with which rule, and on which facts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandstorm.provider import Declined, Facts, Offer, SandboxSpec
from sandstorm_provider_local import LocalPlugin, LocalProvider, Settings

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


async def test_every_line_of_the_isolation_is_verified(machine: Any) -> None:
    """The self-test finds nothing amiss on a machine that passes these tests."""
    assert machine.facts.data["failed"] == []
    assert {"files hidden", "network off", "no privileges", "unprivileged user"} <= set(machine.facts.data["verified"])


async def test_what_cannot_run_is_not_offered(tmp_path: Path) -> None:
    """With a bubblewrap that does not confine, there is no level and `check` names the remedy."""
    from sandstorm.provider import ProviderDown

    async with LocalProvider(state_dir=str(tmp_path / "state"), bwrap="/bin/true").connect() as session:
        assert (await session.refresh()).data["level"] is None
        with pytest.raises(ProviderDown, match="set up"):
            await session.check()


def test_the_plugin_gives_one_provider() -> None:
    """The entry point's class makes the provider without any I/O, and is light to import."""
    (provider,) = LocalPlugin(Settings()).sandstorm_providers()
    assert provider.name == "local"
    code = "import sys, sandstorm_provider_local; print([m for m in ('trio', 'asyncio', 'pluggy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
