# 664 images with 28,986 nuclei, one class: python tools/prepare_data.py nuclei DOWNLOADS
dataset_type = "CocoDataset"
data_root = "data/nuclei/"
metainfo = dict(classes=("nucleus",), palette=[(220, 20, 60)])

# Images are 256 to 1388 pixels wide, and the median nucleus 20: crops are shown at twice their size.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    # of vim2.mm.lazy_masks, which decodes the masks that the crop keeps alone
    dict(type="LoadAnnotationsLazily", with_bbox=True, with_mask=True),
    dict(type="RandomCrop", crop_size=(256, 256), allow_negative_crop=True),
    dict(type="Resize", scale=(512, 512), keep_ratio=True),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale_factor=2.0, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]

train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="AspectRatioBatchSampler"),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="images/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="images/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

# COCO's AP looks at 100 detections an image; 10 % of these images hold more nuclei.
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/instances_val.json", metric=["bbox", "segm"])
test_evaluator = val_evaluator
