_base_ = "./vim2-nano_upernet_1xb8-4k_camvid-352x480.py"

model = dict(
    backbone=dict(arch="tiny"),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
