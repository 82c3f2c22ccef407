# 549 images of COCO 2017 with all 80 classes: python tools/prepare_data.py coco549 DOWNLOADS
_base_ = "mmdet::_base_/datasets/coco_instance.py"

data_root = "data/coco549/"

train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
