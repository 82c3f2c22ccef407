_base_ = [
    "./_base_/models/upernet_vim2.py",
    "./_base_/datasets/camvid.py",
    "./_base_/schedules/adamw_4k.py",
    "mmseg::_base_/default_runtime.py",
]

model = dict(
    data_preprocessor=dict(size=(352, 480)),
    backbone=dict(arch="nano", drop_path_rate=0.1),
    decode_head=dict(in_channels=[48, 96, 192, 320], num_classes=11),
    auxiliary_head=dict(in_channels=192, num_classes=11),
)
