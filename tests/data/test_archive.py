"""Archives over http: verified, resumed after interruptions, and unpacked without trusting them."""

import hashlib
import io
import os
import tarfile
import zipfile
import zlib

import pytest
from PIL import Image

from regvit.data.sources import archive as archives
from regvit.data.sources.archive import UnsafeArchive, unpack


def picture(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def tar_of(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("pack", [tar_of, lambda m: tar_of(m, "w"), lambda m: tar_of(m, "w:xz"), zip_of])
def test_archives_of_all_kinds_unpack_to_their_files(tmp_path, pack):
    members = {"cat/1.png": picture(1), "dog/ü 2.png": picture(2), "./dog/3.png": b""}
    (tmp_path / "a").write_bytes(pack(members))
    unpack(tmp_path / "a", tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*.png")}
    expected = {name.removeprefix("./"): content for name, content in members.items()}
    assert {name: path.read_bytes() for name, path in found.items()} == expected


def link(name: str, target: str, kind: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        archive.addfile(info)
    return file.getvalue()


def zip_link() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        info = zipfile.ZipInfo("x.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tar_of({"ok.png": b"1", "../out.png": b"2"}), r"holds '\.\./out\.png', a name that leaves the folder"),
        (tar_of({"a/../../out.png": b"2"}), "a name that leaves the folder"),
        (tar_of({"/out.png": b"2"}), "holds '/out.png', a name that leaves the folder"),
        (zip_of({"../out.png": b"2"}), "a name that leaves the folder"),
        (zip_of({"C:/out.png": b"2"}), "a name that leaves the folder"),
        (link("x.png", "/etc/passwd", tarfile.SYMTYPE), "holds 'x.png', a link; only files and folders"),
        (link("x.png", "y.png", tarfile.LNKTYPE), "a link"),
        (link("x.png", "", tarfile.FIFOTYPE), "a device"),
        (link("../x", "", tarfile.DIRTYPE), "a name that leaves the folder"),
        (zip_link(), "a link"),
    ],
    ids=["tar beside", "tar up", "tar root", "zip beside", "zip drive", "soft", "hard", "pipe", "dir", "zip soft"],
)
def test_an_archive_with_a_hostile_member_is_refused_and_nothing_of_it_is_kept(tmp_path, content, said):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.bin").write_bytes(content)
    with pytest.raises(UnsafeArchive, match=said):
        unpack(tmp_path / "in/a.bin", tmp_path / "in/deep/out")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in left if not name.endswith(".lock")} == {"in/a.bin"}


def test_files_of_an_archive_cannot_be_run_or_changed_by_others(tmp_path):
    info = tarfile.TarInfo("x/a.png")
    info.mode = 0o6777
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        packed.addfile(info)
    unpack(tmp_path / "a.tar", tmp_path / "out")
    assert (tmp_path / "out/x/a.png").stat().st_mode & 0o6111 == 0


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_an_archive_that_grows_beyond_bounds_is_refused_before_it_fills_the_disk(tmp_path, pack, monkeypatch):
    monkeypatch.setattr(archives, "GROWTH", 1)
    monkeypatch.setattr(archives, "FLOOR", 2_500_000)
    (tmp_path / "a.bin").write_bytes(pack({f"{i}.png": bytes(1 << 20) for i in range(4)}))
    with pytest.raises(UnsafeArchive, match="unpacks to more than 2500000 bytes"):
        unpack(tmp_path / "a.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(archives, "FLOOR", 5_000_000)
    unpack(tmp_path / "a.bin", tmp_path / "out")


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(link("x", "", tarfile.REGTYPE)[:512] + link("./x", "", tarfile.REGTYPE))
    with pytest.raises(UnsafeArchive, match="'x' twice"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


def gz_that_breaks(members: dict[str, bytes]) -> bytes:
    """A .tar.gz whose second half is no deflate stream."""
    content, packer = tar_of(members, "w"), zlib.compressobj(wbits=31)
    return packer.compress(content[: len(content) // 2]) + packer.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 4000


def damaged(content: bytes, at: int | None = None, count: int = 40) -> bytes:
    """Some bytes are others than they were, in the middle if not said where."""
    at = len(content) // 2 if at is None else at % len(content)
    return content[:at] + bytes(byte ^ 0x55 for byte in content[at : at + count]) + content[at + count :]


def small_size(members: dict[str, bytes]) -> bytes:
    """A .zip whose first member holds more than it declares."""
    content = bytearray(zip_of(members, zipfile.ZIP_STORED))
    for signature, place in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):  # the size when unpacked
        start = content.index(signature) + place
        content[start : start + 4] = (10).to_bytes(4, "little")
    return bytes(content)


DAMAGED = {
    "tar.gz": gz_that_breaks,
    "tar.bz2": lambda members: damaged(tar_of(members, "w:bz2")),
    "tar.xz": lambda members: damaged(tar_of(members, "w:xz")),
    "deflate": lambda members: damaged(zip_of(members)),
    "lzma": lambda members: damaged(zip_of(members, zipfile.ZIP_LZMA)),
    "bzip2": lambda members: damaged(zip_of(members, zipfile.ZIP_BZIP2)),
    "cut tar": lambda members: tar_of(members, "w")[:15_000],
    "cut tar.gz": lambda members: tar_of(members)[:15_000],
    "sum of the gzip": lambda members: damaged(tar_of(members), -8, 1),
    "first block of a tar.bz2": lambda _: damaged(tar_of({"0.png": b""}, "w:bz2")),
    "first block of a tar.xz": lambda _: damaged(tar_of({"0.png": b""}, "w:xz")),
    "first header": lambda members: damaged(tar_of(members, "w"), 100, 1),
    "half a zip": lambda members: zip_of(members)[:60],
    "third header": lambda members: damaged(tar_of({name: bytes(512) for name in members}, "w"), 2 * 1024 + 100, 1),
    "size of a member": small_size,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_archive_of_any_compression_is_reported_as_broken(tmp_path, kind):
    """Also where a header in the middle cannot be read, which tarfile takes for the end."""
    (tmp_path / "a.bin").write_bytes(DAMAGED[kind]({f"{i}.png": os.urandom(200_000).hex().encode() for i in range(6)}))
    with pytest.raises(ValueError, match=r"a\.bin is broken \(\w+: .*\); pack it anew"):
        unpack(tmp_path / "a.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>log in to download</html>")
    with pytest.raises(ValueError, match=r"a\.tar is neither a \.tar .* nor a \.zip archive"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize("pack", [tar_of, zip_of])
@pytest.mark.parametrize("name", ["a/" * 1900 + "x.png", "ü" * 130 + ".png"])
def test_a_name_that_no_file_could_have_is_refused(tmp_path, pack, name):
    (tmp_path / "a.bin").write_bytes(pack({name: picture()}))
    said = r"a name of \d+ characters; 1024 bytes are the most|is broken .*name too long"
    with pytest.raises(ValueError, match=said):
        unpack(tmp_path / "a.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("first", [True, False])
def test_a_header_that_announces_gigabytes_is_refused_before_they_are_read(tmp_path, kind, first):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, 3 << 30
    before = b"" if first else tar_of({"1.png": picture()}, "w")[:1024]
    (tmp_path / "a.tar").write_bytes(before + info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with open(tmp_path / "a.tar", "r+b") as file:
        file.truncate(4 << 30)  # takes no room on the disk
    said = f"a.tar: it announces {3 << 30} bytes of name or attributes, more than 1048576"
    with pytest.raises(UnsafeArchive, match=said):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_file_with_holes_is_refused(tmp_path, kind):
    info = tarfile.TarInfo("holes.png")
    if kind == "gnu":
        info.type = tarfile.GNUTYPE_SPARSE
    else:
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    info.size = 512
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"1000000000\n" + b"0\n" * 300))
    with pytest.raises(ValueError, match=r"a\.tar holds 'holes\.png', a file with holes|a\.tar is broken"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


def test_more_files_than_images_would_fit_into_the_archive_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FEW", 100)
    (tmp_path / "many.tar").write_bytes(tar_of({f"{i}.png": b"" for i in range(300)}))
    with pytest.raises(UnsafeArchive, match=r"many\.tar has more than \d+ files in \d+ bytes: too many to be images"):
        unpack(tmp_path / "many.tar", tmp_path / "many")
    assert not (tmp_path / "many").exists()
    (tmp_path / "some.tar").write_bytes(tar_of({f"{i}.png": os.urandom(64) for i in range(300)}))
    unpack(tmp_path / "some.tar", tmp_path / "some")
    assert len(list((tmp_path / "some").iterdir())) == 300


def test_an_archive_at_an_address_becomes_a_data_set_that_is_read_where_it_was_unpacked(site, make, tmp_path):
    site.content = tar_of(
        {"imgs/README.txt": b"hi"} | {f"imgs/{label}/{i}.png": picture(i) for label in ("cat", "dog") for i in range(4)}
    )
    site.breaks = [200]
    source = f"url:{site.url}#sha256={hashlib.sha256(site.content).hexdigest()}"
    made = make(source, "pets", role="ood")
    assert made.summary() == "pets: 8 images (test 8), 2 classes of 4 to 4, 0 rejected"
    assert made.dataset.image_path(0).read_bytes() == picture(0)
    assert tmp_path / "downloads" in made.dataset.root.parents
    assert make(source, "pets", role="ood").dataset.digest == made.dataset.digest and len(site.asked) == 2


@pytest.mark.parametrize("end", ["", "#sha256=12", "#md5=00112233445566778899aabbccddeeff"])
def test_an_address_without_a_sha256_is_refused_with_how_to_get_it(make, end):
    said = r"has no digest; write url:<address>#sha256=<64 .* which `sha256sum <archive>`"
    with pytest.raises(ValueError, match=said):
        make(f"url:https://example.org/a.tar{end}")
