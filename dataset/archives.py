"""Lists what lies in tar and zip archives, so that it can be read in its place."""

import io
import tarfile
import zipfile
from collections.abc import Iterator

SUFFIXES = (".tar", ".zip")


def members(path: str) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each file in an archive, where its bytes begin, and their number.

    Raises:
        OSError: the archive cannot be read, or keeps files compressed, which cannot be read in their place.
    """
    try:
        yield from (_tar_members if path.lower().endswith(".tar") else _zip_members)(path)
    except OSError:
        raise
    except Exception as error:  # the file decides which
        reason = str(error).strip("()'\n").rpartition("('")[2]  # the last of those of tarfile's attempts
        raise OSError(f"a damaged archive ({reason}); make it again") from error


def _tar_members(path: str) -> Iterator[tuple[str, int, int]]:
    with tarfile.open(path) as archive:
        if not isinstance(archive.fileobj, io.BufferedReader):  # a decompressor
            raise OSError("a compressed archive: unpack it, or store it as it is (tar -cf)")
        for member in archive:
            if member.isreg() and not member.issparse():
                yield member.name, member.offset_data, member.size


def _zip_members(path: str) -> Iterator[tuple[str, int, int]]:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise OSError(f"{member.filename} in it is compressed or encrypted: unpack it, or store it (zip -0)")
            file.seek(member.header_offset + 26)  # the lengths of name and extra field, which precede the bytes
            lengths = file.read(4)
            start = member.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            yield member.filename, start, member.file_size
