_base_ = [
    "./_base_/models/mask-rcnn_vim2_fpn.py",
    "./_base_/datasets/nuclei_instance.py",
    "mmdet::_base_/default_runtime.py",
    "./_base_/schedules/adamw_24e_nuclei.py",
]

model = dict(
    backbone=dict(arch="nano", drop_path_rate=0.1),
    neck=dict(in_channels=[48, 96, 192, 320]),
    rpn_head=dict(anchor_generator=dict(scales=[4])),
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    test_cfg=dict(rcnn=dict(max_per_img=300)),
)

default_hooks = dict(checkpoint=dict(interval=4, max_keep_ckpts=2))
