# The baseline: a ResNet-50 from scratch, hence with batch norms that learn
_base_ = "./mask-rcnn_vim2-nano_fpn_24e_nuclei.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="ResNet",
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        style="pytorch",
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
