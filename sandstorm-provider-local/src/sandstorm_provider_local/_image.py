"""Images that lie on this machine, as a directory with a root file system.

A reference names a path: `oci:/path/to/layout[:tag]` is an OCI image layout (`skopeo copy docker://… oci:/path:tag`), and
`/path/to/image.tar[.gz]` is what `podman save` and `docker save` write, or a plain root file system. Every digest and size that an
image states is verified. The formats are those of the OCI image specification 1.1 and of `docker save`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import attrs

from sandstorm.provider import InvalidSpec
from sandstorm_provider_local._layers import Allowance, Bounded, Reader, decompressed, unpack

_DOCUMENT = 8 * 1024 * 1024
"""Bytes of the largest index, manifest or configuration."""
_DEPTH = 4
_TAG = "org.opencontainers.image.ref.name"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "armv7l": "arm"}
_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
REMEDY = (
    "images are not pulled here: copy it with `skopeo copy docker://IMAGE oci:/path:tag` and name `oci:/path:tag`, save it with "
    "`podman save -o /path/image.tar IMAGE` and name that path, or use a provider with images"
)


@attrs.frozen(kw_only=True)
class Reference:
    """Where an image lies: `layout` or `archive`, the path, and the tag if one was named."""

    kind: str
    path: Path
    tag: str | None = None


@attrs.frozen(kw_only=True)
class ImageConfig:
    """What an image says of itself: environment variables, working directory and user. All of it is data, and only `env` is applied."""

    env: Mapping[str, str] = attrs.field(factory=dict)
    workdir: str | None = None
    user: str | None = None


def parse_reference(image: str) -> Reference | None:
    """What a local reference means; None where it names an image in a registry. No I/O."""
    if image.startswith("oci:/"):
        path, _, tag = image[4:].partition(":")
        return Reference(kind="layout", path=Path(path), tag=tag or None)
    for prefix in ("docker-archive:", "oci-archive:", ""):
        rest = image.removeprefix(prefix)
        path, _, tag = rest.partition(":")
        if image.startswith(prefix) and path.startswith("/") and path.endswith(_ARCHIVES):
            return Reference(kind="archive", path=Path(path), tag=tag or None)
    return None


def image_identity(image: str) -> str:
    """What tells this image from every other. Raises `InvalidSpec` where there is none.

    A layout is known by the digest of its manifest. An archive is known by its path, size and times, since hashing gigabytes before
    every run would take longer than the run.
    """
    reference = _reference(image)
    if reference.kind == "archive":
        try:
            found = reference.path.stat()
        except OSError as exc:
            raise InvalidSpec(f"image {image}: {exc.strerror}") from exc
        times = f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"
        return f"{reference.path.resolve()}:{times}:{reference.tag or ''}"
    with _opened(reference, Allowance(size=0)) as source:
        return str(_descriptor(source, reference.tag)["digest"])


def unpack_image(image: str, root: Path, allowance: Allowance, told: Callable[[str], None]) -> ImageConfig:
    """Makes the directory `root` and fills it. Raises `InvalidSpec` where the image is damaged, too large or for another machine."""
    reference = _reference(image)
    root.mkdir()
    root.chmod(0o755)
    with _opened(reference, allowance) as source:
        if source.has("oci-layout"):
            return _unpack_oci(source, reference.tag, root, allowance, told)
        if source.has("manifest.json"):
            return _unpack_docker(source, reference.tag, root, allowance, told)
    if reference.kind == "layout":
        raise InvalidSpec(f"{reference.path} is no image layout")
    told("unpacking a root file system")
    with _reading(reference.path) as archive:
        unpack(archive, root, allowance)
    return ImageConfig()


def _reference(image: str) -> Reference:
    reference = parse_reference(image)
    if reference is None:
        raise InvalidSpec(f"image {image}: {REMEDY}")
    return reference


# --- where its parts lie --------------------------------------------------------------------------------------


class _Source(Protocol):
    """The files of an image, by their names in its layout or archive."""

    def has(self, name: str) -> bool: ...

    def open(self, name: str) -> BinaryIO: ...


@attrs.frozen
class _Directory:
    path: Path

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def open(self, name: str) -> BinaryIO:
        try:
            return _reading(self.path / name)
        except OSError as exc:
            raise InvalidSpec(f"the image layout {self.path} lacks {name}: {exc.strerror}") from exc


class _Archive:
    def __init__(self, archive: tarfile.TarFile, allowance: Allowance) -> None:
        self._archive = archive
        self._members: dict[str, tarfile.TarInfo] = {}
        last = -1
        for member in archive:
            allowance.checkpoint()
            if member.offset <= last or len(self._members) > allowance.entries:
                raise InvalidSpec("the archive points backwards, or has more files than an image may have here")
            last = member.offset
            self._members[member.name.removeprefix("./")] = member

    def has(self, name: str) -> bool:
        return name in self._members

    def open(self, name: str) -> BinaryIO:
        member = self._members.get(name)
        file = self._archive.extractfile(member) if member is not None else None
        if file is None:
            raise InvalidSpec(f"the image archive lacks {name}")
        return cast(BinaryIO, file)


def _reading(path: Path) -> BinaryIO:
    # A pipe in its place would block without O_NONBLOCK.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return os.fdopen(fd, "rb")


@contextmanager
def _opened(reference: Reference, allowance: Allowance) -> Iterator[_Source]:
    if reference.kind == "layout":
        yield _Directory(reference.path)
        return
    try:
        with _reading(reference.path) as raw:
            bounded = cast(BinaryIO, Bounded(decompressed(raw), allowance.size))
            with tarfile.open(fileobj=bounded, mode="r:") as archive:
                yield _Archive(archive, allowance)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as exc:
        raise InvalidSpec(f"the archive {reference.path} cannot be read: {exc}") from exc


def _document(source: _Source, name: str, digest: str | None = None) -> dict[str, Any] | list[Any]:
    with source.open(name) as file:
        data = file.read(_DOCUMENT)
    if digest is not None and f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise InvalidSpec(f"the image is damaged: {name} is not what its digest says")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise InvalidSpec(f"the image is damaged: {name} is no JSON") from exc
    if not isinstance(found, (dict, list)):
        raise InvalidSpec(f"the image is damaged: {name} is no table")
    return found


@contextmanager
def _understood() -> Iterator[None]:
    """Where a document of an image has another shape than its format says."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as exc:
        raise InvalidSpec(f"the image is damaged: {type(exc).__name__}: {exc}") from exc


# --- an OCI image layout --------------------------------------------------------------------------------------


def _blob(digest: Any) -> str:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise InvalidSpec(f"the image names a part by {digest!r}, which is no sha256 digest")
    return f"blobs/sha256/{digest[7:]}"


def _descriptor(source: _Source, tag: str | None) -> dict[str, Any]:
    """The descriptor of the manifest that is meant: with this tag, for this machine."""
    index: Any = _document(source, "index.json")
    with _understood():
        entries = list(index["manifests"])
        tags = [entry.get("annotations", {}).get(_TAG) for entry in entries]
        if tag is not None:
            entries = [
                entry
                for entry, its in zip(entries, tags, strict=True)
                if its is not None and tag in (its, its.rpartition(":")[2])
            ]
        if len(entries) != 1 and not (tag is None and entries and all("platform" in entry for entry in entries)):
            raise InvalidSpec(f"the image layout has {len(entries)} images {f'tagged {tag}' if tag else ''}; its tags: {tags}")
        for _ in range(_DEPTH):
            entry = _for_this_machine(entries)
            if not str(entry.get("mediaType", "")).endswith(("index.v1+json", "manifest.list.v2+json")):
                return entry
            nested: Any = _document(source, _blob(entry["digest"]), entry["digest"])
            entries = list(nested["manifests"])
    raise InvalidSpec("the image's indexes are nested too deeply")


def _for_this_machine(entries: list[dict[str, Any]]) -> dict[str, Any]:
    machine = _MACHINES.get(platform.machine(), platform.machine())
    for entry in entries:
        place = entry.get("platform") or {"os": "linux", "architecture": machine}
        if place.get("os") == "linux" and place.get("architecture") == machine:
            return entry
    raise InvalidSpec(f"the image has nothing for linux/{machine}")


def _unpack_oci(source: _Source, tag: str | None, root: Path, allowance: Allowance, told: Callable[[str], None]) -> ImageConfig:
    digest = _descriptor(source, tag)["digest"]
    manifest: Any = _document(source, _blob(digest), digest)
    with _understood():
        config_digest, layers = manifest["config"]["digest"], list(manifest["layers"])
        stated = [(_blob(layer["digest"]), str(layer["digest"]), int(layer["size"])) for layer in layers]
    config: Any = _document(source, _blob(config_digest), config_digest)
    diff_ids = _diff_ids(config, len(layers))
    for number, ((name, expected, size), diff_id) in enumerate(zip(stated, diff_ids, strict=True), 1):
        told(f"unpacking layer {number} of {len(layers)}")
        with source.open(name) as file:
            raw = Reader(file)
            unpack(cast(BinaryIO, raw), root, allowance, diff_id)
            found = raw.digest()
        if found != expected or raw.tell() != size:
            raise InvalidSpec(f"the image is damaged: a layer is {found} with {raw.tell()} bytes, and not {expected} with {size}")
    return _config(config)


# --- what `docker save` writes --------------------------------------------------------------------------------


def _unpack_docker(
    source: _Source, tag: str | None, root: Path, allowance: Allowance, told: Callable[[str], None]
) -> ImageConfig:
    images: Any = _document(source, "manifest.json")
    with _understood():
        chosen = [
            image
            for image in images
            if tag is None or any(tag in (its, its.rpartition(":")[2]) for its in image["RepoTags"] or ())
        ]
        if len(chosen) != 1:
            raise InvalidSpec(f"the archive has {len(chosen)} images {f'tagged {tag}' if tag else ''}; name one of its tags")
        name, layers = str(chosen[0]["Config"]), [str(layer) for layer in chosen[0]["Layers"]]
    stated = re.search(r"[0-9a-f]{64}", name)
    config: Any = _document(source, name, f"sha256:{stated[0]}" if stated else None)
    for number, (layer, diff_id) in enumerate(zip(layers, _diff_ids(config, len(layers)), strict=True), 1):
        told(f"unpacking layer {number} of {len(layers)}")
        with source.open(layer) as file:
            unpack(file, root, allowance, diff_id)
    return _config(config)


def _diff_ids(config: Any, layers: int) -> list[str]:
    """The digest of every layer's contents, as the configuration states it."""
    with _understood():
        found = [str(digest) for digest in config["rootfs"]["diff_ids"]]
    if len(found) != layers:
        raise InvalidSpec(f"the image is damaged: {layers} layers, and {len(found)} digests of their contents")
    return found


def _config(document: Any) -> ImageConfig:
    with _understood():
        stated = document.get("config") or {}
        pairs = [str(item).partition("=") for item in stated.get("Env") or ()]
        env = {name: value for name, _, value in pairs if _NAME.fullmatch(name) and "\0" not in value}
        return ImageConfig(env=env, workdir=stated.get("WorkingDir") or None, user=stated.get("User") or None)
