_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"

custom_imports = dict(imports=["vim2.mm", "vim2.mm.lazy_masks"], allow_failed_imports=False)

# Stochastic depth is VMamba's for all sizes. For weights to start from: backbone.init_cfg, see the README.
model = dict(
    backbone=dict(_delete_=True, type="ViM2", arch="tiny", out_indices=(0, 1, 2, 3), drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
