_base_ = [
    "./_base_/models/upernet_vim2.py",
    "mmseg::_base_/datasets/ade20k.py",
    "./_base_/schedules/adamw_160k.py",
    "mmseg::_base_/default_runtime.py",
]

model = dict(data_preprocessor=dict(size=(512, 512)))
train_dataloader = dict(batch_size=2)  # on 8 GPUs
