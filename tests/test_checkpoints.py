"""Reading, converting and writing weights: what comes out right, and what every kind of bad file gets."""

from common.command import run_tool

import collections
import datetime
import io
import os
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from vmamba_reference import SIZES, VMamba, vanilla_vmamba

from vim2.checkpoints import (
    convert_vmamba,
    load_weights,
    read_checkpoint,
    read_state_dict,
    save_checkpoint,
    save_half_precision,
)
from vim2.classify import convert


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vmamba():
    return vanilla_vmamba("tiny")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vim2", num_classes=10).eval()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def follow_the_remedy(path):
    """Run, as a shell would, the command that is suggested for a file that is refused."""
    with pytest.raises(ValueError, match="python -c") as error:
        read_checkpoint(path)
    command = str(error.value).partition("alone: python ")[2]
    search = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=path.parent, env={**os.environ, "PYTHONPATH": search}, check=True
    )


class TestConversion:
    def test_logits_are_vmambas(self, vmamba, tmp_path, capsys):
        torch.save({"model": vmamba.state_dict(), "epoch": 3}, tmp_path / "in.pth")
        assert run_tool(convert, [str(tmp_path / "in.pth"), str(tmp_path / "out.pth")]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "create_model" in line)
        scope = {"timm": timm}
        exec(line.strip(), scope)  # the line of Python that the tool tells users to write
        ours = scope["model"].eval()
        for size in ((64, 64), (40, 90)):
            x = images(2, 3, *size)
            with torch.no_grad():
                expected, actual = vmamba(x), ours(x)
            assert expected.std() > 0.1
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()

    @pytest.mark.parametrize("size", SIZES)
    def test_uses_every_key_and_misses_none(self, size):
        with torch.device("meta"):
            model = timm.create_model(f"vim2_{size}_vmamba")
        source = {k: torch.full(v.shape, float(i)) for i, (k, v) in enumerate(meta_state_dict(size).items())}
        name, converted = convert_vmamba(source)
        assert name == f"vim2_{size}_vmamba"
        assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
        # every source tensor is filled with its own number, and each must arrive once
        arrived = collections.Counter(v.flatten()[0].item() for k, v in converted.items() if "layers.0" in k or v.any())
        assert all(arrived[float(i)] for i in range(1, len(source)))
        new = converted.keys() - given_names(source, converted)
        assert new and all(re.search(r"average\.weight$|layers\.[23]\.", k) for k in new)
        assert all((converted[k] == 1).all() for k in converted if k.endswith("average.weight"))

    def test_names_of_the_first_release(self, vmamba):
        def old(name):
            name = name.replace("patch_embed.0", "patch_embed.proj").replace("patch_embed.2", "patch_embed.norm")
            name = re.sub(r"(blocks\.\d+)\.norm", r"\1.ln_1", name).replace(".op.", ".self_attention.")
            return name.removeprefix("classifier.")

        state_dict = vmamba.state_dict()
        first = {old(k): v for k, v in state_dict.items()}
        assert not first.keys() & {k for k in state_dict if "blocks" in k or "classifier" in k}
        assert equal(convert_vmamba(first)[1], convert_vmamba(state_dict)[1])
        # those of its own top-level file, where patch merging is a sequence
        parts = {".downsample.norm.": ".downsample.1.", ".downsample.reduction.": ".downsample.2."}
        sequence = {}
        for key, value in state_dict.items():
            for part, number in parts.items():
                key = key.replace(part, number)
            sequence[key] = value
        assert sequence.keys() != state_dict.keys()
        assert equal(convert_vmamba(sequence)[1], convert_vmamba(state_dict)[1])

    def test_same_result_every_time_and_leaves_the_generator_alone(self, vmamba):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = convert_vmamba(vmamba.state_dict())[1]
        assert torch.equal(torch.get_rng_state(), state)
        assert equal(convert_vmamba(vmamba.state_dict())[1], first)

    def test_other_classes_and_none(self, capsys, tmp_path):
        state_dict = meta_state_dict("tiny", num_classes=7)
        state_dict = {k: torch.zeros(v.shape) for k, v in state_dict.items()}
        torch.save(state_dict, tmp_path / "in.pth")
        assert run_tool(convert, [str(tmp_path / "in.pth"), str(tmp_path / "out.pth")]) == 0
        assert "num_classes=7" in capsys.readouterr().out
        headless = {k: v for k, v in state_dict.items() if "head" not in k}
        assert not any(k.startswith("head") for k in convert_vmamba(headless)[1])

    def test_prefers_ema_unless_told_otherwise(self, vmamba, tmp_path):
        state_dict = {k: torch.zeros_like(v) for k, v in vmamba.state_dict().items()}
        torch.save({"model": state_dict, "model_ema": {k: v + 1 for k, v in state_dict.items()}}, tmp_path / "in.pth")
        for flags, value in (([], 1), (["--no-ema"], 0)):
            assert run_tool(convert, [str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), *flags]) == 0
            assert (read_state_dict(tmp_path / "out.pth")["norm.weight"] == value).all()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: d.update({"layers.0.blocks.0.mlp.fc1.weight": torch.zeros(2)}), "mlp.fc1.weight has no place"),
            (lambda d: d.update({"layers.5.blocks.0.norm.weight": torch.zeros(96)}), "layers.5.*has no place"),
            (lambda d: d.update({"head.weight": d["classifier.head.weight"]}), "head.weight has no place"),
            (lambda d: d.pop("layers.2.blocks.4.op.Ds"), "1 weights.*missing.*s6.D"),
            (lambda d: d.update({"layers.1.blocks.0.op.A_logs": torch.zeros(1536, 1)}), r"A_logs is \(1536, 1\)"),
            (lambda d: d.update({"layers.1.downsample.reduction.weight": torch.zeros(768, 384)}), r"is \(768, 384\)"),
            (lambda d: d.pop("patch_embed.0.weight"), "not the weights of a vanilla VMamba"),
            (lambda d: d.update({"patch_embed.0.weight": torch.tensor(1.0)}), "not the weights of a vanilla VMamba"),
            (lambda d: d.update({"classifier.head.weight": torch.tensor(1.0)}), "classifier.head.weight"),
            (lambda d: d["layers.0.blocks.0.norm.bias"].fill_(torch.nan), "layers.0.blocks.0.norm.bias holds NaN"),
            (lambda d: [d.pop(k) for k in list(d) if "layers.2.blocks.8" in k], "found 96 and 8"),
        ],
        ids=[
            "mlp",
            "stage",
            "twice",
            "missing",
            "d_state",
            "shape",
            "stem",
            "0-dim stem",
            "0-dim head",
            "nan",
            "depth",
        ],
    )
    def test_refuses_what_it_cannot_convert(self, change, message):
        state_dict = {k: torch.zeros(v.shape) for k, v in meta_state_dict("tiny").items()}
        change(state_dict)
        with pytest.raises(ValueError, match=message):
            convert_vmamba(state_dict)

    def test_errors_are_one_line_and_write_nothing(self, model, tmp_path, capsys):
        torch.save(model.state_dict(), tmp_path / "vim2.pth")
        for name in ("vim2.pth", "absent.pth"):
            assert run_tool(convert, [str(tmp_path / name), str(tmp_path / "out.pth")]) == 2
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert not (tmp_path / "out.pth").exists()


def meta_state_dict(size, num_classes=1000):
    with torch.device("meta"):
        return VMamba(*SIZES[size], num_classes).state_dict()


def given_names(source, converted):
    """The converted weights that are a source tensor, each filled with a number of its own from 0 up."""
    numbers = {float(i) for i in range(len(source))}
    return {
        k
        for k, v in converted.items()
        if (v == v.flatten()[0]).all() and v.flatten()[0].item() in numbers and not k.endswith("average.weight")
    }


class MoreThanWeights:
    pass


class TestReading:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (lambda path: None, "no checkpoint at"),
            (lambda path: path.mkdir(), "is a folder: name a file"),
            (lambda path: path.touch(), "truncated or not a checkpoint"),
            (lambda path: path.write_text("<html>Not found</html>"), "not a checkpoint"),
            (lambda path: torch.save([1, 2], path), "holds no model weights"),
            (lambda path: torch.save({}, path), "holds no model weights"),
            (lambda path: torch.save({"epoch": 1}, path), "holds no model weights"),
            (lambda path: torch.save({"model": {1: torch.ones(1)}}, path), "holds no model weights"),
            (
                lambda path: torch.save({"model": {}, "c": MoreThanWeights()}, path),
                "more than weights .*MoreThanWeights",
            ),
        ],
        ids=["absent", "folder", "empty", "text", "list", "no keys", "no weights", "numbers as keys", "pickle"],
    )
    def test_bad_files_get_one_clear_error(self, content, message, tmp_path):
        path = tmp_path / "file.pth"
        content(path)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            read_state_dict(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
    @pytest.mark.parametrize("kind", ["pth", "safetensors"])
    def test_truncated(self, model, tmp_path, share, kind):
        path = tmp_path / f"file.{kind}"
        if kind == "pth":
            save_checkpoint(model.state_dict(), path)
        else:
            from safetensors.torch import save_file

            save_file(model.state_dict(), path)
            assert equal(read_state_dict(path), model.state_dict())
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match="truncated or not a checkpoint"):
            read_checkpoint(path)

    def test_a_changed_bit_does_not_go_unnoticed(self, model, tmp_path):
        path = tmp_path / "file.pth"
        save_checkpoint({"state_dict": model.state_dict()}, path)
        data, noticed = path.read_bytes(), 0
        for position in np.random.default_rng(0).integers(0, 8 * len(data), 60):
            changed = bytearray(data)
            changed[position // 8] ^= 1 << position % 8
            path.write_bytes(changed)
            try:  # but for the archive's padding and dates
                assert equal(read_checkpoint(path)["state_dict"], model.state_dict())
            except ValueError as error:
                assert "damaged" in str(error) and "\n" not in str(error)
                noticed += 1
        assert noticed > 40

    @pytest.mark.parametrize("suffix", ["pth", "npz", "png", "safetensors"])
    @pytest.mark.parametrize("content", ["empty", "text", "npz", "png", "pickle", "TorchScript", "no archive"])
    def test_another_file_is_told_plainly(self, content, suffix, tmp_path):
        """Not in PyTorch's words, which tell how to load it unsafely, or which byte it did not know."""
        buffer = io.BytesIO()
        if content == "npz":
            np.savez(buffer, a=np.zeros(3))
        elif content == "png":
            Image.new("RGB", (4, 4)).save(buffer, "png")
        elif content == "pickle":
            pickle.dump(datetime.date(2000, 1, 1), buffer, protocol=0)
        elif content == "TorchScript":
            with zipfile.ZipFile(buffer, "w") as archive:
                for part in ("data", "constants"):
                    archive.writestr(f"module/{part}.pkl", "")
        else:
            buffer.write({"empty": b"", "text": b"weights? no.\n", "no archive": b"PK\3\4 and no more"}[content])
        path = tmp_path / f"file.{suffix}"
        path.write_bytes(buffer.getvalue())
        with pytest.raises(ValueError, match=r"truncated or not a checkpoint \([a-zA-Z:,. ]+\); copy") as error:
            read_checkpoint(path)
        assert not re.search("weights_only|allow_pickle|PyTorch|deserial", str(error.value))

    def test_files_without_checksums(self, model, tmp_path):
        torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(model.state_dict(), tmp_path / "new.pth")
        finally:
            torch.serialization.set_crc32_options(True)
        for name in ("old.pth", "new.pth"):
            assert equal(read_state_dict(tmp_path / name), model.state_dict())

    @pytest.mark.parametrize("name", ["file.pth", "the bee's $HOME.pth"])
    def test_the_remedy_for_a_pickle_works(self, name, tmp_path):
        weights = {"model": {"a": torch.ones(2)}, "model_ema": {"a": torch.zeros(2)}}
        torch.save({**weights, "config": collections.Counter({"unsafe": collections.deque()})}, tmp_path / name)
        follow_the_remedy(tmp_path / name)
        assert read_checkpoint(tmp_path / "weights.pth").keys() == weights.keys()

    @pytest.mark.parametrize("key", [None, "model", "model_ema"])
    def test_the_remedy_for_a_whole_model_works(self, model, key, tmp_path):
        torch.save(model if key is None else {key: model, "epoch": 3}, tmp_path / "file.pth")
        follow_the_remedy(tmp_path / "file.pth")
        assert equal(read_state_dict(tmp_path / "weights.pth"), model.state_dict())

    @pytest.mark.parametrize("key", ["state_dict", "model", None])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
    def test_wrappers_prefixes(self, model, tmp_path, key, prefix):
        weights = {prefix + k: v for k, v in model.state_dict().items()}
        torch.save({key: weights, "epoch": 1} if key else weights, tmp_path / "file.pth")
        assert equal(read_state_dict(tmp_path / "file.pth"), model.state_dict())

    @pytest.mark.parametrize("ema_key", ["state_dict_ema", "model_ema"])
    def test_ema(self, tmp_path, ema_key):
        torch.save({"state_dict": {"a": torch.zeros(1)}, ema_key: {"a": torch.ones(1)}}, tmp_path / "file.pth")
        assert read_state_dict(tmp_path / "file.pth")["a"] == 1
        assert read_state_dict(tmp_path / "file.pth", use_ema=False)["a"] == 0
        torch.save({"state_dict": {"a": torch.zeros(1)}, ema_key: None}, tmp_path / "file.pth")
        assert read_state_dict(tmp_path / "file.pth")["a"] == 0


class TestLoading:
    @pytest.fixture
    def path(self, model, tmp_path):
        save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "file.pth")
        return tmp_path / "file.pth"

    def test_same_model(self, model, path):
        other = timm.create_model("test_vim2", num_classes=10).eval()
        x = images(1, 3, 32, 32)
        assert not torch.equal(other(x), model(x))
        load_weights(other, path)
        assert torch.equal(other(x), model(x))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda w: w.fill_(torch.nan), "NaN or infinite"),
            (lambda w: torch.cat((w[:-1], torch.full_like(w[-1:], -torch.inf))), "NaN or infinite"),
            (lambda w: w.long(), "int64, where the model has torch.float32"),
            (lambda w: w > 0, "bool"),
            (lambda w: w.to(torch.complex64), "complex64"),
            (lambda w: w.to(torch.float8_e4m3fn), "float8"),
            (lambda w: w.to_sparse(), "not a dense tensor"),
            (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "not a dense tensor"),
            (lambda w: w.to("meta"), "not a dense tensor"),
        ],
        ids=["nan", "inf", "integer", "bool", "complex", "float8", "sparse", "quantised", "meta"],
    )
    @pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of kinds of tensors that it gives up
    def test_weights_that_no_training_writes(self, model, path, change, words):
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        torch.save({**weights, "norm.weight": change(weights["norm.weight"])}, path)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"norm.weight .*{words}") as error:
            load_weights(model, path)
        assert "\n" not in str(error.value) and equal(model.state_dict(), before)

    def test_half_precision_weights(self, model, path):
        torch.save({k: v.bfloat16() for k, v in model.state_dict().items()}, path)
        load_weights(model, path)
        assert model.norm.weight.dtype == torch.float32

    def test_a_head_without_classes(self, model, path):
        torch.save({**model.state_dict(), "head.fc.weight": torch.tensor(1.0)}, path)
        for new_head in (False, True):
            with pytest.raises(ValueError, match=r"head\.fc\.weight, is a single number"):
                load_weights(model, path, new_head=new_head)

    def test_grey_images(self, model, path):
        grey = timm.create_model("test_vim2", num_classes=10, in_chans=1).eval()
        load_weights(grey, path)
        x = images(2, 1, 32, 32)
        torch.testing.assert_close(grey(x), model(x.expand(-1, 3, -1, -1)))
        save_checkpoint(grey.state_dict(), path)
        load_weights(timm.create_model("test_vim2", num_classes=10, in_chans=1), path)
        with pytest.raises(ValueError, match="in_chans=1"):
            load_weights(model, path)

    def test_other_classes(self, model, path):
        other = timm.create_model("test_vim2", num_classes=4)
        with pytest.raises(ValueError, match="10 classes, the model 4: create the model with num_classes=10"):
            load_weights(other, path)
        head = other.head.fc.weight.clone()
        load_weights(other, path, new_head=True)
        assert torch.equal(other.head.fc.weight, head)
        assert torch.equal(other.norm.weight, model.norm.weight)
        x = images(1, 3, 32, 32)
        assert torch.equal(other.eval().forward_features(x), model.forward_features(x))

    @pytest.mark.parametrize("classifier", [None, ("head.fc", "head.of_teacher"), []])
    def test_models_whose_config_names_no_classifier_or_stem_or_several(self, model, path, classifier):
        """As timm's distilled ones name two, and a user's own may name none."""
        other, smaller = (timm.create_model("test_vim2", num_classes=n) for n in (10, 4))
        for each in (other, smaller):
            each.pretrained_cfg |= dict(classifier=classifier, first_conv=None)
        load_weights(other, path)
        assert equal(other.state_dict(), model.state_dict())
        with pytest.raises(ValueError, match="10 classes" if classifier else r"head.fc.bias \(10,\) for \(4,\)"):
            load_weights(smaller, path)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            (dict(depths=(1, 1, 1, 1)), "unexpected"),
            (dict(depths=(1, 1, 3, 1)), "missing"),
            (dict(d_state=8), "of another shape"),
            (dict(patch_size=8), r"of another shape \(such as patch_embed.proj.weight"),
        ],
    )
    def test_another_architecture(self, path, kwargs, message):
        other = timm.create_model("test_vim2", num_classes=10, **kwargs)
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(ValueError, match=f"another architecture than test_vim2.*{message}"):
            load_weights(other, path)
        assert equal(other.state_dict(), before)

    def test_another_family(self, model, tmp_path):
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "file.pth")
        with pytest.raises(ValueError, match="another architecture"):
            load_weights(timm.create_model("test_vim2", num_classes=0), tmp_path / "file.pth")


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "file.pth"
    save_checkpoint({"a": torch.zeros(1)}, path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"Could not write .*file.pth \(No space left on device\).*unchanged"):
        save_checkpoint({"a": torch.ones(1)}, path)
    assert read_checkpoint(path)["a"] == 0
    assert list(tmp_path.iterdir()) == [path]


class TestHalfPrecision:
    def test_it_is_read_as_float32_and_half_as_large(self, model, tmp_path):
        path = tmp_path / "half.safetensors"
        state = {**model.state_dict(), "again": model.head.fc.weight.detach().t(), "count": torch.tensor(3)}
        save_half_precision(state, path)
        read = read_checkpoint(path)
        assert read["again"].dtype == torch.float16 and torch.equal(read["again"], read["head.fc.weight"].t())
        assert read.pop("count") == 3 and read.pop("again") is not None
        save_half_precision(read, path)
        save_checkpoint(model.state_dict(), tmp_path / "full.pth")
        assert path.stat().st_size < 0.55 * (tmp_path / "full.pth").stat().st_size
        load_weights(model, path)
        assert model.head.fc.weight.dtype == torch.float32
        assert all(torch.equal(value.half(), read[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
    def test_what_it_cannot_hold_is_refused_and_the_old_file_kept(self, value, tmp_path):
        path = tmp_path / "half.safetensors"
        path.write_bytes(b"old")
        with pytest.raises(ValueError, match=r"^head holds values that half precision cannot"):
            save_half_precision({"stem": torch.ones(2), "head": torch.tensor([1.0, value])}, path)
        assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
