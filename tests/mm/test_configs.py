"""The configs: each builds, and says what the papers and the READMEs say of it."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from mm_helpers import ROOT
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

import vim2.mm  # noqa: F401
from vim2.command.errors import UserError
from vim2.mm.config_loading import load_config

CONFIGS = sorted(
    str(path.relative_to(ROOT)) for kind in ("mmdet", "mmseg") for path in ROOT.glob(f"{kind}_configs/*.py")
)
COCO = [path for path in CONFIGS if path.endswith("_coco.py")]
ADE = [path for path in CONFIGS if "ade20k" in path]


def build(config, device="meta"):
    init_default_scope(config.default_scope)
    with torch.device(device):
        return MODELS.build(config.model)


@pytest.mark.parametrize("path", CONFIGS)
def test_builds_and_its_necks_and_heads_fit(path):
    config = load_config(ROOT / path)
    model = build(config)
    image = torch.empty(1, 3, 128, 128, device="meta")
    features = model.extract_feat(image)
    assert len(features) == (5 if config.default_scope == "mmdet" else 4)
    if config.default_scope == "mmseg":
        assert model.eval().decode_head(features).shape == (1, model.decode_head.num_classes, 32, 32)
        assert model.auxiliary_head(features).shape[1] == model.auxiliary_head.num_classes
        assert model.num_classes == config.model.auxiliary_head.num_classes
    assert config.train_dataloader.batch_size * 8 == 16 or config.auto_scale_lr.base_batch_size in (8, 16)


def test_readmes_and_metafiles_name_every_config():
    for kind in ("mmdet", "mmseg"):
        folder = ROOT / f"{kind}_configs"
        names = {Path(path).name for path in CONFIGS if path.startswith(kind)}
        readme = (folder / "README.md").read_text()
        assert all(f"({name})" in readme for name in names), kind
        models = yaml.safe_load((folder / "metafile.yml").read_text())["Models"]
        assert {model["Config"] for model in models} == {f"configs/{kind}/{name}" for name in names}
        assert all(model["Name"] == Path(model["Config"]).stem for model in models)
        for model in models:
            metadata, schedule = model["Metadata"], load_config(ROOT / "vim2" / ".mim" / model["Config"]).train_cfg
            lengths = schedule.get("max_epochs"), schedule.get("max_iters")
            assert (metadata.get("Epochs"), metadata.get("Iterations")) == lengths, model["Name"]
        large = [model for model in models if model["Metadata"]["Training Data"] in ("COCO", "ADE20K")]
        assert large and not any("Weights" in model or "Results" in model for model in large)  # none has been trained


@pytest.mark.parametrize("path", COCO + ADE)
def test_optimiser_and_schedule_are_the_papers(path):
    config = load_config(ROOT / path)
    optimizer = config.optim_wrapper.optimizer
    assert optimizer.type == "AdamW" and optimizer.lr == (1e-4 if path in COCO else 6e-5)
    decay = config.param_scheduler[-1]
    if path in COCO:
        epochs = 36 if "3x" in path else 12
        assert config.train_cfg.max_epochs == decay.end == epochs
        assert decay.milestones == ([27, 33] if "3x" in path else [8, 11])
    else:
        assert config.train_cfg.max_iters == decay.end == 160000
        assert config.tta_pipeline and config.tta_model  # multi-scale testing
    assert config.auto_scale_lr.base_batch_size == 16 and config.train_dataloader.batch_size == 2


@pytest.mark.parametrize("path", [COCO[-1], ADE[-1]])
def test_weight_decay_spares_norms_scans_and_averages(path):
    config = load_config(ROOT / path)
    model = build(config)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    spared = ("norm", "A_log", "s6.D", "dt_proj_bias", "average")
    for name, parameter in model.backbone.named_parameters():
        assert (decays[id(parameter)] == 0) == any(part in name for part in spared), name


@pytest.mark.parametrize(
    "path, papers, backbone, rest",
    [
        ("mmdet_configs/mask-rcnn_vim2-tiny_fpn_1x_coco.py", 39, 23.25, 20.27),
        ("mmdet_configs/mask-rcnn_vim2-small_fpn_1x_coco.py", 62, 42.93, 20.27),
        ("mmseg_configs/vim2-tiny_upernet_8xb2-160k_ade20k-512x512.py", 51, 23.25, 32.42),
        ("mmseg_configs/vim2-small_upernet_8xb2-160k_ade20k-512x512.py", 75, 42.93, 32.42),
    ],
)
def test_parameters_beside_the_papers(path, papers, backbone, rest):
    """The paper's totals are its own backbones' 20 and 43 M and these heads; ViM2-T comes out larger, docs say why."""
    model = build(load_config(ROOT / path))
    counts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    assert counts.pop("backbone") == pytest.approx(backbone, abs=0.005)
    assert sum(counts.values()) == pytest.approx(rest, abs=0.005)
    assert rest + (20 if "tiny" in path else 43) == pytest.approx(papers, abs=1.5)


def test_multi_scale_training_is_swins():
    ours = load_config(ROOT / "mmdet_configs/mask-rcnn_vim2-tiny_fpn_ms-3x_coco.py")
    swins = load_config("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py")

    def plain(pipeline):
        return [{k: v for k, v in step.items() if k not in ("backend_args", "transforms")} for step in pipeline]

    ours, swins = (config.train_dataloader.dataset.pipeline for config in (ours, swins))
    assert plain(ours) == plain(swins)
    for mine, theirs in zip(ours[3]["transforms"], swins[3]["transforms"], strict=True):
        assert Config(dict(x=mine)).pretty_text == Config(dict(x=theirs)).pretty_text


@pytest.mark.parametrize(
    "text, message",
    [
        ("_base_ = 'mmyolo::_base_/default_runtime.py'", "mmyolo.*is not installed.*pip install"),
        (
            "_base_ = 'mmdet::_base_/none.py'",
            r"bad\.py cannot be read: file \S+none\.py.*: check its name, and its",
        ),
        ("_base_ = 'none.json'", r"bad\.py cannot be read: file \S+none\.json.*: check its name, and its"),
        ("_base_ = 'missing.py'", r"bad\.py needs \S+missing\.py, which is not there: check its _base_\.$"),
        ("model = dict(", "is no config that MMEngine can read"),
        (
            "custom_imports = dict(imports=['vim3'], allow_failed_imports=False)",
            "MMEngine can read.*vim3",
        ),
        ("default_scope = 'mmnothing'", "is for mmnothing, which is not installed"),
    ],
)
def test_bad_configs(tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text + "\n")
    with pytest.raises(UserError, match=message) as error:
        load_config(tmp_path / "bad.py")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind, config", [("mmdet", "mask-rcnn_vim2-tiny_fpn_ms-3x_coco"), ("mmseg", ADE[-1][14:-3])])
def test_reference_to_a_config_of_the_package(kind, config, tmp_path):
    """Also in the bases of another, which may take parts of it: they are still those of MMDetection and the like."""
    named = load_config(f"vim2::{kind}/{config}.py")
    assert named.filename.endswith(f"/{config}.py")  # after which MMEngine names the copy in the work dir
    assert named.to_dict() == load_config(ROOT / f"{kind}_configs/{config}.py").to_dict()
    parts = "steps = _base_.train_pipeline\nmodel = dict(backbone=dict(arch=1))\n"
    (tmp_path / "mine.py").write_text(f"_base_ = 'vim2::{kind}/{config}.py'\n{parts}")
    mine = load_config(tmp_path / "mine.py")
    assert mine.model.backbone.arch == 1 and mine.default_scope == kind
    assert {step.get("_scope_", kind) for step in mine.steps} == {kind}


@pytest.mark.parametrize("name", ["mask-rcnn_vim2-tiny_fpn_1x_coco.py", "mmdet/mask-rcnn_vim2-tiny_fpn_1x_coc.py"])
def test_reference_to_no_config(name):
    with pytest.raises(UserError, match=r"no config .* did you mean mmdet/mask-rcnn_vim2-tiny_fpn_1x_coco\.py\?$"):
        load_config(f"vim2::{name}")


@pytest.mark.parametrize("path", ["missing.py", "missing", "mmdet_configs/mask-rcnn_vim2-tiny_fpn_1x_coco.py", "."])
def test_no_config(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = "mask-rcnn_vim2-tiny_fpn_1x_coco.py" if "mask" in path else "NAME.py"
    problem = r"\. is a folder, and no config" if path == "." else f"There is no config {path}"
    with pytest.raises(UserError, match=f"^{problem}: give the path of a file, or .* vim2::mmdet/{known}\\.$"):
        load_config(path)


def test_reference_with_one_colon():
    with pytest.raises(UserError, match=r"one colon: .*two, vim2::mmdet/none\.py\.$"):
        load_config("vim2:mmdet/none.py")


def test_modules_that_options_name_are_imported(tmp_path, monkeypatch):
    """MMEngine itself imports a file's alone, and what they register would then be unknown."""
    (tmp_path / "registers_more.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    config = ROOT / "mmseg_configs/vim2-nano_upernet_1xb8-4k_camvid-352x480.py"
    load_config(config, {"custom_imports.imports": ["vim2.mm", "registers_more"]})
    assert sys.modules.pop("registers_more")
