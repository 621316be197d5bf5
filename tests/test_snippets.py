"""The functions of the README's equation table, each copied out alone and run on a case worked by hand.

What stands in this file as `bnr.attention` is not imported: it is the function's source with five names and no more.
"""
import ast
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from torch import tensor
from torch.testing import assert_close

HEADING = "## Reading beside the paper"


def named_in_the_readme():
    """Of each row of the table, in its last column: `room.function`; a name alone is not one to copy."""
    section = (ROOT / "README.md").read_text().split(f"{HEADING}\n")[1].split("\n## ")[0]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    functions = {}
    for room, function in re.findall(r"`(?:wsss[./])?(\w+)\.(?!py`)(\w+)`", rows):
        functions.setdefault(room, set()).add(function)
    return functions


TABLE = named_in_the_readme()


def alone(room):
    """The functions of a room that are in the table, each executed by itself."""
    path = next(path for path in (ROOT / f"{room}.py", ROOT / "wsss" / f"{room}.py") if path.is_file())
    source, functions = path.read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in TABLE[room]:
            names = {"math": math, "np": np, "torch": torch, "nn": nn, "F": F}
            exec(ast.get_source_segment(source, node), names)
            functions[node.name] = names[node.name]
    assert functions.keys() == TABLE[room]
    return SimpleNamespace(**functions)


bnr, seeds, psa, crf, evaluate = map(alone, ("bnr", "seeds", "psa", "crf", "evaluate"))


def test_each_function_of_the_readmes_table_has_a_case_below():
    below = Path(__file__).read_text()
    lacking = [f"{room}.{name}" for room, names in TABLE.items() for name in names if f"{room}.{name}(" not in below]
    assert len(TABLE) >= 5 and not lacking


def test_cam_of_a_head_that_reads_one_channel_is_that_channel():
    features, weight = torch.randn(1, 4, 5, 5), torch.zeros(2, 4, 3, 3)
    weight[0, 3, 1, 1], weight[1, 0, 1, 1] = 1, -2
    cam = bnr.class_activation_map(features, weight, tensor([0.0, 0.5]))
    assert_close(cam[0, 0], features[0, 3])
    assert_close(cam[0, 1], 0.5 - 2 * features[0, 0])


def test_attention_divides_by_the_root_of_the_head_width_and_its_rows_sum_to_one():
    q, k = torch.ones(1, 1, 1, 4), torch.stack([torch.zeros(4), torch.ones(4)])[None, None]
    expected = torch.softmax(tensor([0.0, 4 / 2]), 0)  # 1 + 1 + 1 + 1 = 4, over sqrt(4)
    assert_close(bnr.attention(q, k)[0, 0, 0], expected)
    assert_close(bnr.attention(*torch.randn(2, 2, 2, 10, 8)).sum(-1), torch.ones(2, 2, 10))


def test_class_token_is_left_out_after_heads_are_averaged_and_blocks_summed():
    first, second = torch.rand(2, 1, 2, 3, 3)
    ours = bnr.sum_over_blocks([bnr.mean_over_heads(first), bnr.mean_over_heads(second)])
    expected = (first[0, 0] + first[0, 1] + second[0, 0] + second[0, 1])[1:, 1:] / 2
    assert_close(ours[0], expected)


def test_attention_mixes_rows_not_columns():
    attn = torch.zeros(1, 4, 4)
    attn[0, 0, 3] = 1  # place 0 looks at place 3
    cam = tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert_close(bnr.refined_cam(torch.eye(4)[None], cam), cam)  # identity attention changes nothing
    assert_close(bnr.refined_cam(attn, cam), tensor([[[[4.0, 0.0], [0.0, 0.0]]]]))


def test_noise_scales_the_mean_attention_and_is_a_constant():
    attn, refined = torch.eye(4, requires_grad=True)[None] * 5, torch.randn(1, 2, 2, 2)
    assert_close(bnr.noisy_cam(attn, refined, blocks=5, noise=1), refined)
    assert_close(bnr.noisy_cam(attn, refined, blocks=10, noise=3), 1.5 * refined)
    assert not bnr.noisy_cam(attn, refined, blocks=5, noise=1).requires_grad


@pytest.mark.parametrize("classes", [1, 5])  # fewer and more than the 4 channels of a head
def test_attend_to_equal_keys_averages_the_maps_with_a_zero_for_the_class_token(classes):
    maps = torch.rand(2, classes, 2, 3)
    flat = (torch.randn(2, 3, 7, 4), torch.zeros(2, 3, 7, 4))  # queries and keys of a block with 3 heads
    mean = maps.sum((2, 3), keepdim=True) / 7  # over 6 places and the class token
    assert_close(bnr.attend([flat], maps), mean.expand_as(maps))
    assert_close(bnr.attend([flat, flat], maps), 2 * mean.expand_as(maps))  # blocks are summed


def test_soft_margin_loss_is_log_2_at_zero_and_small_for_sure_and_right_logits_and_bnr_loss_is_a_sum():
    labels = tensor([[1.0, 0, 1], [0, 0, 1]])
    assert bnr.soft_margin_loss(torch.zeros(2, 3), labels).item() == pytest.approx(math.log(2))
    assert bnr.soft_margin_loss(200 * labels - 100, labels).item() == pytest.approx(0)
    assert bnr.soft_margin_loss(100 - 200 * labels, labels).item() == pytest.approx(100)
    assert bnr.bnr_loss(tensor(0.25), tensor(0.5)).item() == 0.75


def test_normalised_maps_span_zero_to_one():
    cams = tensor([[[2.0, 4.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, 8.0]]])
    expected = tensor([[[0, 1.0], [0.5, 0]], [[0, 0], [0, 1]]])
    assert_close(seeds.normalise(cams), expected, atol=2e-5, rtol=0)
    assert (seeds.normalise(torch.full((1, 2, 2), 3.0)) == 0).all()


def test_hard_threshold_takes_the_class_at_equality():
    cams = np.array([[[0.5, 0.2]], [[0.1, 0.3]]], np.float32)
    assert seeds.hard_threshold(np.array([3, 7]), cams, 0.5).tolist() == [[3, 0]]
    assert seeds.hard_threshold(np.array([3, 7]), cams, 0.3).tolist() == [[3, 7]]
    assert (seeds.hard_threshold(np.zeros(0, int), np.zeros((0, 4, 5)), 0.3) == np.zeros((4, 5))).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_eigen_cam_of_features_of_one_pattern_is_that_pattern_with_the_sign_of_the_cam(sign):
    pattern = tensor([[3.0, 0], [0, 4]])
    features = sign * tensor([1.0, -2, 0.5])[:, None, None] * pattern
    assert_close(seeds.eigen_cam(features, 7 * pattern[None]), pattern / 5)  # of length 1


def test_affinity_is_exp_of_the_mean_difference():
    start, end = tensor([[0.0, 1.0], [0.0, 5.0]]), tensor([[0.0, 3.0], [0.0, 1.0]])  # two channels, two pairs
    assert_close(psa.affinity(start, end), tensor([1.0, math.exp(-(2 + 4) / 2)]))


def test_a_pair_is_of_one_kind_and_of_none_with_a_void_place():
    start, end = tensor([0, 2, 1, 0, 255, 3, 255]), tensor([0, 2, 2, 1, 0, 255, 255])
    background, same, unlike = (kind.int().tolist() for kind in psa.pair_kinds(start, end))
    assert background == [1, 0, 0, 0, 0, 0, 0]
    assert same == [0, 1, 0, 0, 0, 0, 0]
    assert unlike == [0, 0, 1, 1, 0, 0, 0]


def test_affinity_loss_weighs_the_means_of_three_kinds_of_pairs():
    kinds = [tensor(kind, dtype=torch.bool) for kind in ([1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0])]
    ours = psa.affinity_loss(tensor([0.5, 0.25, 0.2, 0.9, 0.3]), kinds, [kind.sum() for kind in kinds])
    expected = -(math.log(0.5) + math.log(0.25)) / 2 / 4 - math.log(0.2) / 4 - math.log(1 - 0.9) / 2
    assert ours.item() == pytest.approx(expected, rel=1e-3)
    half = psa.affinity_loss(tensor([0.5, 0.25, 0.2, 0.9, 0.3]), kinds, [2 * kind.sum() for kind in kinds])
    assert half.item() == pytest.approx(expected / 2, rel=1e-3)  # counts are those of the whole batch
    assert psa.affinity_loss(torch.rand(5), 3 * [torch.zeros(5, dtype=torch.bool)], 3 * [tensor(0)]).item() == 0


def test_transition_divides_powers_by_their_columns():
    matrix = psa.transition(tensor([[1.0, 0.5], [0.5, 1.0]]), beta=2)
    assert_close(matrix, tensor([[0.8, 0.2], [0.2, 0.8]]))
    assert_close(psa.transition(torch.rand(5, 5), beta=14).sum(0), torch.ones(5))


def test_walk_keeps_a_constant_map_and_mixes_by_columns():
    matrix = tensor([[0.8, 0.5], [0.2, 0.5]])
    assert_close(psa.random_walk(torch.full((1, 2), 0.42), matrix, 128), torch.full((1, 2), 0.42))
    assert_close(psa.random_walk(tensor([[1.0, 0.0]]), matrix, 1), tensor([[0.8, 0.5]]))
    assert_close(psa.random_walk(tensor([[1.0, 0.0]]), matrix, 2), tensor([[0.8 * 0.8 + 0.5 * 0.2, 0.65]]))


def test_crf_of_one_pixel_by_hand():
    ours = crf.dense_crf(np.zeros((1, 1, 3), np.uint8), np.array([0.6, 0.4], np.float32).reshape(2, 1, 1),
                          gauss=(3, 2), bilateral=(50, 5, 4), steps=1)
    first, second = 0.6 * math.exp(6 * 0.6), 0.4 * math.exp(6 * 0.4)  # compat 2 + 4, and only itself to agree with
    assert ours.ravel().tolist() == pytest.approx([first / (first + second), second / (first + second)], rel=1e-3)


def test_confusion_counts_masks_in_rows_and_leaves_void_out():
    mask, prediction = np.array([[0, 0, 1], [2, 255, 1]], np.uint8), np.array([[0, 1, 1], [2, 2, 255]], np.uint8)
    matrix = evaluate.confusion(mask, prediction, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]] and matrix.dtype == np.int64


def test_iou_by_hand_and_nan_where_a_class_is_absent():
    ours = evaluate.iou(np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert ours[:2].tolist() == [3 / 6, 4 / 7] and np.isnan(ours[2])
    assert evaluate.iou(np.zeros((5, 2, 2))).shape == (5, 2)


def test_average_precision_by_hand():
    scores = tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    labels = tensor([[1.0, 0], [0, 0], [1, 0]])  # hits at ranks 1 and 3; the second class never occurs
    assert evaluate.mean_average_precision(scores, labels) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert math.isnan(evaluate.mean_average_precision(scores, torch.zeros(3, 2)))
