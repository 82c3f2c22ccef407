_base_ = [
    "./_base_/models/mask-rcnn_vim2_fpn.py",
    "./_base_/datasets/coco_instance_ms.py",
    "./_base_/schedules/adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]
