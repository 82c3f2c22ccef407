# The baseline: a ResNet-50 from scratch
_base_ = [
    "mmseg::_base_/models/upernet_r50.py",
    "./_base_/datasets/camvid.py",
    "./_base_/schedules/adamw_4k.py",
    "mmseg::_base_/default_runtime.py",
]

model = dict(
    data_preprocessor=dict(size=(352, 480)),
    pretrained=None,
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
