_base_ = [
    "./_base_/models/upernet_vim2.py",
    "./_base_/datasets/coco549_semantic.py",
    "./_base_/schedules/adamw_4k.py",
    "mmseg::_base_/default_runtime.py",
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(drop_path_rate=0.1),
    decode_head=dict(num_classes=133),
    auxiliary_head=dict(num_classes=133),
)
