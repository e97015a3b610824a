"""Files made to exhaust memory or time, and what reading them costs."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from support.checkpoints import IMAGE, content_of, file_of, saved
from support.softmax_models import softmax_model

ROOT = Path(__file__).parents[2]
MOST_SECONDS, MOST_MEBIBYTES = 10, 500
PRIME = 2**61 - 1  # its multiples have one hash

# Runs in a process of its own: name -> path in, a line of JSON per file out.
MEASURE = """
import json, re, resource, sys, time
from pathlib import Path
import lion_hf
lion_hf.convert_checkpoint, lion_hf.linearize_checkpoint  # imported before the measurement
import transformers.models.auto.modeling_auto, transformers.models.bert.modeling_bert

def peak(reset):
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is used now
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**10

read = getattr(lion_hf, sys.argv[3])
for name, path in json.loads(sys.argv[1]).items():
    before, start = peak(True), time.process_time()
    try:
        read(path, f"{sys.argv[2]}-{len(name)}-{name[:3]}")
        answer = "accepted"
    except ValueError as error:
        answer = str(error)
    except Exception as error:
        answer = f"RAW {type(error).__name__}: {error}"
    print(json.dumps([name, answer, time.process_time() - start, peak(False) - before]), flush=True)
"""


def cost_of(function: str, files: Mapping[str, Path], place: Path) -> dict[str, tuple]:
    """A function's answer to each file, with the CPU seconds and mebibytes that it took."""
    paths = json.dumps({name: str(path) for name, path in files.items()})
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, paths, "output", function],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return {name: rest for name, *rest in map(json.loads, run.stdout.splitlines())}


def check_refusals(function: str, files: Mapping[str, Path], place: Path) -> dict[str, str]:
    """A function's answers to hostile files, after the checks that all hold for.

    Every file is refused in one printable line, in seconds and little memory, and nothing is
    written or unpacked beside the files or to `place`.
    """
    here = sorted(place.parent.rglob("*"))
    costs = cost_of(function, files, place)
    assert costs.keys() == files.keys()
    for name, (answer, seconds, mebibytes) in costs.items():
        honest = files[name].stat().st_size / 2**20 if files[name].is_file() else 0
        assert answer != "accepted" and not answer.startswith("RAW"), (name, answer)
        assert answer.isprintable() and len(answer) <= 1000, (name, answer)
        assert seconds < MOST_SECONDS, (name, seconds)
        assert mebibytes < MOST_MEBIBYTES + 2 * honest, (name, mebibytes)
    assert sorted(place.parent.rglob("*")) == here
    return {name: answer for name, (answer, _, _) in costs.items()}


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **records) -> Path:
    """An archive as torch.save writes it, with a pickle of our own."""
    entries = {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **records}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(f"checkpoint/{name}", data)
    return path


def changed(path: Path, change=lambda data: data, extra: tuple[str, ...] = ()) -> Path:
    """A reference checkpoint with another pickle, or more entries."""
    with zipfile.ZipFile(file_of(IMAGE)) as original, zipfile.ZipFile(path, "w") as file:
        for name in original.namelist():
            data = original.read(name)
            file.writestr(name, change(data) if name.endswith("data.pkl") else data)
        for name in extra:
            file.writestr(name, b"x")
    return path


def overlapping(path: Path, entries: int = 5000, size: int = 20_000_000) -> Path:
    """One entry of zeros that the directory names again and again: 20 MB that read as 100 GB."""
    archive(path, pickle.dumps({}, protocol=2), zeros=bytes(size))
    data = path.read_bytes()
    end = data.rfind(b"PK\5\6")
    start = struct.unpack_from("<I", data, end + 16)[0]
    directory, tail = data[start:end], bytearray(data[end:])
    last = directory[directory.rfind(b"PK\1\2") :]
    count = directory.count(b"PK\1\2") + entries
    names = (last.replace(b"zeros", b"%05d" % number) for number in range(entries))
    directory += b"".join(names)
    struct.pack_into("<HHI", tail, 8, count, count, len(directory))
    path.write_bytes(data[:start] + directory + tail)
    with zipfile.ZipFile(path) as file:
        assert sum(entry.file_size for entry in file.infolist()) > entries * size  # the premise
    return path


def two_directories(path: Path) -> Path:
    """An archive whose end is another archive's: which one is read depends on the reader."""
    archive(path, pickle.dumps({"model": {}}, protocol=2))
    other = archive(path.with_suffix(".other"), b"\x80\x02" + b"]" * 1_000_000 + b".")
    path.write_bytes(path.read_bytes() + other.read_bytes())
    other.unlink()
    return path


def lying_size(path: Path) -> Path:
    """An entry whose zip64 part claims 2^60 bytes."""
    archive(path, pickle.dumps({}, protocol=2))
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\5\6")
    start = struct.unpack_from("<I", data, end + 16)[0]
    record = bytearray(data[start : data.find(b"PK\1\2", start + 4)])
    struct.pack_into("<II", record, 20, 2**32 - 1, 2**32 - 1)
    struct.pack_into("<H", record, 30, 20)
    record += struct.pack("<2H2Q", 1, 16, 2**60, 2**60)
    rest = data[data.find(b"PK\1\2", start + 4) : end]
    tail = data[end:]
    struct.pack_into("<I", tail, 12, len(record) + len(rest))
    path.write_bytes(data[:start] + record + rest + tail)
    with zipfile.ZipFile(path) as file:
        assert max(entry.file_size for entry in file.infolist()) == 2**60  # the premise
    return path


def nested_tuples(depth: int) -> bytes:
    """A dict whose key is a tuple of 2^depth items: the pickle has seven bytes per level."""
    levels = (
        b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1])
        for n in range(1, depth + 1)
    )
    return b"\x80\x02)q\x01" + b"".join(levels) + b"}h" + bytes([depth + 1]) + b"K\x01s."


def storages_of(elements: int) -> Callable[[bytes], bytes]:
    """The 48 numbers of every storage of that size become more than the file has."""

    def change(data: bytes) -> bytes:
        assert data.count(b"K\x30t") > 5  # the premise: sizes stand there like this
        return data.replace(b"K\x30t", b"J" + struct.pack("<i", elements) + b"t")

    return change


def long_number(value: int) -> bytes:
    """LONG1 with a whole number."""
    digits = pickle.encode_long(value)
    return b"\x8a" + bytes([len(digits)]) + digits


def weights(path: Path, **changes) -> Path:
    """A reference checkpoint with other or more tensors."""
    content = content_of(IMAGE)
    content["model"] |= changes
    return saved(content, path)


def one_storage_for_all(path: Path, layers: int = 250, size: int = 1024) -> Path:
    """Layers whose large matrices are one: 12 MB that become 3 GB."""
    content = content_of(IMAGE)
    model, matrix = content["model"], torch.ones(3 * size, size)
    layer = {name: x for name, x in model.items() if name.startswith("blocks.0.")}
    for n in range(layers):
        model |= {name.replace("blocks.0.", f"blocks.{n}."): x for name, x in layer.items()}
        model[f"blocks.{n}.attn.qkv.weight"] = matrix
    return saved(content, path)


PICKLES = {
    "a bytearray of 2 GB": b"\x80\x02cbuiltins\nbytearray\nq\x00"
    + b"J\xff\xff\xff\x7f\x85Rq\x01h\x00J\xff\xff\xff\x7f\x85R.",
    "a bytearray of Python 2": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "tuples of 2^60 items": nested_tuples(60),
    "300,000 lists in lists": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "text of 4 GB": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"abc.",
    "12 million small numbers": b"\x80\x02](" + b"K\x01" * 12_000_000 + b"e.",
    "100,000 numbers of 2,000 bits": b"\x80\x02](" + long_number(2**2000) * 100_000 + b"e.",
    "a number of 80 million bits": b"\x80\x02\x8b"
    + struct.pack("<i", 10**7)
    + b"\x7f" * 10**7
    + b".",
    "a decimal number of a million digits": b"\x80\x02L" + b"9" * 10**6 + b"L\n.",
    "60,000 keys of one hash": b"\x80\x02}("
    + b"".join(long_number(n * PRIME) + b"K\x01" for n in range(1, 60_001))
    + b"u.",
    "a dict copied for ever": b"\x80\x02ccollections\nOrderedDict\nq\x00]("
    + b"K\x01K\x02\x86" * 200_000
    + b"eq\x01"
    + b"h\x00h\x01\x85R" * 200_000
    + b".",
    "settings joined for ever": b"\x80\x02cargparse\nNamespace\n)\x81q\x00}("
    + b"".join(b"X\x06\x00\x00\x00%06dN" % n for n in range(100_000))
    + b"uq\x01"
    + b"h\x00h\x01b" * 300_000
    + b".",
    "itself": b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.",
    "a million tensors": b"\x80\x02}X\x05\x00\x00\x00model}("
    + b"".join(b"X\x06\x00\x00\x00%06dN" % n for n in range(600_000))
    + b"us.",
    "a name of 28 MB": b"\x80\x02}X\x05\x00\x00\x00model}X"
    + struct.pack("<I", 28_000_000)
    + b"module." * 4_000_000
    + b"Nss.",
    "a class of an endless name": b"\x80\x02c" + b"x" * 10**7 + b"\ny\n.",
    "terminal codes": b"\x80\x02c\x1b[31m\x07os\nsystem\n.",
    "nothing": b"",
    "marks": b"\x80\x02" + b"(" * 10_000_000 + b".",
    "memo": b"\x80\x02]" + b"".join(b"r" + struct.pack("<I", n) for n in range(3_000_000)) + b".",
}


def hostile_files(folder: Path) -> dict[str, Path]:
    """Files for `convert_checkpoint`, each of which asks for far more than it holds."""
    old_kind = folder / "old.pth"
    torch.save({"model": {}}, old_kind, _use_new_zipfile_serialization=False)
    two_kinds = folder / "two-kinds.pth"
    two_kinds.write_bytes(old_kind.read_bytes() + file_of(IMAGE).read_bytes())
    assert torch.load(two_kinds, weights_only=True) == {"model": {}}  # the premise
    lying = folder / "lying.safetensors"
    lying.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    source = folder / "source"
    source.mkdir()
    (source / "modeling_lion.py").write_text("raise SystemExit('executed')")
    link = folder / "link.pth"
    link.symlink_to("link.pth")
    pickles = {
        name: archive(folder / f"pickle-{number}.pth", data)
        for number, (name, data) in enumerate(PICKLES.items())
    }
    escaped = ("../../escaped", f"{folder}/escaped", "C:\\escaped")
    many = folder / "many.pth"
    with zipfile.ZipFile(many, "w") as file:
        for number in range(110_000):
            file.writestr(f"checkpoint/{number}", b"")
    return pickles | {
        "many entries": many,
        "DATA.PKL": archive(
            folder / "case.pth",
            pickle.dumps({"model": {}}, protocol=2),
            **{"DATA.PKL": nested_tuples(60)},
        ),
        "two directories": two_directories(folder / "directories.pth"),
        "zip64": lying_size(folder / "zip64.pth"),
        "overlapping entries": overlapping(folder / "overlapping.pth"),
        "200 MB in 200 kB": archive(
            folder / "packed.pth", b"", zipfile.ZIP_DEFLATED, zeros=bytes(200_000_000)
        ),
        "storages of 8 GB": changed(folder / "storages.pth", storages_of(2**31 - 1)),
        "storages of 4 kB": changed(folder / "small-storages.pth", storages_of(1024)),
        "one storage": one_storage_for_all(folder / "one-storage.pth"),
        "ten million labels": weights(
            folder / "labels.pth", **{"head.weight": torch.zeros(10_000_000, 1, dtype=torch.half)}
        ),
        "a thousand layers": weights(
            folder / "layers.pth", **{f"blocks.{n}.norm1.bias": torch.ones(1) for n in range(1000)}
        ),
        "paths": changed(folder / "paths.pth", extra=escaped),
        "two kinds": two_kinds,
        "old kind": old_kind,
        "safetensors": lying,
        "a folder with code": source,
        "a link to itself": link,
    }


def hostile_sources(folder: Path) -> dict[str, Path]:
    """Folders for `linearize_checkpoint`, each of which asks for far more than it holds."""
    made: dict[str, Path] = {}

    def source(name: str, architecture: str = "BertForMaskedLM", **config) -> Path:
        place = made[name] = folder / f"source-{len(made)}"
        softmax_model(architecture).save_pretrained(place)
        file = place / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return place

    for name, value in {
        "vocab_size": 120_000_000,
        "max_position_embeddings": 100_000_000,
        "type_vocab_size": 100_000_000,
        "intermediate_size": 1_000_000,
        "num_hidden_layers": 500,
    }.items():
        source(f"{name}={value}", **{name: value})
        source(f"{name}=10^9", **{name: 10**9})
    for labels in (90_000, 10**9):
        source(f"num_labels={labels}", "BertForSequenceClassification", num_labels=labels)
    source("floats", vocab_size=1e12)
    source("images of 10^9", "ViTForImageClassification", image_size=10**9)
    source("images of 60,000", "ViTForImageClassification", image_size=[60_000, 60_000])
    source("channels", "ViTForImageClassification", num_channels=65_536, patch_size=4096)
    source("stride", "ViTForMaskedImageModeling", encoder_stride=4096, patch_size=4096)
    source("labels", "BertForSequenceClassification", id2label=dict.fromkeys(range(500000), "x"))
    source("width", hidden_size=65_536, num_attention_heads=1)
    source("another configuration", configuration_files=["config.0.0.1.json"], vocab_size=10**9)
    for name, data in {
        "lists": b"[" * 10**6,
        "not JSON": b"\xff\xfe",
        "spaces": b" " * 20_000_000,
    }.items():
        (source(name) / "config.json").write_bytes(data)
    pickled = source("a pickle of 2 GB")
    (pickled / "model.safetensors").unlink()
    archive(pickled / "pytorch_model.bin", PICKLES["a bytearray of 2 GB"])
    shared = source("one storage")
    (shared / "model.safetensors").unlink()
    one_storage_for_all(shared / "pytorch_model.bin")
    index = source("an index to elsewhere")
    (index / "model.safetensors").unlink()
    (index / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../source-0/model.safetensors"}})
    )
    header = (
        b"{"
        + b",".join(
            b'"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(400_000)
        )
        + b"}"
    )
    names = source("400,000 tensors")
    (names / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    words = source("a vocabulary of 30 MB")
    (words / "vocab.txt").write_text("\n".join(f"word{n}" for n in range(3_000_000)))
    (words / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    image = source("pixels", "ViTForImageClassification")
    size = {"height": 10**6, "width": 10**6}
    (image / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": size})
    )
    return made
