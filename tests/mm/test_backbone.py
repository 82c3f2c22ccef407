"""ViM2 as a backbone of MMEngine: its maps, its options, freezing, checkpoints and layer-wise learning rates."""

import pytest
import timm
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from timm.layers import DropPath
from torch import nn

import vim2.mm
from vim2.command.errors import UserError

TINY = dict(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), d_state=4, channel_patch=8)  # test_vim2 of timm


def build(**kwargs):
    torch.manual_seed(0)
    return MODELS.build(dict(type="ViM2", **{"arch": TINY, **kwargs}))


def image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_one_registration_serves_every_library():
    from mmdet.registry import MODELS as detection
    from mmseg.registry import MODELS as segmentation

    for registry in (MODELS, detection, segmentation):
        assert registry.get("ViM2") is vim2.mm.ViM2


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (0,)], ids=str)
def test_maps_are_the_normalised_stages(out_indices):
    backbone = build(out_indices=out_indices).eval()
    x = image(2, 3, 65, 97)
    outs = backbone(x)
    y, expected = backbone.patch_embed(x), []
    for i, stage in enumerate(backbone.stages):
        y = stage(y)
        if i in out_indices:
            expected.append(getattr(backbone, f"norm{i}")(y).permute(0, 3, 1, 2))
    assert isinstance(outs, tuple) and all(out.is_contiguous() for out in outs)
    torch.testing.assert_close(outs, tuple(expected))
    sizes = ((16, 24), (8, 12), (4, 6), (2, 3))
    assert [out.shape for out in outs] == [(2, TINY["dims"][i], *sizes[i]) for i in out_indices]


def test_stages_that_nobody_reads_are_left_out():
    backbone = build(out_indices=(0, 1))
    assert len(backbone.stages) == 2 and not any("stages.2" in name for name in backbone.state_dict())


@pytest.mark.parametrize("arch", ["tiny", "vim2_tiny", dict(depths=(1, 1, 3, 1), dims=(96, 192, 384, 768))], ids=str)
def test_arch_by_name_or_by_widths(arch):
    with torch.device("meta"):
        ours, theirs = build(arch=arch), timm.create_model("vim2_tiny", num_classes=0)
    names = {name: value.shape for name, value in ours.state_dict().items() if not name.startswith("norm")}
    assert names == {name: value.shape for name, value in theirs.state_dict().items() if not name.startswith("norm")}


def test_options_of_the_model_are_options_here():
    backbone = build(arch="nano", depths=(1, 1, 1, 1), channel_mixer="mlp", in_chans=4)
    assert [len(stage.blocks) for stage in backbone.stages] == [1, 1, 1, 1]
    assert len(backbone(image(1, 4, 32, 32))) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(arch="huge"), "no ViM2 of arch 'huge'; arch is one of base, .*tiny"),
        (dict(arch=dict(depths=(1, 1, 1, 1))), "dims is missing"),
        (dict(num_heads=3), "no option 'num_heads'"),
        (dict(out_indices=(0, 4)), r"within 0 to 3, got \(0, 4\)"),
        (dict(out_indices=(1, 0)), "in rising order"),
        (dict(out_indices=()), "in rising order"),
        (dict(out_indices=3), "a sequence of stages"),
        (dict(frozen_stages=5), "within -1 to 4, got 5"),
        (dict(arch="nano", dims=(8, 16)), "must have a value a stage"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_images():
    with pytest.raises(ValueError, match="at least 32 x 32, got 16 x 64"):
        build()(image(1, 3, 16, 64))


def test_recomputing_blocks_changes_no_gradient():
    gradients = []
    for with_cp in (False, True):
        backbone = build(with_cp=with_cp)
        assert all(stage.grad_checkpointing == with_cp for stage in backbone.stages)
        sum(out.square().mean() for out in backbone(image(1, 3, 64, 64))).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
def test_frozen_stages_neither_train_nor_drop_paths(frozen_stages):
    backbone = build(frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    for name, parameter in backbone.named_parameters():
        first, second = name.split(".")[:2]
        stage = -1 if first == "patch_embed" else int(second if first == "stages" else first.removeprefix("norm"))
        assert parameter.requires_grad == (stage >= frozen_stages), name
    for i, stage in enumerate(backbone.stages):
        dropping = [m for m in stage.modules() if isinstance(m, DropPath)]
        assert dropping or i == 0
        assert all(m.training == (i >= frozen_stages) for m in dropping)


def test_drop_path_rates_rise():
    rates = [m.drop_prob for m in build(drop_path_rate=0.3).modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.3)


def test_norm_eval_keeps_batch_norms_in_evaluation_mode():
    backbone = build(norm_eval=True)
    backbone.extra = nn.BatchNorm2d(3)
    assert not backbone.train().extra.training and backbone.stages.training


class TestWeights:
    @pytest.fixture
    def classifier(self):
        torch.manual_seed(1)
        return timm.create_model("test_vim2", num_classes=10)

    def loaded(self, path, **kwargs):
        backbone = build(init_cfg=dict(type="Pretrained", checkpoint=str(path)), **kwargs)
        backbone.init_weights()
        return backbone.eval()

    @pytest.mark.parametrize("form", ["state dict", "classify.py", "mmengine", "safetensors"])
    def test_checkpoints_of_every_origin(self, classifier, tmp_path, form):
        weights, path = classifier.state_dict(), tmp_path / "weights.pth"
        if form == "safetensors":
            from safetensors.torch import save_file

            path = tmp_path / "weights.safetensors"
            save_file(weights, path)
        elif form == "classify.py":
            torch.save({"arch": "test_vim2", "state_dict": weights}, path)
        elif form == "mmengine":
            weights = {f"backbone.{k}": v for k, v in weights.items() if not k.startswith(("head", "norm"))}
            torch.save({"state_dict": {**weights, "neck.weight": torch.ones(3)}, "meta": {"epoch": 1}}, path)
        else:
            torch.save(weights, path)
        backbone = self.loaded(path)
        x = image(1, 3, 64, 64)
        final, maps = classifier.eval().forward_intermediates(x, output_fmt="NHWC")
        expected = [nn.functional.layer_norm(y, y.shape[-1:]).permute(0, 3, 1, 2) for y in maps]
        if form != "mmengine":
            expected[-1] = final.permute(0, 3, 1, 2)  # the classifier's own final norm
        torch.testing.assert_close(backbone(x), tuple(expected))

    def test_of_converted_vmamba(self, tmp_path):
        from vmamba_reference import vanilla_vmamba

        from vim2.checkpoints import convert_vmamba

        vmamba = vanilla_vmamba("tiny").state_dict()
        torch.save({"model": vmamba}, tmp_path / "vmamba.pth")
        with pytest.raises(UserError, match=r"weights of a VMamba; convert them first: vim2 convert"):
            self.loaded(tmp_path / "vmamba.pth", arch="tiny_vmamba")
        name, converted = convert_vmamba(vmamba)
        torch.save({"arch": name, "state_dict": converted}, tmp_path / "vim2.pth")
        backbone = self.loaded(tmp_path / "vim2.pth", arch="tiny_vmamba")
        assert torch.equal(backbone.stages[3].blocks[0].layers[0].norm.weight, vmamba["layers.3.blocks.0.norm.weight"])

    def test_after_other_initialisations(self, classifier, tmp_path):
        torch.save(classifier.state_dict(), tmp_path / "weights.pth")
        others = dict(type="Constant", layer=["Linear", "LayerNorm"], val=7.0)
        backbone = build(init_cfg=[dict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth")), others])
        backbone.init_weights()
        assert (backbone.norm0.weight == 7).all()  # which the classifier has not
        torch.testing.assert_close(backbone.norm3.weight, classifier.norm.weight)
        for name in ("stages.0.blocks.0.layers.0.mixer.in_proj.weight", "patch_embed.norm.weight"):
            torch.testing.assert_close(backbone.state_dict()[name], classifier.state_dict()[name])

    def test_fewer_stages_and_other_channels(self, classifier, tmp_path):
        torch.save(classifier.state_dict(), tmp_path / "weights.pth")
        backbone = self.loaded(tmp_path / "weights.pth", out_indices=(0, 1), in_chans=1)
        stem = classifier.patch_embed.proj.weight.sum(1, keepdim=True)
        torch.testing.assert_close(backbone.patch_embed.proj.weight, stem)

    def test_of_a_web_address(self, classifier):
        from mmengine.runner import CheckpointLoader

        def load(address, map_location):
            assert address == "shop://weights.pth"
            return {"state_dict": classifier.state_dict()}

        CheckpointLoader.register_scheme("shop://", load)
        backbone = self.loaded("shop://weights.pth")
        assert torch.equal(backbone.patch_embed.proj.weight, classifier.patch_embed.proj.weight)

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(arch="nano"), r"of arch 'nano': .*another shape, such as norm3\.bias \(48,\) for \(320,\)"),
            (dict(arch={**TINY, "depths": (1, 1, 3, 1)}), r"weights are missing, such as stages\.2\.blocks\.2"),
            (dict(channel_mixer="none"), r"weights are unexpected, such as stages\.0\.blocks\.0\.layers\.2"),
        ],
    )
    def test_of_another_architecture(self, classifier, tmp_path, options, message):
        torch.save(classifier.state_dict(), tmp_path / "weights.pth")
        with pytest.raises(UserError, match=message):
            self.loaded(tmp_path / "weights.pth", **options)

    def test_within_another_model(self, classifier, tmp_path):
        """As Lightning has them."""
        path = tmp_path / "weights.pth"
        torch.save({f"net.model.{name}": value for name, value in classifier.state_dict().items()}, path)
        with pytest.raises(UserError, match=r"names begin with 'net\.model\.': set init_cfg\.prefix to that"):
            self.loaded(path)
        backbone = build(init_cfg=dict(type="Pretrained", checkpoint=str(path), prefix="net.model."))
        backbone.init_weights()
        assert torch.equal(backbone.patch_embed.proj.weight, classifier.patch_embed.proj.weight)

    def test_no_file_and_a_damaged_one(self, tmp_path):
        with pytest.raises(UserError, match="no checkpoint at"):
            self.loaded(tmp_path / "none.pth")
        (tmp_path / "damaged.pth").write_bytes(b"PK\3\4 and then nothing")
        with pytest.raises(UserError, match="truncated or not a checkpoint"):
            self.loaded(tmp_path / "damaged.pth")

    def test_weights_that_no_training_writes(self, classifier, tmp_path):
        weights = classifier.state_dict()
        weights["patch_embed.norm.weight"] = weights["patch_embed.norm.weight"].index_fill(
            0, torch.tensor(1), torch.nan
        )
        torch.save(weights, tmp_path / "nan.pth")
        with pytest.raises(UserError, match=r"patch_embed\.norm\.weight holds NaN"):
            self.loaded(tmp_path / "nan.pth")

    def test_nothing_at_an_address(self):
        with pytest.raises(UserError, match=r"Nothing can be loaded from http://127\.0\.0\.1:9/weights\.pth; check"):
            self.loaded("http://127.0.0.1:9/weights.pth")


class TestLayerDecay:
    class Model(nn.Module):
        def __init__(self, **kwargs):
            super().__init__()
            self.backbone = build(**kwargs)
            self.head = nn.Linear(4, 2)

    def wrapper(self, model, **paramwise_cfg):
        optimizer = dict(type="AdamW", lr=1.0, weight_decay=0.1)
        constructor = "ViM2LayerDecayOptimWrapperConstructor"
        return build_optim_wrapper(
            model, dict(constructor=constructor, optimizer=optimizer, paramwise_cfg=paramwise_cfg)
        )

    def test_rates_fall_towards_the_stem_and_vectors_do_not_decay(self):
        model = self.Model()
        groups = self.wrapper(model, layer_decay_rate=0.5).optimizer.param_groups
        of = {p: group for group in groups for p in group["params"]}
        assert len(of) == len(list(model.parameters()))
        names = {name: of[p] for name, p in model.named_parameters()}
        # stem 0, five blocks 1 to 5, of which the last with the output norms, heads 6
        assert names["head.weight"]["lr"] == 1
        assert names["backbone.norm0.weight"]["lr"] == 0.5
        assert names["backbone.stages.3.blocks.0.layers.0.mixer.in_proj.weight"]["lr"] == 0.5
        assert names["backbone.stages.2.downsample.reduction.weight"]["lr"] == 0.5**3
        assert names["backbone.stages.0.blocks.0.layers.0.mixer.in_proj.weight"]["lr"] == 0.5**5
        assert names["backbone.patch_embed.proj.weight"]["lr"] == 0.5**6
        undecayed = {name for name, group in names.items() if group["weight_decay"] == 0}
        assert {"head.bias", "backbone.stages.0.average.weight", "backbone.norm0.weight"} <= undecayed
        assert any(name.endswith("A_log") for name in undecayed)
        assert not any(name.endswith(("proj.weight", "proj_weight")) for name in undecayed)

    def test_frozen_parameters_are_left_out(self):
        groups = self.wrapper(self.Model(frozen_stages=4), layer_decay_rate=0.5).optimizer.param_groups
        assert {group["lr"] for group in groups} == {1.0}

    @pytest.mark.parametrize(
        "cfg, message",
        [
            (dict(layer_decay_rate=0.0), r"within \(0, 1\], got 0"),
            (dict(layer_decay_rate=0.5, num_layers=12), "layer_decay_rate alone"),
        ],
    )
    def test_bad_settings(self, cfg, message):
        with pytest.raises(ValueError, match=message):
            self.wrapper(self.Model(), **cfg)

    def test_another_backbone(self):
        model = nn.Module()
        model.backbone = nn.Linear(1, 1)
        with pytest.raises(ValueError, match="Linear, which does not tell its layers"):
            self.wrapper(model, layer_decay_rate=0.5)
