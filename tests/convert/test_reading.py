"""Damaged files and files of another format get a clear message, and nothing in them runs."""

import pickle
import random
import uuid
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from support.checkpoints import IMAGE, TEXT, Bomb, content_of, file_of, refused, saved

from lion_hf.convert.errors import ConversionError
from lion_hf.convert.reading import read_checkpoint
from lion_hf.convert.torch_files import open_torch_file


@pytest.fixture
def output(tmp_path) -> Path:
    """A folder to write to, which is not there yet, alone in its parent."""
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "model"


class Lie:
    """A tensor whose pickle claims other sizes than its storage has."""

    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0):
        self.arguments = (offset, size, stride, False, OrderedDict())
        storage = torch.arange(10.0).untyped_storage()
        self.storage = torch.storage.TypedStorage(
            wrap_storage=storage, dtype=torch.float32, _internal=True
        )

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (self.storage, *self.arguments)


class TestBrokenFiles:
    def test_missing_file(self, output, tmp_path):
        refused(tmp_path / "absent.pth", output, "no such file")

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
    @pytest.mark.parametrize("case", [IMAGE, TEXT])
    def test_truncated(self, output, tmp_path, case, share):
        data = file_of(case).read_bytes()
        (tmp_path / "file.pth").write_bytes(data[: int(len(data) * share)])
        refused(tmp_path / "file.pth", output, "truncated or no PyTorch checkpoint")

    def test_flipped_bit(self, output, tmp_path):
        data = bytearray(file_of(IMAGE).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "file.pth").write_bytes(data)
        refused(tmp_path / "file.pth", output, "damaged")

    @pytest.mark.parametrize(
        "data", [b"", b"hello", pickle.dumps({"model": {}})], ids=["empty", "text", "pickle"]
    )
    def test_not_a_zip(self, output, tmp_path, data):
        (tmp_path / "file.pth").write_bytes(data)
        refused(tmp_path / "file.pth", output, "no PyTorch checkpoint")

    @pytest.mark.parametrize("case", [IMAGE, TEXT])
    def test_the_older_format_of_torch_reads_the_same(self, tmp_path, case):
        torch.save(content_of(case), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        ours, other = read_checkpoint(file_of(case)), read_checkpoint(tmp_path / "old.pt")
        assert ours.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(x, other.tensors[name]) for name, x in ours.tensors.items())
        data = (tmp_path / "old.pt").read_bytes()
        for size in (0, 3, 20, 300, len(data) // 2, len(data) - 1):
            (tmp_path / "cut.pt").write_bytes(data[:size])
            with pytest.raises(ConversionError, match="damaged|truncated"):
                read_checkpoint(tmp_path / "cut.pt")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
    def test_tensors_are_those_of_torch(self, tmp_path, dtype, old):
        base = torch.randn(6, 5, 4).to(dtype)
        tensors = {
            "whole": base,
            "part": base[1:3, ::2],
            "turned": base.permute(2, 0, 1),
            "parameter": torch.nn.Parameter(base[0]),
            "number": base[0, 0, 0],
        }
        torch.save(tensors, tmp_path / "file.pt", _use_new_zipfile_serialization=not old)
        with open_torch_file(tmp_path / "file.pt") as file:
            read = file.tensors(file.content)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], x) for name, x in tensors.items())

    def test_random_damage_is_refused_or_harmless(self, tmp_path):
        chance = random.Random(0)
        with zipfile.ZipFile(file_of(IMAGE)) as original:
            entries = {name: original.read(name) for name in original.namelist()}
        refusals = 0
        for _ in range(150):
            data = bytearray(entries["checkpoint/data.pkl"])
            for _ in range(chance.randint(1, 6)):
                data[chance.randrange(len(data))] = chance.choice(b"](}).tutesRbqhjrcQKMJX")
            with zipfile.ZipFile(tmp_path / "file.pth", "w") as file:
                for name, content in entries.items():
                    file.writestr(name, data if name.endswith("data.pkl") else content)
            try:
                read_checkpoint(tmp_path / "file.pth")
            except ConversionError as error:
                refusals += 1
                assert str(error).isprintable()
        assert refusals > 50

    def test_other_zip(self, output, tmp_path):
        with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive:
            archive.writestr("hello.txt", "hello")
        refused(tmp_path / "file.pth", output, "damaged or no PyTorch checkpoint")

    def test_zip_bomb(self, output, tmp_path):
        with (
            zipfile.ZipFile(file_of(IMAGE)) as archive,
            zipfile.ZipFile(tmp_path / "file.pth", "w", zipfile.ZIP_DEFLATED) as copy,
        ):
            for name in archive.namelist():
                copy.writestr(name, archive.read(name))
        refused(tmp_path / "file.pth", output, "unpack to more than its own size")

    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize("place", ["top", "args", "weights"])
    def test_pickle_bomb(self, output, tmp_path, place, protocol):
        made, content = tmp_path / "made", content_of(IMAGE)
        {"top": content, "args": vars(content["args"]), "weights": content["model"]}[place][
            "bomb"
        ] = Bomb(made)
        torch.save(content, tmp_path / "file.pth", pickle_protocol=protocol)
        refused(
            tmp_path / "file.pth",
            output,
            r"holds (posix|nt)\.mkdir" if protocol == 2 else "damaged or no PyTorch",  # never 4
        )
        assert not made.exists()
        torch.load(tmp_path / "file.pth", weights_only=False)
        assert made.exists()  # the premise: the file would do harm

    def test_blocked_class_is_named(self, output, tmp_path):
        content = content_of(IMAGE)
        content["args"].run = uuid.uuid4()
        refused(saved(content, tmp_path / "file.pth"), output, "holds uuid.UUID, which is neither")

    @pytest.mark.parametrize(
        "lie",
        [
            Lie((48,), (1,)),
            Lie((10**12,), (1,)),
            Lie((10**6, 10**6), (0, 0)),
            Lie((48,), (0,)),
            Lie((5,), (1,), offset=10**9),
            Lie((-5,), (1,)),
            Lie((0,), (1,)),
        ],
        ids=lambda lie: str(lie.arguments[:3]),
    )
    def test_tensors_that_lie_about_their_sizes(self, output, tmp_path, lie):
        content = content_of(IMAGE)
        content["model"]["norm.weight"] = lie
        refused(saved(content, tmp_path / "file.pth"), output, "damaged|claims shape")

    @pytest.mark.parametrize(
        "value",
        [
            torch.ones(48, dtype=torch.long),
            torch.ones(48).to_sparse(),
            torch.ones(48, device="meta"),
            [1.0] * 48,
            None,
        ],
        ids=["long", "sparse", "meta", "list", "None"],
    )
    def test_no_real_tensor(self, output, tmp_path, value):
        content = content_of(IMAGE)
        content["model"]["norm.weight"] = value
        refused(
            saved(content, tmp_path / "file.pth"),
            output,
            "norm.weight (is not a dense tensor|has type torch.int64)",
        )

    def test_other_content(self, output, tmp_path):
        refused(
            saved({"epoch": 3, "weights": {}}, tmp_path / "a.pt"),
            output,
            r"keys \['epoch', 'weights'\]: an original LION",
        )
        refused(saved([1, 2], tmp_path / "b.pt"), output, "holds a list")
        refused(saved({"model": {}}, tmp_path / "c.pt"), output, "lacks tensor")
        refused(
            saved({"model": {"norm.weight": torch.ones(3)}}, tmp_path / "d.pt"),
            output,
            "Is it an original LION checkpoint",
        )
