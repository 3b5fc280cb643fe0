"""Damage to the bytes of a file: blind, and by what its format means.

Every mutator takes a numpy generator and the bytes, and gives other bytes; None where it finds
nothing to change.
"""

import csv
import gzip
import io
import json
import re
import struct
import zipfile
import zlib

import numpy as np

NUMBERS = (
    *("0", "-1", "-0.0", "0.001", "3", "7", "1e5", "1e308", "-1e308", "1e-320", "65536"),
    *("2147483648", "99999999999999999999", "nan", "inf", "-inf", "1,5", "0x10", "..", "abc", ""),
)
TEXTS = (
    *("", "\x1b[2J", "a\nb", "a\r\nb", "a\u2028b", "\u202ea", "x" * 5000, "../../x", "/etc/passwd"),
    *("=1+1", "NaN", "None", "é", "<img src=x onerror=alert(1)>", "💥", "%s%n", "a\tb", "x\0y"),
)
VALUES = (
    *(None, True, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**9, 10**30, "", "text"),
    *([], {}, [1, 2], {"a": 1}, [None], [[[]]]),
)


def choose(rng, options):
    "One of them; numpy's own choice would turn them into an array."
    options = list(options)
    return options[int(rng.integers(len(options)))] if options else None


def span(rng, size: int, most: int = 64) -> tuple[int, int]:
    "The two ends of a run of at most `most` bytes; often near the beginning, where headers are."
    place = rng.random() ** choose(rng, (1, 1, 4))
    start = int(place * size)
    return start, min(size, start + int(rng.integers(1, most + 1)))


# ---- blind ------------------------------------------------------------------------------------


def flip_bits(rng, data: bytes):
    if not data:
        return None
    result = bytearray(data)
    for _ in range(choose(rng, (1, 1, 2, 8))):
        start, _ = span(rng, len(data))
        result[start] ^= 1 << int(rng.integers(8))
    return bytes(result)


def overwrite_run(rng, data: bytes):
    start, stop = span(rng, len(data))
    noise = rng.integers(0, 256, stop - start, dtype=np.uint8).tobytes()
    filling = choose(rng, (noise, b"\0" * (stop - start), b"\xff" * (stop - start)))
    return data[:start] + filling + data[stop:]


def truncate(rng, data: bytes):
    return data[: choose(rng, (0, 1, len(data) // 2, len(data) - 1, span(rng, len(data))[0]))]


def repeat_block(rng, data: bytes):
    start, stop = span(rng, len(data), 512)
    return data[:stop] + data[start:stop] * choose(rng, (1, 2, 40)) + data[stop:]


def remove_block(rng, data: bytes):
    start, stop = span(rng, len(data), 512)
    return data[:start] + data[stop:]


def append_bytes(rng, data: bytes):
    tail = choose(rng, (b"\0", b"\0" * 4096, data[:100], b"\x1f\x8b\x08" + b"\0" * 20, data))
    return data + tail


def twice(rng, data: bytes):
    first = choose(rng, BLIND[:-1])(rng, data)
    return choose(rng, BLIND[:-1])(rng, first or data)


BLIND = (flip_bits, overwrite_run, truncate, repeat_block, remove_block, append_bytes, twice)


# ---- text -------------------------------------------------------------------------------------

NUMBER = re.compile(rb"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?")


def odd_number(rng, data: bytes):
    found = choose(rng, list(NUMBER.finditer(data))[:2000])
    if found is None:
        return None
    return data[: found.start()] + choose(rng, NUMBERS).encode() + data[found.end() :]


def odd_word(rng, data: bytes):
    found = choose(rng, list(re.finditer(rb"[A-Za-z_][\w.]*", data))[:2000])
    if found is None:
        return None
    return data[: found.start()] + choose(rng, TEXTS).encode() + data[found.end() :]


def odd_character(rng, data: bytes):
    place = int(rng.integers(len(data) + 1))
    what = choose(rng, (b"\0", b"\x1b[2J", "\u2028".encode(), b"\r", b'"', b"\xf6", b"\xff\xfe"))
    return data[:place] + what + data[place:]


def change_lines(rng, data: bytes):
    lines = data.split(b"\n")
    k = int(rng.integers(len(lines)))
    line = lines[k]
    lines[k : k + 1] = choose(
        rng,
        ([], [line, line], [line + b" " + b"9" * 3000], [line[: len(line) // 2]], [b""], [b"#"]),
    )
    return b"\n".join(lines)


def long_line(rng, data: bytes):
    lines = data.split(b"\n")
    k = int(rng.integers(len(lines)))
    lines[k] += choose(rng, (b" 1" * 3000, b"x" * 100_000, b" " * 200_000))
    return b"\n".join(lines)


def other_encoding(rng, data: bytes):
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    marked = choose(rng, (text, text.replace("a", "ä", 1)))
    name = choose(rng, ("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "cp1252"))
    return marked.encode(name, "replace")


TEXT = (odd_number, odd_number, odd_word, odd_character, change_lines, long_line, other_encoding)


# ---- JSON -------------------------------------------------------------------------------------


def _places(value, path=()):
    "All paths in a JSON value, at most some hundred of a list."
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*path, key))
    elif isinstance(value, list):
        for k in range(min(len(value), 40)):
            yield from _places(value[k], (*path, k))


def change_value(rng, value):
    "A JSON value with one place changed."
    value = json.loads(json.dumps(value))
    path = choose(rng, list(_places(value))[1:])
    if path is None:
        return choose(rng, VALUES)
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    old = owner[path[-1]]
    way = choose(rng, ("set", "set", "number", "text", "remove", "add", "longer"))
    if way == "remove":
        del owner[path[-1]]
    elif way == "add" and isinstance(owner, dict):
        owner[choose(rng, (*TEXTS[:10], "extra"))] = choose(rng, VALUES)
    elif way == "number" and isinstance(old, (int, float)):
        odd = (0, -1, -old, old * 1000, 1e308, float("nan"), float("inf"), 10**12, old + 1, 0.5)
        owner[path[-1]] = choose(rng, odd)
    elif way == "text" and isinstance(old, str):
        owner[path[-1]] = choose(rng, TEXTS)
    elif way == "longer" and isinstance(old, list):
        owner[path[-1]] = choose(rng, (old * 2, old * 500, old[:-1], [old]))
    else:
        owner[path[-1]] = choose(rng, VALUES)
    return value


def change_json(rng, data: bytes):
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return json.dumps(change_value(rng, value), indent=choose(rng, (None, 1))).encode()


def nest_json(rng, data: bytes):
    nested = b"[" * 100_000
    found = choose(rng, list(NUMBER.finditer(data))[:200])
    if found is None or rng.random() < 0.3:
        return nested
    depth = choose(rng, (200, 100_000))
    middle = b"[" * depth + found[0] + b"]" * depth
    return data[: found.start()] + middle + data[found.end() :]


def repeat_key(rng, data: bytes):
    found = choose(rng, list(re.finditer(rb'"\w+":', data))[:200])
    return found and data[: found.start()] + found[0] + b" 1, " + data[found.start() :]


JSON = (change_json, change_json, change_json, change_json, nest_json, repeat_key)


def change_json_line(rng, data: bytes):
    lines = data.split(b"\n")
    k = int(rng.integers(len(lines)))
    changed = change_json(rng, lines[k])
    if changed is None:
        return None
    lines[k] = changed.replace(b"\n", b" ")
    return b"\n".join(lines)


# ---- tables -----------------------------------------------------------------------------------


def change_table(rng, data: bytes):
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error):
        return None
    if not rows:
        return None
    r = choose(rng, (0, int(rng.integers(len(rows)))))
    way = choose(rng, ("cell", "cell", "cell", "shorter", "longer", "repeat", "remove", "column"))
    row = rows[r]
    c = int(rng.integers(len(row))) if row else 0
    if way == "cell" and row:
        row[c] = choose(rng, (*TEXTS, *NUMBERS, "x" * 200_000))
    elif way == "shorter":
        rows[r] = row[:-1]
    elif way == "longer":
        rows[r] = [*row, choose(rng, TEXTS)]
    elif way == "repeat":
        rows.insert(r, row)
    elif way == "remove":
        del rows[r]
    else:
        rows = [[*one[:c], *one[c + 1 :]] for one in rows]
    text = io.StringIO()
    delimiter = choose(rng, (",", ",", ",", ";", "\t", "|"))
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


# ---- volumes ----------------------------------------------------------------------------------


def change_nifti(rng, data: bytes):
    "One field of the header gets an odd value."
    from nibabel import Nifti1Header

    kind = Nifti1Header.template_dtype
    header = np.frombuffer(data[: kind.itemsize], kind).copy()
    if not len(header):
        return None
    field = header[choose(rng, kind.names)]
    flat = field.reshape(-1)
    k = int(rng.integers(flat.size))
    if field.dtype.kind == "f":
        odd = (0, -1, 1e-30, 1e30, np.nan, np.inf, flat[k] * 1000, -flat[k], 1.5)
        flat[k] = choose(rng, odd)
    elif field.dtype.kind in "iu":
        top = np.iinfo(field.dtype).max
        odd = (0, 1, 2, 3, 4, 7, 8, 64, 255, top, top // 2 + 1, int(flat[k]) + 1)
        flat[k] = np.asarray(choose(rng, odd)).astype(field.dtype)
    else:
        flat[k] = choose(rng, (b"", b"\xff" * 4, b"ni1", b"n+2", b"\x1b[2J"))
    return header.tobytes() + data[kind.itemsize :]


def inside_gzip(mutators):
    "The same damage before it is packed, so that the checksum is right."

    def mutate(rng, data: bytes):
        try:
            inner = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return None
        changed = choose(rng, mutators)(rng, inner)
        return None if changed is None else gzip.compress(changed, 1, mtime=0)

    return mutate


def in_header(end: bytes, mutators):
    "The same damage in the text before the first `end`."

    def mutate(rng, data: bytes):
        head, found, tail = data.partition(end)
        changed = choose(rng, mutators)(rng, head)
        return None if changed is None else changed + found + tail

    return mutate


# ---- arrays -----------------------------------------------------------------------------------


def _npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def odd_array(rng, array: np.ndarray):
    "An array of another type, shape or content."
    ways = ["none", "scalar", "empty", "text", "objects", "complex", "flat", "more", "half", "bool"]
    if array.dtype.kind in "fiu":
        ways += ["nan", "huge", "negative", "float", "swapped", "zero", "wide", "shuffled"]
    way = choose(rng, ways)
    size = array.size
    if way in ("nan", "huge"):
        array = array.astype(np.float32).copy()
        array.flat[int(rng.integers(max(size, 1))) : None : 7] = np.nan if way == "nan" else 1e38
        return array
    return {
        "none": lambda: np.array(None),
        "scalar": lambda: np.array(3),
        "empty": lambda: array[:0] if array.ndim else np.zeros(0),
        "text": lambda: np.array(choose(rng, TEXTS)),
        "objects": lambda: np.array([{"a": 1}], dtype=object),
        "complex": lambda: np.zeros(array.shape, complex),
        "flat": lambda: array.ravel(),
        "more": lambda: array[None],
        "half": lambda: array[: max(1, len(array) // 2)] if array.ndim else array,
        "bool": lambda: np.zeros(array.shape, bool),
        "negative": lambda: -array.astype(np.float64),
        "float": lambda: array.astype(np.float16),
        "swapped": lambda: array.astype(array.dtype.newbyteorder()),
        "zero": lambda: np.zeros_like(array),
        "wide": lambda: array.astype(np.float64) * 1e6,
        "shuffled": lambda: array.T.copy(),
    }[way]()


def change_arrays(rng, data: bytes):
    "An npz with an odd, missing, or further array, or with odd JSON in its text."
    arrays = dict(np.load(io.BytesIO(data)))
    name = choose(rng, arrays)
    way = choose(rng, ("odd", "odd", "odd", "json", "json", "remove", "rename", "add"))
    if way == "json":
        name = next((n for n in arrays if arrays[n].dtype.kind == "U"), None)
        if name is None:
            return None
        changed = choose(rng, JSON)(rng, str(arrays[name]).encode())
        if changed is None:
            return None
        arrays[name] = np.array(changed.decode("utf-8", "replace"))
    elif way == "remove":
        del arrays[name]
    elif way == "rename":
        arrays[choose(rng, ("x", "../x", name.upper()))] = arrays.pop(name)
    elif way == "add":
        arrays[choose(rng, ("x", "\x1b[2J", "labels", "a\nb"))] = np.zeros(3)
    else:
        arrays[name] = odd_array(rng, arrays[name])
    return _zipped({f"{n}.npy": _npy(a) for n, a in arrays.items()})


def claim_more(rng, data: bytes):
    "An array whose header claims another shape or type than it has."
    members = _members(data)
    name = choose(rng, members)
    return _zipped({**members, name: change_npy_header(rng, members[name])})


def change_npy_header(rng, data: bytes):
    length = struct.unpack("<H", data[8:10])[0]
    text = data[10 : 10 + length]
    number = choose(rng, (b"(99999, 99999, 99999)", b"(1000, 1000, 1000)", b"(-1, 2)", b"(2,", b""))
    changed = choose(
        rng,
        (
            re.sub(rb"\([^)]*\)", number, text),
            text.replace(b"<", b">"),
            text.replace(b"i2", b"f8"),
            text.replace(b"False", b"True"),
            text.replace(b"descr", b"other"),
            b"(" * 5000,
            text[: len(text) // 2],
        ),
    )
    changed = changed.rstrip() + b" " * max(0, length - len(changed.rstrip()) - 1) + b"\n"
    return data[:8] + struct.pack("<H", len(changed)) + changed + data[10 + length :]


# ---- archives ---------------------------------------------------------------------------------


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {i.filename: archive.read(i) for i in archive.infolist()}


def _zipped(members) -> bytes:
    "Members as a zip that is the same every time."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in dict(members).items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, 1)
    return buffer.getvalue()


def inside_zip(mutators):
    "Damage to one member, or to its name, with right checksums."

    def mutate(rng, data: bytes):
        members = _members(data)
        name = choose(rng, members)
        way = choose(rng, ("content", "content", "content", "name", "remove", "add", "zeros"))
        if way == "content":
            changed = choose(rng, mutators)(rng, members[name])
            if changed is None:
                return None
            members[name] = changed
        elif way == "name":
            members[choose(rng, ("../x.dcm", "/x.dcm", "a\x1b[2J\nb.dcm", "x" * 300))] = (
                members.pop(name)
            )
        elif way == "remove":
            del members[name]
        elif way == "zeros":
            members[name] = b"\0" * 2**24
        else:
            members[choose(rng, ("readme.txt", "DICOMDIR", "b/x", ".hidden"))] = choose(
                rng, (b"", b"text", members[name], b"\0" * 128 + b"DICM")
            )
        return _zipped(members)

    return mutate


# ---- DICOM ------------------------------------------------------------------------------------


def change_dicom(rng, data: bytes):
    "One attribute, at any depth, is missing, empty or odd."
    import pydicom

    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    where = dataset
    for _ in range(3):
        sequences = [e for e in where if e.VR == "SQ" and len(e.value)]
        if sequences and rng.random() < 0.5:
            where = choose(rng, choose(rng, sequences).value)
    element = choose(rng, list(where))
    if element is None:
        return None
    way = choose(rng, ("delete", "empty", "odd", "odd", "odd", "private", "repeat"))
    if way == "delete":
        del where[element.tag]
    elif way == "empty":
        where[element.tag] = pydicom.DataElement(element.tag, element.VR, None)
    elif way == "private":
        where.private_block(0x0099, "odd", create=True).add_new(1, "LO", "x\x1b[2J")
    elif way == "repeat" and element.VR in ("DS", "IS", "US"):
        old = element.value
        element.value = [old] * 3 if not isinstance(old, (list, tuple)) else [*old, *old]
    else:
        where[element.tag] = _odd_element(rng, element)
    return _dicom_bytes(dataset)


def _odd_element(rng, element):
    import pydicom

    if element.VR in ("DS", "IS"):
        count = len(element.value) if hasattr(element.value, "__len__") else 1
        text = "\\".join(choose(rng, (*NUMBERS, "1")) for _ in range(count))
        return pydicom.dataelem.RawDataElement(
            element.tag, element.VR, len(text), text.encode(), 0, False, True
        )
    if element.VR in ("US", "SS"):
        odd = (0, 1, 2, 3, 7, 12, 17, 4096, 32767)
        return pydicom.DataElement(element.tag, element.VR, choose(rng, odd))
    if element.VR in ("OW", "OB"):
        old = element.value
        odd = (old[: len(old) // 2], b"", old + old, old[:-1], old + b"\0" * 2, bytes(len(old)))
        return pydicom.DataElement(element.tag, element.VR, choose(rng, odd))
    if element.VR == "SQ":
        changed = choose(rng, ([], list(element.value)[:-1], list(element.value) * 2))
        return pydicom.DataElement(element.tag, "SQ", changed)
    text = choose(rng, (*TEXTS, "1.2.840.10008.1.2.4.70", "CT", "MR", "HFS", "DERIVED", "LOG"))
    content = text.encode("utf-8")
    return pydicom.dataelem.RawDataElement(
        element.tag, element.VR, len(content), content, 0, False, True
    )


def _dicom_bytes(dataset) -> bytes | None:
    import pydicom

    buffer = io.BytesIO()
    with pydicom.config.disable_value_validation():
        try:
            pydicom.dcmwrite(buffer, dataset, enforce_file_format=False)
        except Exception:  # what pydicom cannot write is no mutant
            return None
    return buffer.getvalue()


# ---- PNG, safetensors, Parquet ----------------------------------------------------------------


def change_png(rng, data: bytes):
    "A field of a chunk, with the right checksum."
    chunks = []
    place = 8
    while place + 12 <= len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        chunks.append([data[place + 4 : place + 8], data[place + 8 : place + 8 + size]])
        place += size + 12
    k = int(rng.integers(len(chunks)))
    kind, content = chunks[k]
    if kind == b"IHDR":
        odd = list(struct.unpack(">IIBBBBB", content))
        j = int(rng.integers(7))
        odd[j] = choose(
            rng, (0, 1, 2, 3, 4, 6, 8, 16, 255, 30000, 2**31 - 1) if j < 2 else range(9)
        )
        chunks[k][1] = struct.pack(">IIBBBBB", *odd)
    elif kind == b"IDAT":
        inner = choose(rng, BLIND)(rng, zlib.decompress(content))
        chunks[k][1] = choose(rng, (zlib.compress(inner or b""), content[: len(content) // 2], b""))
    else:
        chunks[k][1] = choose(rng, (*TEXT, *BLIND))(rng, content) or b""
    if rng.random() < 0.2:
        chunks.insert(k, list(choose(rng, chunks)))
    if rng.random() < 0.1:
        del chunks[int(rng.integers(len(chunks)))]
    return data[:8] + b"".join(
        struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks
    )


def change_safetensors(rng, data: bytes):
    "Odd numbers in a tensor, or odd JSON in the header."
    (size,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.5:
        numbers = np.frombuffer(body[: len(body) // 4 * 4], "<f4").copy()
        k = int(rng.integers(max(numbers.size, 1)))
        numbers[k : k + choose(rng, (1, 1, 1000))] = choose(
            rng, (np.nan, np.inf, -np.inf, 1e38, 1e30, 0)
        )
        return data[: 8 + size] + numbers.tobytes() + body[len(body) // 4 * 4 :]
    changed = choose(rng, (*JSON, *BLIND))(rng, header)
    return None if changed is None else struct.pack("<Q", len(changed)) + changed + body


def change_parquet(rng, data: bytes):
    "Odd columns, rows and metadata."
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    name = choose(rng, table.column_names)
    k = table.column_names.index(name)
    rows = len(table)
    way = choose(rng, ("null", "null", "odd", "odd", "odd", "drop", "rename", "rows", "about"))
    values = table.column(name).to_pylist()
    j = int(rng.integers(rows))
    if way == "null":
        values[j] = None
        table = table.set_column(k, name, pa.array(values, table.schema.field(name).type))
    elif way == "odd" and name == "vector":
        width = len(values[0])
        odd = ([np.nan] * width, [0.0] * width, [1000.0] * width, [1.0], [], [1e38] * width)
        values[j] = choose(rng, odd)
        table = table.set_column(k, name, pa.array(values, pa.list_(pa.float32())))
    elif way == "odd":
        texts = [*values]
        texts[j] = choose(rng, TEXTS)
        column = choose(rng, (texts, list(range(rows)), [b"\xff"] * rows, [["a"]] * rows))
        table = table.set_column(k, name, pa.array(column))
    elif way == "drop":
        table = table.drop_columns([name])
    elif way == "rename":
        table = table.rename_columns([f"{n}x" if n == name else n for n in table.column_names])
    elif way == "rows":
        table = table.slice(0, choose(rng, (0, 1, rows - 1)))
    else:
        about = dict(table.schema.metadata or {})
        key = choose(rng, about)
        about[key] = choose(rng, (b"\xff\xfe", b"", b"../..", b"\x1b[2J", b"x" * 5000))
        if rng.random() < 0.3:
            del about[key]
        table = table.replace_schema_metadata(about)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def change_npy(rng, data: bytes):
    "An npy file with an odd array, or a header that does not fit."
    if rng.random() < 0.5:
        return change_npy_header(rng, data)
    return _npy(odd_array(rng, np.load(io.BytesIO(data))))


# ---- by format --------------------------------------------------------------------------------

NIFTI = (change_nifti, change_nifti, change_nifti)
KINDS = {  # what a file can suffer besides blind damage
    "nifti": NIFTI,
    "nifti.gz": (inside_gzip((*NIFTI, *BLIND)),) * 3,
    "nrrd": (in_header(b"\n\n", TEXT),) * 4,
    "metaimage": (in_header(b"ElementDataFile", TEXT),) * 3 + (in_header(b"LOCAL", TEXT),),
    "text": TEXT,
    "json": (*JSON, *TEXT),
    "json lines": (change_json_line, change_json_line, change_json_line, nest_json, *TEXT),
    "table": (change_table, change_table, change_table, change_table, *TEXT),
    "npz": (change_arrays, change_arrays, change_arrays, claim_more),
    "npy": (change_npy,),
    "dicom": (change_dicom,) * 4,
    "zip": (inside_zip(BLIND),),
    "zip of dicom": (inside_zip((change_dicom, change_dicom, *BLIND)),) * 3,
    "png": (change_png, change_png),
    "safetensors": (change_safetensors, change_safetensors),
    "parquet": (change_parquet, change_parquet, change_parquet),
    "raw": (),
}


def mutate(rng, data: bytes, kind: str) -> tuple[bytes, str]:
    "Other bytes than `data`, and the name of the mutator that made them."
    while True:
        way = choose(rng, (*KINDS[kind], flip_bits, choose(rng, BLIND)))
        try:
            changed = way(rng, data)
        except Exception:  # no such damage to this file
            continue
        if changed is not None and changed != data:
            return changed, way.__name__
