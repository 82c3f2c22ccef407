"""Annotations that do not fit the config: one line before training, and none for those that do."""

import json

import numpy as np
import pytest
from mm_helpers import SIDE, call, make_data, write_config
from PIL import Image

from vim2.command.errors import UserError
from vim2.mm import annotations
from vim2.mm.commands import train


@pytest.fixture
def own_data(tmp_path):
    return make_data(tmp_path / "data")


@pytest.fixture
def complaint(tmp_path, own_data):
    """What training says of the data."""

    def complain(kind, *options, extra=""):
        config = write_config(tmp_path / "config.py", kind, own_data, extra=extra)
        argv = ["--cfg-options", *options] if options else []
        with pytest.raises(UserError) as error:
            call(train, config, "--work-dir", tmp_path / "run", *argv)
        assert len(str(error.value).splitlines()) == 1
        return str(error.value)

    return complain


@pytest.fixture
def edit(own_data):
    """Changes the COCO file."""

    def change(function):
        path = own_data / "instances.json"
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))

    return change


class TestCategories:
    @pytest.mark.parametrize("name", ["Disc", "DISC ", "dis-c"])
    def test_spelt_otherwise(self, name, edit, complaint):
        edit(lambda content: content["categories"][1].update(name=name))
        assert f"the class 'disc' of the config is the category {name!r} in" in " ".join(complaint("mmdet").split())

    def test_missing(self, edit, complaint):
        edit(lambda content: content["categories"].pop())
        assert "no category for the class 'disc' of the config; its categories are box" in complaint("mmdet")

    def test_in_another_order(self, edit, complaint):
        """Which would give every class the other's name."""
        edit(lambda content: content["categories"].reverse())
        assert "must be in the order of the categories" in complaint("mmdet")

    def test_the_data_for_validation_are_looked_at_as_well(self, own_data, edit, complaint):
        (own_data / "train.json").write_text((own_data / "instances.json").read_text())
        edit(lambda content: content["categories"][1].update(name="Disc"))
        text = complaint("mmdet", "train_dataloader.dataset.ann_file=train.json")
        assert text.startswith("val_dataloader: the class 'disc'")

    def test_heads_for_another_number_of_classes(self, complaint):
        text = complaint("mmdet", "model.roi_head.bbox_head.num_classes=80")
        assert "model.roi_head.bbox_head.num_classes is 80, and the data have 2 classes (box, disc)" in text
        assert "model.decode_head.num_classes is 3" in complaint("mmseg", "model.decode_head.num_classes=3")

    def test_one_without_a_comma(self, complaint):
        """("box") is no tuple."""
        extra = "train_dataloader['dataset']['metainfo'] = dict(classes=('box'))\n"
        assert "metainfo.classes is the text 'box': write a tuple, ('box',)." in complaint("mmdet", extra=extra)

    def test_an_rpn_alone_learns_no_classes(self, own_data, tmp_path):
        extra = """
model = dict(
    type="RPN",
    neck=model["neck"],
    rpn_head=model["rpn_head"],
    backbone=model["backbone"],
    train_cfg=dict(rpn_proposal=dict(_delete_=True)),
    roi_head=None,
)
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader["dataset"]["pipeline"][1] = dict(type="LoadAnnotations", with_bbox=True)
val_cfg = val_evaluator = val_dataloader = None
"""
        config = write_config(tmp_path / "rpn.py", "mmdet", own_data, extra=extra)
        call(train, config, "--work-dir", tmp_path / "run")

    def test_a_file_is_not_read_whole_for_them(self, tmp_path):
        path = tmp_path / "instances.json"
        path.write_text(
            '{"info": {"note": "\\"categories\\": none"}, "categories" : [{"id": 7, "name": "a"}], "rest": '
        )
        assert annotations._read_categories(path) == [{"id": 7, "name": "a"}]


class TestMasks:
    def test_one_is_missing(self, edit, complaint):
        edit(lambda content: content["annotations"][3].pop("segmentation"))
        assert "images/1.png has a box and no mask" in complaint("mmdet")

    @pytest.mark.parametrize(
        "mask",
        [
            [[1, 1, 2, 2]],
            [[5, 5, 9, 9, 5, 5]],
            dict(size=[SIDE, SIDE], counts=[SIDE * SIDE]),
            dict(size=[SIDE, SIDE], counts="PP4"),
        ],
    )
    def test_all_are_empty(self, mask, edit, complaint):
        def empty(content):
            for annotation in content["annotations"]:
                annotation["segmentation"] = mask

        edit(empty)
        assert "of all 8 objects in the 4 images looked at are empty" in complaint("mmdet")

    def test_a_detector_of_boxes_needs_none(self, tmp_path, own_data, edit):
        def remove(content):
            for annotation in content["annotations"]:
                del annotation["segmentation"]

        edit(remove)
        extra = """
model.update(type="FasterRCNN")
model["roi_head"].update(mask_roi_extractor=None, mask_head=None)
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader["dataset"]["pipeline"][1] = dict(type="LoadAnnotations", with_bbox=True)
val_cfg = val_evaluator = val_dataloader = None
"""
        call(train, write_config(tmp_path / "boxes.py", "mmdet", own_data, extra=extra), "--work-dir", tmp_path / "run")


class TestLabelMaps:
    def save(self, data, values, mode=None, names=("2.png",)):
        for name in names:
            Image.fromarray(values, mode).save(data / "maps" / name)

    def labels(self, value):
        labels = np.zeros((SIDE, SIDE), np.uint8)
        labels[:8] = value
        return labels

    def test_in_colour(self, own_data, complaint):
        self.save(own_data, np.zeros((SIDE, SIDE, 3), np.uint8))
        assert "maps/2.png is in colour" in complaint("mmseg")

    def test_a_value_that_is_no_class(self, own_data, complaint):
        self.save(own_data, self.labels(2))
        assert "maps/2.png holds 2, and the model has the classes 0 to 1" in complaint("mmseg")

    def test_a_value_that_8_bits_do_not_hold(self, own_data, complaint):
        """Cut to them, 256 would be 0."""
        self.save(own_data, self.labels(1).astype(np.uint16) * 256)
        assert "maps/2.png holds 256" in complaint("mmseg")

    def test_foreground_at_255(self, own_data, complaint):
        """Which is what is ignored."""
        self.save(own_data, self.labels(255), names=[f"{i}.png" for i in range(4)])
        assert "the 4 label maps looked at hold the class 0 alone, and 255" in complaint("mmseg")

    def test_another_size_than_the_image(self, own_data, complaint):
        self.save(own_data, self.labels(1)[:32])
        assert "maps/2.png has 64 x 32 pixels" in complaint("mmseg")

    def test_missing_and_broken(self, own_data, complaint):
        (own_data / "maps" / "2.png").write_bytes(b"none")
        assert "maps/2.png cannot be read" in complaint("mmseg")
        (own_data / "maps" / "2.png").unlink()
        assert "maps/2.png cannot be read" in complaint("mmseg")


def test_large_sets_are_looked_at_by_a_sample():
    assert annotations._sample(5, 24) == [0, 1, 2, 3, 4]
    sample = annotations._sample(10**6, 24)
    assert len(set(sample)) == 24 and sample[0] == 0 and sample[-1] == 10**6 - 1
    assert annotations._sample(0, 24) == []
