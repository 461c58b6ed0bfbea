"""Tar archives, read in place: list the members once, then any process reads any image by its offset."""

import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os.path import commonprefix
from typing import IO, NamedTuple

from fsspec import AbstractFileSystem

from pipeline.errors import DataError, first_line
from tools.prepare.folders import WITHOUT_CLASSES, is_read
from tools.prepare.image_source import ByteRanges, ImageSource, Item, Stamp, base, is_image, open_stream, why_ignored

_BLOCK_BYTES = 512


class Member(NamedTuple):
    name: str
    offset: int
    size: int
    why: str = ""
    """Why it cannot be read, if it is no regular file."""
    is_image: bool = False
    """Whether it is an image by its name, and in no hidden folder."""

    def place(self, path: str) -> tuple | str:
        return self.why or (path, self.offset, self.size)

    def ignored(self, prefix: str = "") -> tuple[str, str]:
        why = "in a folder that is hidden or not the user's" if is_image(self.name) else why_ignored(self.name)
        return f"{prefix}{base(self.name)}", self.why or why


def tar_of_classes(fs: AbstractFileSystem, path: str) -> ImageSource:
    """An archive of archives CLASS.tar, such as ILSVRC2012_img_train.tar and fall11_whole.tar."""
    with open_stream(fs, path) as stream:
        inner = sorted(_members(stream, path), key=lambda member: base(member.name))
        if lost := next((m for m in inner if m.why and m.name.endswith(".tar")), None):
            raise DataError(f"{path}: {lost.name} is {lost.why}, so a class would be missing; pack the archive anew")
        links = tuple(member.ignored() for member in inner if member.why)
        parts = [(m, _members(stream, f"{path}: {m.name}", m)) for m in inner if not m.why]
        images = _by_class(fs, "tar of class tars", [(base(m.name), path, members) for m, members in parts], [path])
        return replace(images, ignored=images.ignored + links)


def class_tars(fs: AbstractFileSystem, paths: Sequence[str]) -> ImageSource:
    """Archives CLASS.tar in one folder, such as ImageNet-22K unpacked once."""
    parts = []
    for path in paths:
        with open_stream(fs, path) as stream:
            parts.append((base(path), path, _members(stream, path)))
    return _by_class(fs, "class tars", parts, paths)


def tar_of_folders(fs: AbstractFileSystem, path: str) -> ImageSource:
    """One archive of CLASS/IMAGE members. An image's class is the folder that holds it."""
    with open_stream(fs, path) as stream:
        members = _members(stream, path)
    by_class: dict[str, list[Member]] = {}
    parents: dict[str, str] = {}
    for member in members:
        parent = member.name.rpartition("/")[0]
        folder = base(parent)
        if member.is_image and not folder:
            raise DataError(f"{path} holds images without class folders ({member.name}); {WITHOUT_CLASSES}")
        if member.is_image and parents.setdefault(folder, parent) != parent:
            raise DataError(
                f"{path} holds two folders of class {folder}, {parents[folder]} and {parent}, such as those of training"
                " and validation; unpack it and name one folder of classes"
            )
        by_class.setdefault(folder, []).append(member)
    _refuse_doubtful_depth(path, [member.name for member in members if member.is_image])
    parts = [(n, path, by_class[n]) for n in sorted(by_class) if any(m.is_image for m in by_class[n])]
    images, classes = _by_class(fs, "tar of class folders", parts, [path]), {name for name, *_ in parts}
    others = (m.ignored(f"{name}/" if name else "") for name in by_class if name not in classes for m in by_class[name])
    return replace(images, ignored=(*images.ignored, *others))


def _refuse_doubtful_depth(path: str, images: Sequence[str]) -> None:
    """Raise DataError unless all images lie one folder below those that they share.

    Of cat/indoor/1.jpg and dog/2.jpg the classes may be cat and dog, as in folders, or indoor and dog.
    """
    folders = {name.rpartition("/")[0]: name for name in images}
    above = len(commonprefix([folder.split("/") for folder in folders]))  # noqa: RUF071 (of lists of parts)
    depths = {name.count("/") - above: name for name in folders.values()}
    if len(folders) > 1 and set(depths) != {1}:
        raise DataError(
            f"{path} holds folders in folders ({depths[max(depths)]}), so its classes are in doubt; unpack it and name"
            " the folder that holds one folder for each class"
        )


def flat_tar(fs: AbstractFileSystem, path: str) -> ImageSource:
    """One archive of images, such as ILSVRC2012_img_val.tar, named by their paths in it, in the order of their names.

    All are of class 0 until labels are applied.
    """
    with open_stream(fs, path) as stream:
        members = sorted(_members(stream, path), key=lambda member: base(member.name))
    items = [Item(m.name, 0, m.place(path)) for m in members if m.is_image]
    ignored = tuple(m.ignored() for m in members if not m.is_image)
    return ImageSource("flat tar", ("all",), items, ByteRanges(fs), _stamp(fs, [path], items), ignored)


def holds_tars(fs: AbstractFileSystem, path: str) -> bool:
    """Whether the first file in an archive is a .tar itself."""
    with open_stream(fs, path) as stream, _reading(path), tarfile.open(fileobj=stream, mode="r:") as archive:
        first = next((member for member in archive if member.isfile()), None)
        return first is not None and first.name.endswith(".tar")


def _by_class(
    fs: AbstractFileSystem, kind: str, parts: Sequence[tuple[str, str, Sequence[Member]]], paths: Sequence[str]
) -> ImageSource:
    items, ignored = [], []
    classes = tuple(name.removesuffix(".tar") for name, _, _ in parts)
    for label, (name, path, members) in enumerate(parts):
        if any(member.name.endswith(".tar") and not member.why for member in members):
            raise DataError(f"{path} holds archives itself; name it alone as the source")
        images = [m for m in sorted(members, key=lambda member: base(member.name)) if m.is_image]
        if not images:
            raise DataError(f"{path}: class {classes[label]} has no images; remove its archive {name}")
        items += [Item(f"{classes[label]}/{base(m.name)}", label, m.place(path)) for m in images]
        ignored += [m.ignored(f"{classes[label]}/") for m in members if not m.is_image]
    if len(set(classes)) != len(classes) or not classes:
        raise DataError(f"{paths[0]} holds {'a class twice' if classes else 'no images'}; look at its members")
    return ImageSource(kind, classes, items, ByteRanges(fs), _stamp(fs, paths, items), tuple(ignored))


def _stamp(fs: AbstractFileSystem, paths: Sequence[str], items: Sequence[Item]) -> str:
    stamp = Stamp()
    for path in paths:
        stamp.add_file(fs.info(path))
    for item in items:
        stamp.add(*item[:3])
    return stamp.hex()


def _members(stream: IO[bytes], name: str, within: Member | None = None) -> list[Member]:
    """List the files of an archive with their offsets in `stream`; links and devices with the reason not to read them.

    Of members with one path the last counts, as for whoever unpacks the archive.

    Args:
        within: the member of an outer archive that is the archive to list.

    Raises:
        DataError: if this is no archive, is compressed, or lacks its end mark. A download that broke off between two
            members would go unnoticed otherwise.
    """
    start = within.offset if within else 0
    stream.seek(start)
    with _reading(name), tarfile.open(fileobj=stream, mode="r:") as archive:
        members: dict[str, Member] = {}
        for member in archive:
            if within and member.offset >= within.offset + within.size:
                break
            path = posixpath.normpath(member.name).lstrip("/")
            if member.issparse():  # its holes are left out of the archive
                members[path] = Member(path, member.offset_data, 0, "a sparse file; pack it without tar's option -S")
            elif member.isfile():
                members[path] = Member(path, member.offset_data, member.size)
            elif not member.isdir():
                kind = "link" if member.islnk() or member.issym() else "device or pipe"
                members[path] = Member(path, member.offset_data, 0, f"a {kind} in the archive, not a file")
        stream.seek(archive.offset)
        mark = stream.read(_BLOCK_BYTES)
        if (within and archive.offset + _BLOCK_BYTES > within.offset + within.size) or mark.strip(b"\0") or not mark:
            raise tarfile.ReadError("its end is missing")
    return _with_images(list(members.values()))


def _with_images(members: Sequence[Member]) -> list[Member]:
    """Say which members are images. Hidden folders hold none, as in `folders`, unless all images lie in them."""
    folders = {member.name: member.name.split("/")[:-1] for member in members if is_image(member.name)}
    above = len(commonprefix([*folders.values()]))  # noqa: RUF071 (of lists of parts)
    return [m._replace(is_image=m.name in folders and all(map(is_read, folders[m.name][above:]))) for m in members]


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError, OSError) as error:
        # A header may claim any size, and name itself as the header of the next one.
        raise DataError(
            f"archive {name} cannot be read ({first_line(error)}): it is truncated, damaged or compressed; copy it"
            " again, or unpack a .gz first"
        ) from None
