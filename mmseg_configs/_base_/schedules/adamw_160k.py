_base_ = "mmseg::_base_/schedules/schedule_160k.py"

# AdamW with 6e-5 and batches of 16 are the paper's; the rest is VMamba's, which is Swin's.
optimizer = dict(_delete_=True, type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)
optim_wrapper = dict(
    optimizer=optimizer,
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
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]

auto_scale_lr = dict(enable=False, base_batch_size=16)
