_base_ = "./mask-rcnn_vim2-tiny_fpn_1x_coco.py"

model = dict(backbone=dict(arch="small"))
