_base_ = "./mask-rcnn_vim2-tiny_fpn_ms-3x_coco.py"

model = dict(backbone=dict(arch="base"), neck=dict(in_channels=[128, 256, 512, 1024]))
