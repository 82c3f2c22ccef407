_base_ = "mmdet::_base_/schedules/schedule_1x.py"

# AdamW with 1e-4 is the paper's; the rest is VMamba's, which is Swin's.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # VMamba exempts norms here, and in classification also the scans' parameters; averaging weights start from 1
    paramwise_cfg=dict(
        custom_keys={
            "norm": dict(decay_mult=0.0),
            "A_log": dict(decay_mult=0.0),
            "s6.D": dict(decay_mult=0.0),
            "dt_proj_bias": dict(decay_mult=0.0),
            "average": dict(decay_mult=0.0),
        }
    ),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
