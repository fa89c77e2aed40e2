"""`sandstorm doctor`: what is wrong with this installation, and what to do about it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from sandstorm_cli._commands import added_commands
from sandstorm_cli._failure import message
from sandstorm_cli._flags import json_option, settings_option
from sandstorm_cli._import_name import CORE, IMPORT_NAME, core_version, foreign_owners, is_ours
from sandstorm_cli._terminal import emit_json, emit_pairs, waiting

if TYPE_CHECKING:
    from sandstorm import SettingsError

OLDEST = (3, 11)
_SQLITE = "sqlite:///"
_OF_SANDBOXES = ("Interactive", "Reconnect", "Detach", "Files", "Ports", "Pause", "Snapshot", "Fork", "Extend", "Interpreter")
"""The abilities that the commands of `sandstorm sandbox` and detached runs rest on."""


@attrs.frozen(kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        state: `ok`, `warn` or `fail`.
        detail: What was found.
        remedy: What to do about it; empty where nothing is to be done.
    """

    name: str
    state: str = "ok"
    detail: str
    remedy: str = ""


@click.command()
@settings_option
@json_option
def doctor(settings: str | None, as_json: bool) -> int:
    """Check this installation: Python, plugins, settings, store and providers. Exits with 1 if something fails."""
    with waiting("checking…"):
        checks = [_python(), _core(), *_owner(), *_command_checks()]
        if is_ours():
            checks += _client_checks(settings)
    if as_json:
        emit_json({"ok": not _failed(checks), "checks": [attrs.asdict(check) for check in checks]})
    else:
        emit_pairs([(f"{check.state:<4}  {check.name}", _line(check)) for check in checks])
    return 1 if _failed(checks) else 0


def _failed(checks: list[Check]) -> bool:
    return any(check.state == "fail" for check in checks)


def _line(check: Check) -> str:
    return f"{check.detail}; remedy: {check.remedy}" if check.remedy else check.detail


def _python() -> Check:
    found = f"Python {platform.python_version()} on {platform.system()}"
    if sys.version_info < OLDEST:
        return Check(name="python", state="fail", detail=found, remedy="use Python 3.11 or later")
    if sys.implementation.name != "cpython" or not sys.platform.startswith("linux"):
        return Check(name="python", state="warn", detail=found, remedy="use CPython on Linux for the local provider")
    return Check(name="python", detail=found)


def _core() -> Check:
    found = core_version()
    if found is None:
        return Check(name="core", state="fail", detail=f"{CORE} is not installed", remedy=f"pip install {CORE}")
    return Check(name="core", detail=f"{CORE} {found}")


def _owner() -> Iterator[Check]:
    foreign = foreign_owners()
    if foreign:
        names = " ".join(owner.split()[0] for owner in foreign)
        yield Check(
            name="import name",
            state="fail",
            detail=f"{', '.join(foreign)} also owns the import name {IMPORT_NAME!r}",
            remedy=f"pip uninstall {names}, then pip install --force-reinstall --no-deps {CORE}",
        )
    elif not is_ours():
        yield Check(
            name="import name",
            state="fail",
            detail=f"importing {IMPORT_NAME!r} does not give {CORE}",
            remedy=f"look for a file or folder named {IMPORT_NAME} in the current directory and in PYTHONPATH",
        )
    else:
        yield Check(name="import name", detail=f"{IMPORT_NAME!r} belongs to {CORE}")


def _client_checks(settings: str | None) -> Iterator[Check]:
    from sandstorm import Sandstorm, SettingsError

    client = Sandstorm(settings=settings)
    try:
        setup = client.setup()
    except SettingsError as exc:
        yield _settings_failed(exc)
        return
    try:
        with client:
            yield Check(name="settings", detail=f"{setup.settings} is valid" if setup.settings else "no file; the defaults apply")
            yield _store_check(setup.store)
            yield from _plugin_checks(client.plugins())
            yield from _provider_checks(client.providers())
            yield _kept_check(client.sandboxes())
    except SettingsError as exc:
        yield _settings_failed(exc)
    except Exception as exc:
        yield _start_failed(exc, setup.store)


def _store_check(url: str) -> Check:
    path = Path(url.removeprefix(_SQLITE))
    if url.startswith(_SQLITE) and path.exists() and not os.access(path, os.W_OK):
        return Check(name="store", state="fail", detail=f"{url} cannot be written", remedy="correct its permissions")
    return Check(name="store", detail=f"{url} opens and can be written")


def _settings_failed(exc: SettingsError) -> Check:
    return Check(name="settings", state="fail", detail=message(exc), remedy=f"correct {exc.field}")


def _start_failed(exc: Exception, store: str) -> Check:
    if getattr(exc, "field", "") == "store":
        return Check(name="store", state="fail", detail=f"{store}: {message(exc)}", remedy="correct `store` in the settings")
    remedy = "see the reason; SANDSTORM_TRACEBACK=1 sandstorm providers shows where"
    return Check(name="start", state="fail", detail=message(exc), remedy=remedy)


def _plugin_checks(report: Any) -> Iterator[Check]:
    yield Check(name="plugins", detail="loaded: " + ", ".join(plugin.name for plugin in report.loaded))
    for plugin in report.set_aside:
        detail = f"set aside: {plugin.reason}"
        remedy = f"update or uninstall {plugin.distribution or plugin.name}"
        yield Check(name=f"plugin {plugin.name}", state="warn", detail=detail, remedy=remedy)


def _command_checks() -> Iterator[Check]:
    for command in added_commands():
        if command["reason"]:
            remedy = f"update or uninstall {command['distribution']}"
            yield Check(name=f"command {command['name']}", state="warn", detail=command["reason"], remedy=remedy)


def _provider_checks(found: Any) -> Iterator[Check]:
    if not found:
        yield Check(name="providers", state="fail", detail="none is installed", remedy="pip install sandstorm-provider-local")
    for status in found:
        spare = status.traits.by_invitation and any(each.ok for each in found)
        yield _provider_check(status, spare=spare)
        yield from _ability_checks(status)


def _provider_check(status: Any, *, spare: bool) -> Check:
    """`spare`: it takes part by invitation only, and another one works."""
    from sandstorm.provider import Offer
    from sandstorm_cli._show import SHARED_KERNEL, isolation

    name = f"provider {status.name}"
    if not status.ok:
        remedy = "correct it, or disable its plugin in the settings"
        return Check(name=name, state="warn" if spare else "fail", detail=status.detail, remedy=remedy)
    offer = next((each for each in status.offers if isinstance(each, Offer)), None)
    if offer is None:
        reasons = "; ".join(each.reason for each in status.offers)
        return Check(name=name, state="warn", detail=f"works, and offers nothing: {reasons}", remedy="see its README")
    shown = isolation(offer.isolation, offer.isolation_detail)
    if SHARED_KERNEL in shown:
        remedy = "for hostile code ask for --isolation gvisor or microvm"
        return Check(name=name, state="warn", detail=f"works; isolation {shown}", remedy=remedy)
    return Check(name=name, detail=f"works; isolation {shown}")


def _ability_checks(status: Any) -> Iterator[Check]:
    """What sandboxes that stay cannot do there, with the provider's reasons."""
    from sandstorm.provider import Offer

    offer = next((each for each in status.offers if isinstance(each, Offer)), None)
    missing = [] if offer is None else [name for name in _OF_SANDBOXES if not offer.can(name)]
    if offer is not None and missing:
        detail = "; ".join(f"no {name}: {offer.reason(name)}" for name in missing)
        yield Check(name=f"sandboxes of {status.name}", detail=detail)


def _kept_check(kept: Any) -> Check:
    silent = sorted({each.provider for each in kept if each.state == "unknown"})
    if silent:
        detail = f"{len(kept)} are kept, and what became of those at {', '.join(silent)} cannot be told"
        return Check(name="sandboxes", state="warn", detail=detail, remedy="see what is said of that provider")
    return Check(name="sandboxes", detail=f"{len(kept)} are kept" if kept else "none is kept")
