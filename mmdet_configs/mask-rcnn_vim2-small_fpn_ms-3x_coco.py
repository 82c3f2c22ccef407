_base_ = "./mask-rcnn_vim2-tiny_fpn_ms-3x_coco.py"

model = dict(backbone=dict(arch="small"))
