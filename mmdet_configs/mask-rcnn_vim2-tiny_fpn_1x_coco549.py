_base_ = [
    "./_base_/models/mask-rcnn_vim2_fpn.py",
    "./_base_/datasets/coco549_instance.py",
    "./_base_/schedules/adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]

# 22 steps an epoch
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
train_dataloader = dict(batch_size=16)
