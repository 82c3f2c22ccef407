#!/usr/bin/env bash
# Measures the tables of docs/benchmarks.md that one GPU gives, with nothing else at work on it. Each becomes a file
# NAME.md of FOLDER; those that are there are left as they are, so that the same command goes on where it was stopped.
# Usage: tools/benchmarks/gpu_tables.sh FOLDER [NAME ...]
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n 's/^# Usage/usage/p' "$0" >&2
    exit 2
fi
mkdir -p "$1"
FOLDER="$(cd "$1" && pwd)"
NAMES=" ${*:2} "
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
SWIN=timm:swin_tiny_patch4_window7_224
VIM2="vim2_nano vim2_tiny vim2_tiny_d1 vim2_nano_token_d1 vim2_tiny_token_d1"

bench() { table "$1" benchmark.py "${@:2}" --amp bf16; }

# Each table: its name, and the tool and arguments that print it
tables() {
    # images a second, and training's memory
    bench models --model $VIM2 --compare $SWIN timm:convnext_tiny --batch-size 128
    # what launching kernels costs the host: launches, its time and the device's, models in turn; and that over states
    bench launches --launches --model $VIM2 --compare $SWIN --batch-size 1 8 128
    bench launches-128 --launches --train --model vim2_nano --compare $SWIN --img-size 128 --batch-size 128 --warmup 8 \
        --repeats 30
    bench states --launches --infer --model vim2_tiny:d_state={1,4,8,16} --batch-size 128
    # where the time goes, with each operator's floor, and what training keeps for the backward pass
    bench profile --profile --model vim2_tiny --batch-size 128
    bench scans --ops --batch-size 128
    # one large image, and as many pixels of several sizes
    bench large --model vim2_tiny vim2_tiny_d1 --compare $SWIN --img-size 1024 --batch-size 1 --infer --repeats 100
    bench pixels --model vim2_tiny --compare $SWIN --img-size 224 384 512 768 1024 --batch-size 128 --same-pixels \
        --infer --plot --output "$FOLDER/pixels"
    # what is compiled, and how long that takes at first
    bench first-step --first-step --model vim2_tiny_d1 vim2_tiny
    bench compiled --model vim2_tiny vim2_tiny_d1 --compare $SWIN --batch-size 128 --torchcompile
    TORCHINDUCTOR_FREEZING=1 bench compiled-latency --model vim2_tiny vim2_tiny_d1 --compare $SWIN --batch-size 1 \
        --infer --torchcompile --torchcompile-mode reduce-overhead --repeats 100
    bench compilations --compilations --batch-size 4 6
    bench compilations-compiled --compilations --batch-size 4 --infer --torchcompile
    # whole detectors and segmenters
    table detectors benchmarks/mm.py mmdet_configs/mask-rcnn_vim2-tiny_fpn_1x_coco.py \
        mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py \
        --shape 800 1344 --batch-size 4 --repeats 20 --amp bf16
    table segmenters benchmarks/mm.py mmseg_configs/vim2-tiny_upernet_8xb2-160k_ade20k-512x512.py \
        mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py \
        mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py --shape 512 512 --batch-size 16 --repeats 20 --amp bf16
    # epochs of TSM2's committees, and one TSM2's step over variates and lookback
    table committee benchmarks/forecast.py --names ETTh1 --share 0.5 --variates --lookbacks --output "$FOLDER/committee"
    table committees benchmarks/forecast.py --names Weather "207 sensors" --share 0.05 --variates --lookbacks \
        --output "$FOLDER/committees"
    table tsm2-scaling benchmarks/forecast.py --names --repeats 30 --output "$FOLDER/tsm2-scaling"
}

KNOWN=" "
table() { KNOWN+="$1 "; }
tables
for name in "${@:2}"; do
    if [[ $KNOWN != *" $name "* ]]; then
        echo "there is no table $name, of:$KNOWN" >&2
        exit 2
    fi
done

FAILED=""
table() {
    local name=$1 tool=$2 code=0
    if [[ $NAMES != "  " && $NAMES != *" $name "* ]] || [ -e "$FOLDER/$name.md" ]; then
        return
    fi
    echo "$(date +%T) $name"
    "${PYTHON:-python}" "tools/$tool" "${@:3}" > "$FOLDER/$name.part" 2> "$FOLDER/$name.log" || code=$?
    if [ $code = 0 ]; then
        mv "$FOLDER/$name.part" "$FOLDER/$name.md"
    elif [ $code = 130 ]; then  # Ctrl-C, by the tool's own word: it does not end of the signal, of which bash would, too
        exit 130
    else
        FAILED+=" $name"
        tail -n 1 "$FOLDER/$name.log" >&2
    fi
}
tables
if [ -n "$FAILED" ]; then
    echo "not measured:$FAILED (their NAME.log says why; the same command tries again)" >&2
    exit 1
fi
