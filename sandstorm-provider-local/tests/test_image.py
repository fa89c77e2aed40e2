"""Images on this machine become root file systems, whatever their makers wrote into them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandstorm.provider import InvalidSpec
from sandstorm_provider_local._image import ImageConfig, image_identity, parse_reference, unpack_image
from sandstorm_provider_local._layers import Allowance, unpack

MIB = 1 << 20
MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
KINDS = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "sym": tarfile.SYMTYPE,
    "link": tarfile.LNKTYPE,
    "char": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
    "fifo": tarfile.FIFOTYPE,
}


def entry(name: str, kind: str = "file", data: bytes = b"", to: str = "", mode: int = 0o755) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of an archive."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.size, info.mtime = KINDS[kind], to, mode, len(data), 1_700_000_000
    return info, data


def layer(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """An archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def apply(root: Path, *layers: bytes, size: int = 10 * MIB, entries: int = 1000) -> None:
    """Unpacks layers, one after the other."""
    allowance = Allowance(size=size, entries=entries)
    for data in layers:
        unpack(io.BytesIO(data), root, allowance)


def tree(root: Path) -> dict[str, Any]:
    """Every entry below a directory: the contents of files, the targets of links, None for directories."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        name = str(path.relative_to(root))
        found[name] = str(path.readlink()) if stat.S_ISLNK(mode) else path.read_bytes() if stat.S_ISREG(mode) else None
    return found


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Layout:
    """An OCI image layout that a test writes, and may damage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.manifests: list[dict[str, Any]] = []

    def blob(self, data: bytes) -> dict[str, Any]:
        (self.path / "blobs/sha256" / digest(data)[7:]).write_bytes(data)
        return {"digest": digest(data), "size": len(data)}

    def image(self, *layers: bytes, tag: str | None = None, config: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        document = {"config": config or {}, "rootfs": {"type": "layers", "diff_ids": [digest(data) for data in layers]}}
        packed = [self.blob(gzip.compress(data, mtime=0)) for data in layers]
        manifest = {"config": self.blob(json.dumps(document).encode()), "layers": packed}
        described = self.blob(json.dumps(manifest).encode()) | {"mediaType": "application/vnd.oci.image.manifest.v1+json", **more}
        if tag is not None:
            described["annotations"] = {"org.opencontainers.image.ref.name": tag}
        self.manifests.append(described)
        (self.path / "index.json").write_text(json.dumps({"manifests": self.manifests}))
        return described

    def unpack(self, root: Path, tag: str = "") -> ImageConfig:
        return unpack_image(f"oci:{self.path}{tag}", root, Allowance(size=10 * MIB), lambda line: None)


def test_layers_are_applied_in_order_with_whiteouts(tmp_path: Path) -> None:
    """A later layer replaces files, and removes single entries and whole lower directories, but nothing of its own."""
    base = layer(
        entry("etc", "dir"),
        entry("etc/a", data=b"1"),
        entry("etc/b", data=b"1"),
        entry("opt", "dir"),
        entry("opt/old/deep", data=b"1"),
        entry("bin", "sym", to="usr/bin"),
        entry("usr/bin/sh", data=b"sh", mode=0o755),
    )
    second = layer(
        entry("etc/a", data=b"2"),
        entry("etc/.wh.b"),
        entry("opt/new", data=b"2"),
        entry("opt/.wh..wh..opq"),
        entry("bin/tool", data=b"t"),
        entry("etc/c", "link", to="etc/a"),
        entry(".wh..wh.plnk", "dir"),
    )
    apply(tmp_path, base, second)
    assert tree(tmp_path) == {
        "bin": "usr/bin",
        "etc": None,
        "etc/a": b"2",
        "etc/c": b"2",
        "opt": None,
        "opt/new": b"2",
        "usr": None,
        "usr/bin": None,
        "usr/bin/sh": b"sh",
        "usr/bin/tool": b"t",
    }
    assert (tmp_path / "usr/bin/sh").stat().st_mtime == 1_700_000_000


def test_devices_pipes_owners_and_set_user_id_are_dropped(tmp_path: Path) -> None:
    """What could give rights on the host never reaches its disk."""
    special = [entry("disk", "block"), entry("null", "char"), entry("pipe", "fifo")]
    apply(tmp_path, layer(entry("su", data=b"x", mode=0o6755), entry("d", "dir", mode=0o7777), *special))
    assert sorted(tree(tmp_path)) == ["d", "su"]
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("su", "d")] == [0o755, 0o777]
    assert (tmp_path / "su").stat().st_uid == os.geteuid()


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([entry("../evil", data=b"x")], "leads out"),
        ([entry("a/../../evil", data=b"x")], "leads out"),
        ([entry("l", "link", to="../outside")], "leads out"),
        ([entry("s", "sym", to="../outside"), entry("l", "link", to="s/secret")], "has no|no file"),
        ([entry("d", "dir"), entry("d/.wh...", data=b"")], "no name"),
        ([entry("d", "dir"), entry("d/.wh.", data=b"")], "no name"),
        ([entry("a", "sym", to="b"), entry("b", "sym", to="a"), entry("a/x", data=b"x")], "too many links"),
        ([entry("f", data=b"x"), entry("f/x", data=b"x")], "through a file"),
        ([entry("x" * 300, data=b"x")], "too long"),
    ],
)
def test_what_tries_to_get_out_is_refused(tmp_path: Path, entries: list[Any], reason: str) -> None:
    """A name, a link or a whiteout that leads out of the image ends the unpacking, and nothing beside it is touched."""
    root, outside = tmp_path / "image", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret")
    with pytest.raises(InvalidSpec, match=reason):
        apply(root, layer(*entries))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "outside"]
    assert tree(outside) == {"secret": b"secret"}


def test_links_are_resolved_inside_the_image(tmp_path: Path) -> None:
    """A file that is written through an absolute or climbing link ends up in the image, as it would if it were the root."""
    root, outside = tmp_path / "image", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    links = [entry("absolute", "sym", to=str(outside)), entry("climbing", "sym", to="../../../up")]
    apply(root, layer(*links, entry("absolute/a", data=b"1"), entry("climbing/b", data=b"2")))
    assert tree(outside) == {}
    assert (root / str(outside).lstrip("/") / "a").read_bytes() == b"1"
    assert (root / "up/b").read_bytes() == b"2"


COMPONENT = st.sampled_from(["a", "b", "c", "..", ".", "", "out", ".wh.a", ".wh..", ".wh...", ".wh..wh..opq"])
NAME = st.lists(COMPONENT, min_size=1, max_size=4).map("/".join)
ENTRY = st.tuples(NAME, st.sampled_from(sorted(KINDS)), NAME, st.booleans(), st.sampled_from([0o644, 0o6755, 0]))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(ENTRY, max_size=8), min_size=1, max_size=3))
def test_no_archive_reaches_beyond_its_root(layers: list[list[Any]]) -> None:
    """Whatever entries an archive has, nothing outside of the root is changed or linked, and no special file is made."""
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory) / "1/2/3/4"
        root, outside = top / "image", top / "out"
        root.mkdir(parents=True)
        outside.mkdir()
        (outside / "a").write_text("secret")
        (outside / "a").chmod(0o600)
        for entries in layers:
            # An absolute target leads straight to the file that must not be reached.
            made = [
                entry(name, kind, b"evil" if kind == "file" else b"", f"{outside}/{to}" if absolute else f"../{to}", mode)
                for name, kind, to, absolute, mode in entries
            ]
            try:
                apply(root, layer(*made))
            except InvalidSpec:
                break
        assert tree(Path(directory)).keys() - {f"1/2/3/4/image/{name}" for name in tree(root)} == {
            "1", "1/2", "1/2/3", "1/2/3/4", "1/2/3/4/image", "1/2/3/4/out", "1/2/3/4/out/a",
        }  # fmt: skip
        found = (outside / "a").stat()
        assert ((outside / "a").read_text(), found.st_nlink, stat.S_IMODE(found.st_mode)) == ("secret", 1, 0o600)
        for path in root.rglob("*"):
            mode = path.lstat().st_mode
            assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
            assert stat.S_ISLNK(mode) or not mode & 0o7000


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_archive_is_refused_or_unpacked_but_never_hangs(data: st.DataObject) -> None:
    """Any bytes changed in an archive lead to `InvalidSpec` or to some tree, and to no other error."""
    archive = bytearray(layer(entry("a/b", data=b"x" * 700), entry("l", "sym", to="a"), entry("p" * 120, data=b"y")))
    for _ in range(data.draw(st.integers(1, 6))):
        archive[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "1/2/3"
        root.mkdir(parents=True)
        with suppress(InvalidSpec):
            apply(root, bytes(archive))


def test_a_header_of_an_absurd_size_is_refused(tmp_path: Path) -> None:
    """An extended header that says it is gigabytes long is refused before anything of it is read."""
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, 4 << 30
    with pytest.raises(InvalidSpec, match="absurd"):
        apply(tmp_path, info.tobuf() + b"\0" * 1024, size=1 << 40)


def test_sizes_and_entries_are_bounded(tmp_path: Path) -> None:
    """A compressed bomb and a flood of entries are cut off at the limits."""
    bomb = gzip.compress(layer(entry("zeros", data=bytes(20 * MIB))))
    assert len(bomb) < MIB
    with pytest.raises(InvalidSpec, match="larger than"):
        apply(tmp_path, bomb)
    with pytest.raises(InvalidSpec, match="more files"):
        apply(tmp_path, layer(*(entry(f"f{number}") for number in range(11))), entries=10)


def test_an_image_layout_becomes_a_root(tmp_path: Path) -> None:
    """Layers, environment, working directory and user of an image layout arrive, and its tag chooses among several."""
    layout = Layout(tmp_path / "layout")
    layout.image(layer(entry("one", data=b"1")), tag="one")
    config = {"Env": ["PATH=/opt/bin:/bin", "bad name=x", "EMPTY="], "WorkingDir": "/srv", "User": "web"}
    layout.image(
        layer(entry("two", data=b"2")), layer(entry(".wh.two"), entry("three", data=b"3")), tag="repo:two", config=config
    )
    found = layout.unpack(tmp_path / "root", ":two")
    assert tree(tmp_path / "root") == {"three": b"3"}
    assert found == ImageConfig(env={"PATH": "/opt/bin:/bin", "EMPTY": ""}, workdir="/srv", user="web")
    assert layout.unpack(tmp_path / "other", ":one") == ImageConfig()
    with pytest.raises(InvalidSpec, match="2 images"):
        layout.unpack(tmp_path / "none")
    assert image_identity(f"oci:{layout.path}:one") != image_identity(f"oci:{layout.path}:two")


def test_the_manifest_for_this_machine_is_taken(tmp_path: Path) -> None:
    """Of an index for several machines the right one is used, and none is an error that says so."""
    layout = Layout(tmp_path / "layout")
    wrong = layout.image(layer(entry("wrong")), platform={"os": "linux", "architecture": "vax"})
    right = layout.image(layer(entry("right")), platform={"os": "linux", "architecture": MACHINE})
    index = layout.blob(json.dumps({"manifests": [wrong, right]}).encode())
    nested = {**index, "mediaType": "application/vnd.oci.image.index.v1+json"}
    (layout.path / "index.json").write_text(json.dumps({"manifests": [nested]}))
    layout.unpack(tmp_path / "root")
    assert sorted(tree(tmp_path / "root")) == ["right"]
    (layout.path / "index.json").write_text(json.dumps({"manifests": [wrong]}))
    with pytest.raises(InvalidSpec, match=f"nothing for linux/{MACHINE}"):
        layout.unpack(tmp_path / "none")


def damage_layer(layout: Layout, image: dict[str, Any], manifest: Path) -> None:
    """Another archive under the digest of the layer."""
    name = json.loads(manifest.read_text())["layers"][0]["digest"][7:]
    (layout.path / "blobs/sha256" / name).write_bytes(gzip.compress(layer(entry("evil"))))


def pack_again(layout: Layout, image: dict[str, Any], manifest: Path) -> None:
    """The same archive in other bytes, as many as before."""
    path = layout.path / "blobs/sha256" / json.loads(manifest.read_text())["layers"][0]["digest"][7:]
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), mtime=1))


def damage_manifest(layout: Layout, image: dict[str, Any], manifest: Path) -> None:
    manifest.write_text(manifest.read_text() + " ")


def lie_about_size(layout: Layout, image: dict[str, Any], manifest: Path) -> None:
    document = json.loads(manifest.read_text())
    document["layers"][0]["size"] += 1
    image |= layout.blob(json.dumps(document).encode())
    (layout.path / "index.json").write_text(json.dumps({"manifests": [image]}))


def climb_by_digest(layout: Layout, image: dict[str, Any], manifest: Path) -> None:
    (layout.path / "index.json").write_text(json.dumps({"manifests": [{"digest": "sha256:../../../../etc/passwd"}]}))


def lose_layer(layout: Layout, image: dict[str, Any], manifest: Path) -> None:
    (layout.path / "blobs/sha256" / json.loads(manifest.read_text())["layers"][0]["digest"][7:]).unlink()


def misshape(layout: Layout, image: dict[str, Any], manifest: Path) -> None:
    (layout.path / "index.json").write_text('{"manifests": [7]}')


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (damage_layer, "a layer of the image is damaged"),
        (pack_again, "a layer is sha256:.* and not sha256:"),
        (damage_manifest, "is not what its digest says"),
        (lie_about_size, "bytes, and not"),
        (climb_by_digest, "no sha256 digest"),
        (lose_layer, "lacks"),
        (misshape, "AttributeError"),
    ],
)
def test_a_damaged_layout_is_refused(tmp_path: Path, harm: Any, reason: str) -> None:
    """Whatever is not what its digest or size says, is missing or has another shape is `InvalidSpec`."""
    layout = Layout(tmp_path / "layout")
    image = layout.image(layer(entry("good", data=b"1")))
    harm(layout, image, layout.path / "blobs/sha256" / image["digest"][7:])
    with pytest.raises(InvalidSpec, match=reason):
        layout.unpack(tmp_path / "root")


def docker_archive(path: Path, data: bytes, stated: bytes) -> None:
    """What `docker save` writes, with a layer whose contents the configuration states as `stated`."""
    config = json.dumps({"config": {"Env": ["A=1"]}, "rootfs": {"diff_ids": [digest(stated)]}}).encode()
    name = f"{digest(config)[7:]}.json"
    manifest = json.dumps([{"Config": name, "RepoTags": ["localhost/app:1"], "Layers": ["l/layer.tar"]}]).encode()
    path.write_bytes(layer(entry("l/layer.tar", data=data), entry(name, data=config), entry("manifest.json", data=manifest)))


def test_a_saved_image_and_a_plain_root_become_roots(tmp_path: Path) -> None:
    """An archive of `docker save`, one of an image layout and one of files are told apart by what is in them."""
    contents = layer(entry("./bin/app", data=b"x"))
    docker_archive(tmp_path / "docker.tar", contents, contents)
    layout = Layout(tmp_path / "layout")
    layout.image(contents)
    with tarfile.open(tmp_path / "oci.tar", "w") as archive:
        archive.add(layout.path, arcname=".")
    (tmp_path / "files.tar.gz").write_bytes(gzip.compress(contents))
    for name in ("docker.tar", "oci.tar", "files.tar.gz"):
        root = tmp_path / f"{name}.root"
        config = unpack_image(str(tmp_path / name), root, Allowance(size=10 * MIB), lambda line: None)
        assert tree(root) == {"bin": None, "bin/app": b"x"}
        assert config.env == ({"A": "1"} if name == "docker.tar" else {})


def test_a_damaged_saved_image_is_refused(tmp_path: Path) -> None:
    """A layer that is not what the configuration says is refused, and so are other compressions, with the remedy."""
    docker_archive(tmp_path / "docker.tar", layer(entry("evil")), layer(entry("good")))
    (tmp_path / "zstd.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    (tmp_path / "none.tar").write_bytes(b"no archive")
    for name, reason in (
        ("docker.tar", "damaged"),
        ("zstd.tar", "skopeo"),
        ("none.tar", "cannot be read"),
        ("missing.tar", "No such"),
    ):
        with pytest.raises(InvalidSpec, match=reason):
            unpack_image(str(tmp_path / name), tmp_path / f"{name}.root", Allowance(size=MIB), lambda line: None)


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "files.tar"
    path.write_bytes(layer(entry("a")))
    yield path


def test_an_archive_that_changes_is_another_image(archive: Path) -> None:
    """The identity of an archive changes with its contents, even where size and modification time are put back."""
    before, times = image_identity(str(archive)), archive.stat()
    assert image_identity(str(archive)) == before
    archive.write_bytes(layer(entry("b")))
    os.utime(archive, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert image_identity(str(archive)) != before


def test_only_paths_are_local_images() -> None:
    """Names of a registry are none, and the error for them says what to do instead."""
    assert parse_reference("python:3.12") is None
    assert parse_reference("localhost/app.tar") is None
    local = [parse_reference(image) for image in ("oci:/a:t", "/a.tar", "docker-archive:/a.tar.gz:t")]
    assert [(found.kind, str(found.path), found.tag) for found in local if found] == [
        ("layout", "/a", "t"),
        ("archive", "/a.tar", None),
        ("archive", "/a.tar.gz", "t"),
    ]
    with pytest.raises(InvalidSpec, match="skopeo copy"):
        image_identity("python:3.12")
