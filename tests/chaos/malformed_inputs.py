"""What hypothesis draws for `tests.chaos.malformed`: a changed copy of a real file, and a command that reads it."""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st

from pipeline.data.beton import HEADER, SAMPLE, SAMPLES_AT, hash_blocks, index_sha256, read_sidecar, sidecar_path

# -- what is put in place of a value, of bytes, or of a whole file

ODD = st.one_of(
    st.sampled_from([None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, -(10**400), 1e300, math.inf, -math.inf,
        math.nan, "", " ", "\0", "x" * 10_000, "../../etc/passwd", "/dev/zero", "[red]", "${HOME}", "1e5", "yes", [],
        {}, [[]], [None] * 3, list(range(2000)), {"a": {"b": {}}}, {"": 1}]),
    st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=5),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)  # fmt: skip
WHOLE = st.sampled_from([
    b"", b"\0" * 100, b"{", b"[" * 50_000, b'{"a":' * 50_000, b"[" * 500 + b"]" * 500, b"null", b"5", b"NaN", b'"text"',
    b"[1, 2]", b"{}", b'{"a": ' + b"1" * 5000 + b"}", b"\xff\xfe\0\0", b"a: &a [*a]", b"- " * 30_000, b"? a\n: b\n",
    b"a: &a {x: 1}\n<<: [" + b", ".join([b"*a"] * 1000) + b"]\n", b"[" + b"1," * 1_000_000 + b"1]", b"--- a\n--- b\n",
    b"%YAML 9.9\n---\na: 1\n", b"a: !!python/object/apply:os.system [exit]\n", b"\x80\x02.", b"PK\x03\x04",
])  # fmt: skip
SPECIAL = ("directory", "pipe", "/dev/zero", "/dev/full", "nowhere", "loop", "unreadable")


@st.composite
def changed_bytes(draw: Any, data: bytes) -> bytes:
    """A copy with a few bytes changed, cut off, repeated, moved, or put in its place as a whole."""
    place = draw(st.integers(0, len(data)))
    length = draw(st.integers(1, 64))
    match draw(st.sampled_from(["flip", "cut", "drop", "repeat", "insert", "number", "whole"])):
        case "flip":
            return data[:place] + bytes(255 - byte for byte in data[place : place + length]) + data[place + length :]
        case "cut":
            return data[:place]
        case "drop":
            return data[:place] + data[place + length :]
        case "repeat":
            return data[: place + length] + data[place : place + length] * draw(st.integers(1, 3000)) + data[place:]
        case "insert":
            return data[:place] + draw(st.binary(min_size=1, max_size=40)) + data[place:]
        case "number":
            number = draw(st.sampled_from([0, 1, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1]))
            return data[:place] + struct.pack("<Q", number) + data[place + 8 :]
    return draw(WHOLE)


@st.composite
def changed_tree(draw: Any, tree: Any) -> Any:
    """A copy with one value changed, left out, renamed or doubled, however deep it lies."""
    tree = json.loads(json.dumps(tree))
    holder: Any = {"": tree}
    key: Any = ""
    while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 5)):
        holder = holder[key]
        key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        if holder is tree and isinstance(holder, dict) and "stages" in holder and draw(st.booleans()):
            key = "stages"
    if holder == {"": tree}:
        return draw(ODD)
    change = draw(st.sampled_from(["odd", "odd", "odd", "drop", "rename", "wrap", "many"]))
    value = holder.pop(key) if isinstance(holder, dict) else holder[key]
    if change == "odd":
        holder[key] = draw(ODD)
    elif change == "rename" and isinstance(holder, dict):
        holder[draw(st.text(min_size=1, max_size=8))] = value
    elif change == "wrap":
        holder[key] = [value]
    elif change == "many":
        holder[key] = [value] * draw(st.sampled_from([2, 1000]))
    return tree


@st.composite
def changed_text(draw: Any, data: bytes, read: Callable[[bytes], Any], write: Callable[[Any], bytes]) -> bytes:
    """A copy of a JSON or YAML file, changed in its structure or in its bytes."""
    if draw(st.integers(0, 2)):
        return write(draw(changed_tree(read(data))))
    return draw(changed_bytes(data))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def yaml_bytes(value: Any) -> bytes:
    return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")


def changed_json(data: bytes) -> st.SearchStrategy[bytes]:
    return changed_text(data, json.loads, _json)


def changed_yaml(data: bytes) -> st.SearchStrategy[bytes]:
    return changed_text(data, yaml.safe_load, yaml_bytes)


@st.composite
def changed_lines(draw: Any, data: bytes) -> bytes:
    """A copy of a journal with a few odd lines: valid JSON of other types, or other bytes."""
    lines = data.splitlines()
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["value", "value", "value", "whole", "bytes", "double"])):
            case "value":
                event = json.loads(data.splitlines()[0])
                with suppress(ValueError):  # this line is changed already
                    event = json.loads(lines[place])
                if isinstance(event, dict) and event:
                    event[draw(st.sampled_from(sorted(event)))] = draw(ODD)
                lines[place] = _json(event)
            case "whole":
                lines[place] = _json(draw(ODD))
            case "bytes":
                lines[place] = draw(changed_bytes(lines[place]))
            case _:
                lines.insert(place, lines[-1])
    return b"\n".join(lines) + b"\n"


@st.composite
def changed_safetensors(draw: Any, data: bytes) -> bytes:
    """A copy with a changed header, the length before it corrected or not."""
    if not draw(st.integers(0, 3)):
        return draw(changed_bytes(data))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if draw(st.booleans()):  # the facts of this program are JSON inside of the header
        facts = draw(changed_text(header["__metadata__"]["fcmae"].encode(), json.loads, _json))
        header["__metadata__"]["fcmae"] = facts.decode(errors="replace")
    elif draw(st.booleans()):
        name = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(
            st.one_of(ODD, st.sampled_from([[10**12], [2**62, 4], [0, 4 * 10**12], [-1, 5], "F4", "I64", [0, 2**63]]))
        )
    else:
        header = draw(changed_tree(header))
    content = _json(header)
    return struct.pack("<Q", len(content)) + content + data[8 + length :]


@st.composite
def changed_tar(draw: Any, data: bytes) -> bytes:
    """A copy with a changed header whose checksum is right, or with changed bytes."""
    if not draw(st.integers(0, 3)):
        return draw(changed_bytes(data))
    at = 512 * draw(
        st.sampled_from([n for n in range(len(data) // 512) if data[512 * n + 257 : 512 * n + 262] == b"ustar"])
    )
    header = bytearray(data[at : at + 512])
    field, start, length = draw(
        st.sampled_from([("name", 0, 100), ("size", 124, 12), ("size", 124, 12), ("type", 156, 1)])
    )
    if field == "size":
        value = draw(st.sampled_from([2**62, 2**63, 2**40, 2**33, 0, 1, 511, 10**6]))
        content = b"\x80" + value.to_bytes(11, "big")
    elif field == "type":
        content = draw(st.sampled_from([b"1", b"2", b"3", b"5", b"6", b"L", b"K", b"x", b"g", b"S", b"7", b"\xff"]))
    else:
        content = draw(st.binary(min_size=1, max_size=100))
    header[start : start + length] = content.ljust(length, b"\0")[:length]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


# -- which command reads which file

VALIDATE = [("recipe", "validate", "tiny.yaml"), ("recipe", "show", "tiny.yaml"),
            ("submit", "tiny.yaml", "--site", "generic", "--out", "out", "--dry-run")]  # fmt: skip
SITE = [("submit", "tiny.yaml", "--site", "site.yaml", "--out", "out", "--dry-run")]
BETON = [("verify", "data/train.beton"), ("verify", "data/train.beton", "--full")]
PREPARE = ("prepare", "--max-side", "64")
WEIGHTS = ("model.pth", "--to", "timm")
Input = tuple[tuple[str, ...], str, bytes | str]
KEYS = ["stages.pretrain.schedule.epochs", "defaults.data", "stages", "stages.pretrain.batch.slot", "seed", "", "a.b.c",
        "stages.pretrain.model.depths", "init", "stages.pretrain.gate.loss_at", "defaults.data.train", "[0]",
        "." * 3000, "stages.pretrain.data.image_size", "extends", "name", "stages.pretrain"]  # fmt: skip
VALUES = ["[" * 3000, "[" * 40 + "]" * 40, "9" * 5000, "{a: &a [*a]}", "${a.b}", "${" * 500, ".inf", "!!bool x", "\\"]
RUN = [("status", "run"), ("status", "run", "--json"), ("times", "run"), ("report", "run", "--out", "page.html"),
       ("verify", "run"), ("logs", "run"), ("checkpoint", "ls", "run/pretrain"),
       ("checkpoint", "prune", "run/pretrain"), ("cancel", "run"), ("resume", "run"),
       ("watch", "run")]  # fmt: skip


@st.composite
def inputs(
    draw: Any, real: Mapping[str, bytes], run_files: list[str], kind: str
) -> tuple[tuple[str, ...], str, bytes | str]:
    """(arguments of the command, the file that is changed, its content or what takes its place).

    real: the content of each real file by its path. run_files: those of the run.
    """
    match kind:
        case "recipe":
            return draw(st.sampled_from(VALIDATE)), "tiny.yaml", draw(changed_yaml(real["tiny.yaml"]))
        case "site":
            return draw(st.sampled_from(SITE)), "site.yaml", draw(changed_yaml(real["site.yaml"]))
        case "override":
            value = draw(st.one_of(ODD.map(json.dumps), st.text(max_size=30), st.sampled_from(VALUES)))
            text = f"{draw(st.sampled_from(KEYS))}={value}".replace("\0", "").encode("utf-8", "ignore").decode()
            return (*draw(st.sampled_from(VALIDATE)), text[:100_000]), "", b""
        case "side-car":
            name = "data/train.beton.json"
            return draw(st.sampled_from([*BETON, VALIDATE[2]])), name, draw(changed_json(real[name]))
        case "data":
            return draw(st.sampled_from(BETON)), "data/train.beton", draw(changed_bytes(real["data/train.beton"]))
        case "sample table":
            return BETON[1], "data/train.beton", draw(_crafted(real["data/train.beton"]))
        case "archive":
            name = draw(st.sampled_from(["images.tar", "outer.tar"]))
            return (*PREPARE, name, "out.beton"), name, draw(changed_tar(real[name]))
        case "parquet":
            return (*PREPARE, "rows.parquet", "out.beton"), "rows.parquet", draw(_changed_parquet(real["rows.parquet"]))
        case "labels":
            arguments = (*PREPARE, "photos", "out.beton", "--labels", "labels.csv")
            return arguments, "labels.csv", draw(changed_bytes(real["labels.csv"]))
        case "weights":
            name = draw(st.sampled_from(["weights.safetensors", "weights.safetensors", "weights.pth", "old.pth"]))
            change = changed_safetensors if name.endswith("s") else changed_bytes
            command = draw(st.sampled_from([("convert", name, *WEIGHTS), ("predict", name, "photos/0.jpg")]))
            return command, name, draw(change(real[name]))
        case "run":
            name = draw(st.sampled_from(run_files))
            change = changed_lines if name.endswith(".jsonl") else changed_bytes
            change = changed_json if name.endswith((".json", "DONE", "COMMIT")) else change
            change = changed_yaml if name.endswith(".yaml") else change
            return draw(st.sampled_from(RUN)), name, draw(change(real[name]) if real[name] else WHOLE)
        case "no file":
            known = {"tiny.yaml": VALIDATE[0], "site.yaml": SITE[0], "data/train.beton.json": BETON[0],
                "data/train.beton": BETON[0], "images.tar": (*PREPARE, "images.tar", "out.beton"),
                "labels.csv": (*PREPARE, "photos", "out.beton", "--labels", "labels.csv"),
                "weights.safetensors": ("convert", "weights.safetensors", *WEIGHTS)}  # fmt: skip
            name = draw(st.sampled_from([*known, *run_files]))
            return known.get(name) or draw(st.sampled_from(RUN)), name, draw(st.sampled_from(SPECIAL))
    raise AssertionError(kind)


@st.composite
def _changed_parquet(draw: Any, data: bytes) -> bytes:
    """A copy with changed bytes, half of the time in the description at its end, which says where everything lies."""
    length = int.from_bytes(data[-8:-4], "little") + 8
    head, tail = data[:-length], data[-length:]
    return draw(changed_bytes(data)) if draw(st.booleans()) else head + draw(changed_bytes(tail))


@st.composite
def _crafted(draw: Any, data: bytes) -> bytes:
    """A .beton file with an odd row of its sample table; `put` makes the hashes of its side-car right again."""
    at = SAMPLES_AT + SAMPLE.itemsize * draw(st.integers(0, 63))
    row = bytearray(data[at : at + SAMPLE.itemsize])
    match draw(st.sampled_from(["size", "size", "label", "mode", "place"])):
        case "size":
            row[1:5] = struct.pack(
                "<HH", *draw(st.sampled_from([(0, 0), (65535, 65535), (0, 24), (1, 1), (24, 65535)]))
            )
        case "label":
            row[16:24] = struct.pack("<q", draw(st.sampled_from([10**9, -1, 4, 2**62, -(2**63)])))
        case "mode":
            row[0] = draw(st.sampled_from([0, 2, 255]))
        case _:
            row[5:13] = struct.pack("<Q", draw(st.sampled_from([0, 1, 2**40, 2**63, 2**64 - 1])))
    return data[:at] + bytes(row) + data[at + SAMPLE.itemsize :]


def sign_again(path: Path) -> None:
    """Write a side-car whose hashes are those of the file as it is now."""

    beton = read_sidecar(path)
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER.itemsize), HEADER)[0]
        index = index_sha256(file, header)
        file.seek(0)
        sha256, blocks = hash_blocks(file)
    changed = beton.model_copy(update={"index_sha256": index, "sha256": sha256, "block_sha256": blocks})
    side_car = sidecar_path(path)
    side_car.unlink()
    side_car.write_text(changed.model_dump_json())


def put(place: Path, name: str, content: bytes | str, kind: str) -> None:
    """Put the changed file, or what takes its place, into a copy of the workshop."""
    if not name:
        return
    path = place / name
    path.unlink()
    match content:
        case bytes():
            path.write_bytes(content)
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)
        case "unreadable":
            path.write_bytes(b"")
            path.chmod(0)
        case "nowhere":
            path.symlink_to("no/such/file")
        case device:
            path.symlink_to(device)
    if kind == "sample table":
        sign_again(path)
