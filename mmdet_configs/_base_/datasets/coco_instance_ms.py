_base_ = "mmdet::_base_/datasets/coco_instance.py"

# Multi-scale training of DETR and Sparse R-CNN, which Swin and VMamba took over
scales = [(short, 1333) for short in range(480, 801, 32)]
resize = dict(type="RandomChoiceResize", scales=scales, keep_ratio=True)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [resize],
            [
                dict(type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
                dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
                resize,
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
