# From scratch, 67 steps an epoch
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=24, val_interval=4)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=10.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, flat_decay_mult=0.0),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=24, eta_min=1e-6, convert_to_iter_based=True),
]

auto_scale_lr = dict(enable=False, base_batch_size=8)
