_base_ = "./mask-rcnn_vim2-nano_fpn_24e_nuclei.py"

model = dict(backbone=dict(arch="tiny"), neck=dict(in_channels=[96, 192, 384, 768]))
