"""Where packages come from: the host's own configuration of its package indexes, for an installer in a sandbox.

Uv reads neither pip's variables nor its files, and npm's files of this user are not shown to a sandbox. So what they say is
read here and handed over as environment variables, credentials included; it is never written to a file and never shown.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import attrs

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_UV_INDEXES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")
_UV_OTHERS = (
    "UV_NO_INDEX",
    "UV_INDEX_STRATEGY",
    "UV_INSECURE_HOST",
    "UV_HTTP_TIMEOUT",
    "UV_HTTP_RETRIES",
    "UV_EXCLUDE_NEWER",
    "UV_OFFLINE",
    "UV_PRERELEASE",
    "UV_RESOLUTION",
)
_UV_CREDENTIALS = re.compile(r"UV_INDEX_\w+_(USERNAME|PASSWORD)$")
_PIP_TO_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "timeout": "UV_HTTP_TIMEOUT",
}
_NPM_KEYS = ("registry", "strict-ssl", "proxy", "https-proxy", "noproxy", "fetch-retries", "fetch-timeout")
_SECRET_KEY = re.compile(r"(_authToken|_auth|_password|:username|_USERNAME|_PASSWORD)$")
_USER_OF_URL = re.compile(r"://[^/\s@]+@")
_CA_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
_CA_PLACES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem")
CA_INSIDE = "/etc/ssl/certs/ca-certificates.crt"
"""Where an installer's sandbox has the certificates of the authorities that the host trusts."""


@attrs.frozen(kw_only=True)
class Registry:
    """How an installer reaches its package indexes.

    Attributes:
        env: Environment variables, credentials included.
        places: Host files and directories that the configuration names; a sandbox needs them at the same path.
    """

    env: Mapping[str, str] = attrs.field(repr=False)
    places: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Tells one set of indexes from another, whatever the credentials."""
        public = {name: _USER_OF_URL.sub("://", value) for name, value in self.env.items() if not _SECRET_KEY.search(name)}
        indexes = {name: value for name, value in public.items() if not _is_transport(name)}
        return hashlib.sha256(json.dumps(indexes, sort_keys=True).encode()).hexdigest()

    def masked(self, text: str) -> str:
        """The text without any credential of these indexes, and without those of other addresses."""
        for secret in self._secrets():
            text = text.replace(secret, "***")
        return _USER_OF_URL.sub("://***@", text)

    def _secrets(self) -> list[str]:
        found = [value for name, value in self.env.items() if _SECRET_KEY.search(name)]
        for value in self.env.values():
            for address in value.split():
                with suppress(ValueError):
                    found += [part for part in (urlsplit(address).password,) if part]
        return sorted((secret for secret in found if len(secret) >= 4), key=len, reverse=True)


def python_registry(environ: Mapping[str, str], home: Path) -> Registry:
    """What uv needs: the `UV_*` variables, else what pip's variables and `pip.conf` say."""
    env = {name: environ[name] for name in (*_UV_INDEXES, *_UV_OTHERS) if environ.get(name)}
    env |= {name: value for name, value in environ.items() if _UV_CREDENTIALS.match(name)}
    if not any(name in env for name in (*_UV_INDEXES, "UV_NO_INDEX")):
        pip = _pip_settings(environ, home)
        env = {_PIP_TO_UV[key]: " ".join(value.split()) for key, value in pip.items()} | env
        if "extra-index-url" in pip:
            # Pip takes the best version of all indexes; uv by default only looks into the first that has the package.
            env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    if "UV_FIND_LINKS" in env:
        env["UV_FIND_LINKS"] = ",".join(re.split(r"[\s,]+", env["UV_FIND_LINKS"].strip()))
    places = [place for name in _UV_INDEXES if name in env for place in _places(env[name])]
    return Registry(env={**env, **_transport(environ)}, places=tuple(dict.fromkeys(places)))


def _pip_settings(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """The settings of pip that uv understands; a variable outranks the files, a later file an earlier one."""
    own = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = [Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"), home / ".pip/pip.conf", own / "pip/pip.conf"]
    named = environ.get("PIP_CONFIG_FILE")
    if named:
        files = [] if named == os.devnull else [*files, Path(named)]
    settings: dict[str, str] = {}
    for file in files:
        parser = configparser.RawConfigParser()
        with suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read_string(file.read_text(encoding="utf-8"))
        for section in ("global", "install"):
            if parser.has_section(section):
                settings |= {key.replace("_", "-"): value for key, value in parser.items(section)}
    settings |= {name[4:].lower().replace("_", "-"): value for name, value in environ.items() if name.startswith("PIP_")}
    return {key: value for key, value in settings.items() if key in _PIP_TO_UV and value}


def _places(value: str) -> Iterator[str]:
    for item in re.split(r"[\s,]+", value):
        address = item.partition("=")[2] if re.match(r"[\w.-]+=", item) else item
        path = Path(unquote(urlsplit(address).path)) if address.startswith("file:") else Path(address)
        if "://" in str(address) and not address.startswith("file:"):
            continue
        # The files of an index lie beside its directory of pages.
        place = path.absolute().parent if path.name == "simple" else path.absolute()
        if address and place.exists() and not place.is_relative_to("/usr") and place != Path("/"):
            yield str(place)


def npm_registry(environ: Mapping[str, str], home: Path) -> Registry:
    """What npm needs: registries, their scopes and credentials, from `.npmrc` and `npm_config_*`.

    Npm's global file below `/usr` is read by npm itself, since a sandbox shows `/usr`.
    """
    lowered = {name.lower(): value for name, value in environ.items() if name.lower().startswith("npm_config_")}
    file = Path(lowered.get("npm_config_userconfig") or home / ".npmrc")
    settings = dict(_npmrc(file, environ))
    for name, value in environ.items():
        if name.lower().startswith("npm_config_"):
            key = name[len("npm_config_") :]
            settings[key if key.startswith(("//", "@")) else key.lower().replace("_", "-")] = value
    kept = {
        key: value for key, value in settings.items() if key in _NPM_KEYS or key.startswith("//") or key.endswith(":registry")
    }
    return Registry(env={f"npm_config_{key}": value for key, value in kept.items()} | _transport(environ))


def _npmrc(file: Path, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    text = ""
    with suppress(OSError, UnicodeDecodeError):
        text = file.read_text(encoding="utf-8")
    for line in text.splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and key and not key.startswith(("#", ";", "[")):
            expanded = re.sub(r"\$\{([^}]+)\}", lambda found: environ.get(found[1], found[0]), value.strip())
            yield key.strip(), expanded.strip("\"'")


def _transport(environ: Mapping[str, str]) -> dict[str, str]:
    proxies = {name: value for name, value in environ.items() if name.lower() in _PROXIES}
    return {**proxies, "SSL_CERT_FILE": CA_INSIDE, "NODE_EXTRA_CA_CERTS": CA_INSIDE, "npm_config_cafile": CA_INSIDE}


def _is_transport(name: str) -> bool:
    return name.lower() in (
        *_PROXIES,
        "ssl_cert_file",
        "node_extra_ca_certs",
        "npm_config_cafile",
        "uv_http_timeout",
        "uv_http_retries",
    )


def certificates(environ: Mapping[str, str]) -> Path | None:
    """The file with the authorities that the host trusts: the one that is set, else the system's."""
    named: Iterable[str] = (environ[name] for name in _CA_VARIABLES if environ.get(name))
    return next((Path(place) for place in (*named, *_CA_PLACES) if Path(place).is_file()), None)
