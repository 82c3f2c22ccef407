"""mmcv's operators through torchvision: what mmcv documents of them, against plain restatements, on every device."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from devices import DEVICE
from mm_helpers import ROOT
from torch.nn import functional as F

import vim2.mm  # noqa: F401

from mmcv import ops  # isort: skip
from vim2.mm import operators

DEVICES = sorted({"cpu", DEVICE})
stand_in = pytest.mark.skipif(
    ops.get_compiler_version()[:4] != "none", reason="mmcv here has compiled operators, which are used instead"
)


def random(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def boxes(number, seed=0):
    corners = torch.rand(number, 2, 2, generator=torch.Generator().manual_seed(seed)) * 40
    return torch.cat((corners.amin(1), corners.amax(1) + 1), 1)


def literal_nms(boxes, scores, threshold, offset):
    """Greedy, one pair at a time."""
    kept, order = [], scores.argsort(descending=True).tolist()
    for i in order:
        if all(literal_iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def literal_iou(a, b, offset=0):
    w = min(a[2], b[2]) - max(a[0], b[0]) + offset
    h = min(a[3], b[3]) - max(a[1], b[1]) + offset
    inter = max(w, 0) * max(h, 0)
    area = [(x[2] - x[0] + offset) * (x[3] - x[1] + offset) for x in (a, b)]
    return inter / (sum(area) - inter)


@stand_in
@pytest.mark.parametrize("device", DEVICES)
class TestSuppression:
    @pytest.mark.parametrize("offset", [0, 1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_nms(self, device, offset, dtype):
        b, scores = boxes(60).to(dtype), torch.rand(60, generator=torch.Generator().manual_seed(1))
        dets, kept = ops.nms(b.to(device), scores.to(device), 0.4, offset)
        expected = literal_nms(b.double().tolist(), scores, 0.4, offset)
        assert kept.tolist() == expected and 5 < len(expected) < 60
        torch.testing.assert_close(dets.cpu().double()[:, :4], b.double()[expected])

    def test_nms_with_a_least_score_and_a_number(self, device):
        b, scores = boxes(60).to(device), torch.rand(60, generator=torch.Generator().manual_seed(1)).to(device)
        dets, kept = ops.nms(b, scores, 0.4, score_threshold=0.3, max_num=7)
        assert len(kept) == 7 and (dets[:, 4] > 0.3).all()

    def test_nothing_to_suppress(self, device):
        empty = torch.zeros(0, 4, device=device)
        dets, kept = ops.nms(empty, empty[:, 0], 0.5)
        assert dets.shape == (0, 5) and len(kept) == 0
        dets, kept = ops.soft_nms(empty, empty[:, 0])
        assert dets.shape == (0, 5) and len(kept) == 0

    @pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
    def test_soft_nms(self, device, method):
        b, scores = boxes(30), torch.rand(30, generator=torch.Generator().manual_seed(1))
        before = scores.clone()
        dets, kept = ops.soft_nms(b.to(device), scores.to(device), 0.3, 0.5, 0.05, method)
        assert torch.equal(scores, before)
        expected, left = [], dict(enumerate(scores.tolist()))
        while left:
            i = max(left, key=left.get)
            score = left.pop(i)
            expected.append((i, score))
            for j in list(left):
                iou = literal_iou(b[i].tolist(), b[j].tolist())
                linear = 1 - iou if method == "linear" else 0.0
                left[j] *= (
                    torch.tensor(-(iou**2) / 0.5).exp().item() if method == "gaussian" else linear if iou >= 0.3 else 1
                )
                if left[j] < 0.05:
                    del left[j]
        assert kept.tolist() == [i for i, _ in expected] and len(expected) > 3
        torch.testing.assert_close(dets[:, 4].cpu(), torch.tensor([score for _, score in expected]))

    @pytest.mark.parametrize("split", [10000, 10])
    def test_batched_nms_keeps_classes_apart(self, device, split):
        b = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [1, 1, 10, 10]]).repeat(6, 1).to(device)
        scores = torch.linspace(1, 0.1, 18).to(device)
        classes = (torch.arange(18) % 3 == 1).long().to(device)
        _, kept = ops.batched_nms(b, scores, classes, dict(type="nms", iou_threshold=0.5, split_thr=split))
        assert kept.tolist() == [0, 1]
        _, kept = ops.batched_nms(b, scores, classes, dict(type="soft_nms", iou_threshold=0.5, min_score=0.5))
        assert kept[:2].tolist() == [0, 1]

    def test_nms_match_groups_what_is_suppressed(self, device):
        b = torch.tensor([[0.0, 0, 10, 10, 0.5], [0, 0, 10, 10, 0.9], [20, 20, 30, 30, 0.7]]).to(device)
        assert [group.tolist() for group in ops.nms_match(b, 0.5)] == [[1, 0], [2]]


@stand_in
@pytest.mark.parametrize("device", DEVICES)
class TestRegions:
    rois = torch.tensor([[0, 1.0, 1.5, 9.0, 7.0], [1, 0, 0, 1, 1], [0, 3, 3, 3, 3], [1, -4, 2, 30, 12.0]])

    def literal_roi_align(self, x, rois, size, scale, samples, aligned):
        """Bilinear samples on a regular grid within each bin, averaged; zero a pixel beyond the border."""
        shift = 0.5 if aligned else 0.0
        out = []
        for batch, *box in rois.tolist():
            x1, y1, x2, y2 = (v * scale - shift for v in box)
            w, h = x2 - x1, y2 - y1
            if not aligned:
                w, h = max(w, 1.0), max(h, 1.0)
            ticks = (torch.arange(size * samples).to(x) + 0.5) / (size * samples)
            gy, gx = torch.meshgrid(y1 + ticks * h, x1 + ticks * w, indexing="ij")
            inside = (gx >= -1) & (gx <= x.shape[3]) & (gy >= -1) & (gy <= x.shape[2])
            gx, gy = gx.clamp(0, x.shape[3] - 1), gy.clamp(0, x.shape[2] - 1)
            grid = torch.stack((gx / (x.shape[3] - 1) * 2 - 1, gy / (x.shape[2] - 1) * 2 - 1), -1)
            values = F.grid_sample(x[int(batch)][None], grid[None], align_corners=True) * inside
            out.append(F.avg_pool2d(values, samples)[0])
        return torch.stack(out)

    @pytest.mark.parametrize("aligned", [True, False])
    def test_roi_align(self, device, aligned):
        x = random(2, 3, 9, 12, device=device, dtype=torch.float64).requires_grad_()
        rois = self.rois.to(x)
        y = ops.RoIAlign(4, 0.8, 2, aligned=aligned)(x, rois)
        expected = self.literal_roi_align(x, rois, 4, 0.8, 2, aligned)
        torch.testing.assert_close(y, expected)
        grad = random(*y.shape, seed=1).to(y)
        torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (y, expected)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_roi_align_in_half_precision(self, device, dtype):
        x = random(2, 3, 9, 12, device=device, dtype=dtype).requires_grad_()
        y = ops.RoIAlign(4, 0.8, 0)(x, self.rois.to(device, dtype))
        y.float().sum().backward()
        wide = x.detach().float().requires_grad_()
        z = ops.RoIAlign(4, 0.8, 0)(wide, self.rois.to(device))
        z.sum().backward()
        assert y.dtype == x.grad.dtype == dtype
        torch.testing.assert_close(y.float(), z, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(x.grad.float(), wide.grad, rtol=2e-2, atol=2e-2)

    def test_roi_align_under_autocast(self, device):
        x = random(2, 3, 9, 12, device=device, dtype=torch.bfloat16).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            ops.RoIAlign(4, 0.8, 0)(x, self.rois.to(device)).float().sum().backward()
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0

    def test_no_regions(self, device):
        x = random(2, 3, 9, 12, device=device).requires_grad_()
        y = ops.RoIAlign(4, 0.8, 0)(x, self.rois[:0].to(device))
        y.sum().backward()
        assert y.shape == (0, 3, 4, 4) and not x.grad.any()

    def test_roi_pool_is_a_maximum(self, device):
        x = random(1, 2, 8, 8, device=device).requires_grad_()
        y = ops.RoIPool(2)(x, torch.tensor([[0, 0, 0, 7, 7.0]], device=device))
        torch.testing.assert_close(y, F.max_pool2d(x, 4))
        y.sum().backward()
        assert x.grad.sum() == 8 and x.grad.max() == 1

    def test_maximum_in_roi_align_is_missing(self, device):
        with pytest.raises(RuntimeError, match=r"pool_mode='max'.*Install mmcv"):
            ops.RoIAlign(4, 1.0, 2, pool_mode="max")(random(1, 1, 8, 8, device=device), self.rois[:1].to(device))


@stand_in
@pytest.mark.parametrize("device", DEVICES)
def test_sigmoid_focal_loss(device):
    logits = random(7, 4, device=device).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 4, 0], device=device)  # 4 is the background
    loss = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "sum")
    p = logits.sigmoid()
    positive = F.one_hot(target, 5)[:, :4]
    expected = -(0.25 * positive * (1 - p) ** 2 * p.log() + 0.75 * (1 - positive) * p**2 * (1 - p).log()).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (loss, expected)))
    weights = torch.tensor([1.0, 2, 3, 4], device=device)
    weighted = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, weights, "none")
    plain = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    torch.testing.assert_close(
        weighted / plain, torch.tensor([1.0, 2, 3, 4, 1, 1, 1], device=device)[:, None].expand(7, 4)
    )


@stand_in
@pytest.mark.parametrize("device", DEVICES)
class TestDeformable:
    """Without offsets and masks it is a convolution; with whole-pixel offsets, one of the shifted image."""

    @pytest.mark.parametrize("stride, padding, dilation, groups", [(1, 1, 1, 1), (2, 2, 2, 2)])
    def test_convolution(self, device, stride, padding, dilation, groups):
        x = random(2, 4, 9, 10, device=device).requires_grad_()
        conv = ops.DeformConv2d(4, 6, 3, stride, padding, dilation, groups).to(device)
        expected = F.conv2d(x, conv.weight, None, stride, padding, dilation, groups)
        offset = torch.zeros(2, 18, *expected.shape[2:], device=device, requires_grad=True)
        y = conv(x, offset)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        grad = random(*y.shape, seed=1).to(device)
        got = torch.autograd.grad(y, (x, conv.weight, offset), grad)
        want = torch.autograd.grad(expected, (x, conv.weight), grad)
        torch.testing.assert_close(got[:2], want, rtol=1e-4, atol=1e-5)
        assert got[2].abs().sum() > 0

    def test_offsets_are_y_then_x(self, device):
        x = random(1, 1, 12, 12, device=device)
        conv = ops.DeformConv2d(1, 1, 3, padding=1).to(device)
        offset = torch.zeros(1, 9, 2, 12, 12, device=device)
        offset[:, :, 0], offset[:, :, 1] = 2, -1
        shifted = torch.roll(x, (-2, 1), (2, 3))
        inner = (slice(None), slice(None), slice(3, 9), slice(3, 9))
        y, expected = conv(x, offset.flatten(1, 2)), F.conv2d(shifted, conv.weight, padding=1)
        torch.testing.assert_close(y[inner], expected[inner], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("bias", [True, False])
    def test_modulated_convolution(self, device, bias):
        x = random(2, 4, 9, 10, device=device).requires_grad_()
        conv = ops.ModulatedDeformConv2d(4, 6, 3, padding=1, bias=bias).to(device)
        mask = torch.full((2, 9, 9, 10), 0.5, device=device, requires_grad=True)
        y = conv(x, torch.zeros(2, 18, 9, 10, device=device), mask)
        expected = F.conv2d(x, conv.weight * 0.5, conv.bias, padding=1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        grad = random(*y.shape, seed=1).to(device)
        inputs = (x, conv.weight, conv.bias) if bias else (x, conv.weight)
        got = torch.autograd.grad(y, (*inputs, mask), grad)
        torch.testing.assert_close(
            got[: len(inputs)], torch.autograd.grad(expected, inputs, grad), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(got[-1].sum(), ((y - (conv.bias[:, None, None] if bias else 0)) * grad).sum() / 0.5)

    def test_modulated_convolution_with_more_offsets_than_outputs(self, device):
        """As mmcv's kernels read them: the first numbers of each image, in the output's shape. DyHead does so."""
        x, weight = random(2, 2, 5, 6, device=device), random(3, 2, 3, 3, seed=1, device=device).requires_grad_()
        offset = random(2, 18, 9, 11, seed=2, device=device).round().requires_grad_()
        mask = torch.rand(2, 9, 9, 11, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
        y = ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1)
        expected = torch.zeros(2, 3, 5, 6)
        for b, k, row, column in np.ndindex(2, 9, 5, 6):
            place = lambda c: (c * 5 + row) * 6 + column  # noqa: B023, E731
            moved = [int(offset[b].flatten()[place(2 * k + axis)]) for axis in (0, 1)]
            at = row + k // 3 - 1 + moved[0], column + k % 3 - 1 + moved[1]
            if 0 <= at[0] < 5 and 0 <= at[1] < 6:
                taken = x[b, :, at[0], at[1]] * mask[b].flatten()[place(k)]
                expected[b, :, row, column] += (weight[:, :, k // 3, k % 3] @ taken).detach().cpu()
        torch.testing.assert_close(y.detach().cpu(), expected, rtol=1e-4, atol=1e-5)
        y.sum().backward()
        for tensor, channels in ((offset, 18), (mask, 9)):
            grad = tensor.grad.flatten(1)
            assert grad[:, : channels * 30].count_nonzero() > channels * 20
            assert not grad[:, channels * 30 :].any()

    def test_modulated_convolution_with_fewer_offsets_than_outputs(self, device):
        conv = ops.ModulatedDeformConv2d(4, 6, 3, padding=1).to(device)
        with pytest.raises(RuntimeError, match=r"a place for each of the output's \(9, 10\); they are \(5, 5\)"):
            conv(random(2, 4, 9, 10, device=device), *(torch.zeros(2, c, 5, 5, device=device) for c in (18, 9)))

    def test_dyhead(self, device):
        from mmdet.models.necks import DyHead

        neck = DyHead(16, 16, num_blocks=2, zero_init_offset=False).to(device)
        maps = [random(2, 16, *size, device=device).requires_grad_() for size in ((13, 10), (7, 5), (4, 3))]
        outputs = neck(maps)
        assert [tuple(y.shape[2:]) for y in outputs] == [(13, 10), (7, 5), (4, 3)]
        sum(y.square().sum() for y in outputs).backward()
        assert all(torch.isfinite(m.grad).all() and m.grad.any() for m in maps)

    def test_attention_reads_where_it_is_told(self, device):
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

        value = random(1, 6 * 8, 2, 4, device=device).requires_grad_()
        shapes, start = torch.tensor([[6, 8]], device=device), torch.tensor([0], device=device)
        rows, columns = torch.tensor([1, 5]), torch.tensor([0, 7])
        at = torch.stack(((columns + 0.5) / 8, (rows + 0.5) / 6), -1).to(device)  # x, y of pixel centres
        where = at[None, :, None, None, None].expand(1, 2, 2, 1, 1, 2).contiguous()
        weights = torch.full((1, 2, 2, 1, 1), 0.25, device=device)
        y = MultiScaleDeformableAttnFunction.apply(value, shapes, start, where, weights, 64)
        expected = 0.25 * value[:, rows * 8 + columns].flatten(2)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(*(torch.autograd.grad(v.sum(), value)[0] for v in (y, expected)))


@stand_in
def test_what_is_missing_says_which_package_brings_it():
    with pytest.raises(RuntimeError, match=r"no compiled operator carafe_forward.*Install mmcv"):
        ops.carafe(torch.zeros(1, 4, 4, 4), torch.zeros(1, 9, 8, 8), 3, 1, 2)


@stand_in
def test_environment_reports_the_stand_in():
    from mmcv.utils import collect_env

    assert "torchvision" in collect_env()["MMCV Compiler"]


def test_installing_twice_is_installing_once():
    before = list(sys.meta_path)
    operators.install()
    assert sys.meta_path == before


def test_a_compiled_mmcv_comes_first(tmp_path):
    """A module mmcv._ext that other finders find is the one that is imported."""
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").touch()
    (tmp_path / "mmcv" / "_ext.py").write_text("compiled = True\n")
    code = "import vim2.mm.operators as o; o.install(); import mmcv._ext as e; print(e.__file__)"
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; {code}"
    output = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == str(tmp_path / "mmcv" / "_ext.py"), output.stderr
