"""cam.py against the grad-cam library, the papers' equations, and its promises to a training loop."""

import gc
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

import cam
from cam import CAM, upsample

LIBRARY = {"gradcam": GradCAM, "gradcam++": GradCAMPlusPlus}


def network(name, **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **arguments).eval()


def photographs(size=224, count=2):
    from sklearn.datasets import load_sample_images

    pictures = [torch.from_numpy(p.copy()).permute(2, 0, 1)[None] / 255 for p in load_sample_images().images]
    return F.interpolate(torch.cat(pictures)[:count], size=size, mode="bilinear", antialias=True) * 4 - 2


def vit_grid(tokens):
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (14, 14))


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize("name, layer, reshape", [("resnet18", "layer4", None),
                                                  ("vit_tiny_patch16_224", "blocks.11.norm1", vit_grid)])
def test_heat_is_the_librarys_to_1e5(method, name, layer, reshape):
    model, images, classes = network(name), photographs(), [3, 5]
    with CAM(model, method) as explain:
        heat = upsample(explain(model(images), classes=torch.tensor(classes)), 224)
    assert explain.layer_name == layer
    with LIBRARY[method](model, [model.get_submodule(layer)], reshape_transform=reshape) as library:
        theirs = library(images, [ClassifierOutputTarget(c) for c in classes])
    assert np.abs(heat.numpy() - theirs).max() <= 1e-5


def test_cam_is_gradcam_where_pooling_and_a_linear_head_end_the_network():
    model, images = network("resnet18"), photographs()
    with CAM(model, "cam") as explain, CAM(model, "gradcam") as by_gradient:
        logits = model(images)
        torch.testing.assert_close(explain(logits), by_gradient(logits), atol=1e-5, rtol=0)


def test_cam_takes_no_gradient():
    model = network("resnet18")
    with torch.no_grad(), CAM(model, "cam") as explain:
        assert explain(model(photographs())).shape == (2, 7, 7)


def test_gradcam_plus_plus_is_equation_19_where_gradients_outweigh_the_constant():
    torch.manual_seed(0)
    A, G = torch.rand(1, 3, 4, 5, dtype=torch.float64), 10 * torch.randn(1, 3, 4, 5, dtype=torch.float64)
    weights = []
    for k in range(3):
        weight = 0.0
        for i in range(4):
            for j in range(5):
                g = G[0, k, i, j].item()
                alpha = g**2 / (2 * g**2 + sum(A[0, k].flatten().tolist()) * g**3)
                weight += alpha * max(g, 0.0)
        weights.append(weight)
    expected = sum(w * A[0, k] for k, w in enumerate(weights))
    torch.testing.assert_close((cam.gradcam_plus_plus(A, G) * A).sum(1)[0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name, size, layer, grid", [
    ("resnet18", 224, "layer4", 7), ("resnet18", 64, "layer3", 4), ("resnet18", 32, "layer2", 4),
    ("resnet50", 224, "layer4", 7), ("efficientnet_b0", 224, "bn2", 7), ("tf_efficientnet_lite0", 128, "bn2", 4),
    ("vgg16", 224, "features.30", 7), ("convnext_tiny", 224, "stages.3", 7), ("convnext_tiny", 64, "stages.2", 4),
    ("swin_tiny_patch4_window7_224", 224, "norm", 7), ("vit_tiny_patch16_224", 224, "blocks.11.norm1", 14),
    ("test_vit", 160, "blocks.5.norm1", 10), ("densenet121", 224, "features.norm5", 7)])
def test_the_rule_explains_the_deepest_layer_with_a_4x4_grid(name, size, layer, grid):
    import run

    model = network(name).train()
    assert run.try_network({"model": name, "cam": "gradcam", "layer": None, "image_size": size}, model) == (
        layer, (grid, grid))
    assert model.training


def test_images_need_not_be_square():
    model = network("vit_tiny_patch16_224", img_size=(96, 160))
    with CAM(model) as explain:
        heat = explain(model(torch.randn(2, 3, 96, 160)))
    assert heat.shape == (2, 6, 10)
    assert upsample(heat, (96, 160)).shape == (2, 96, 160)


def test_what_does_not_fit_is_an_error_that_says_what_would():
    with pytest.raises(ValueError, match="no layer keeps a 4x4 grid.*use larger images, or name a layer"):
        model = network("test_resnet")
        with CAM(model):
            model(torch.randn(2, 3, 6, 6))
    with pytest.raises(ValueError, match="cam needs a linear head on the global average.*use gradcam"):
        model = network("vit_tiny_patch16_224")
        with CAM(model, "cam") as explain:
            explain(model(photographs()))
    with pytest.raises(ValueError, match="unknown CAM method 'gradcamm'; there are cam, gradcam"):
        CAM(network("resnet18"), "gradcamm")
    with pytest.raises(ValueError, match="no layer 'layer9'.*layer4"):
        CAM(network("resnet18"), layer="layer9")
    with pytest.raises(ValueError, match="name the layer to explain, one of 0, 1"):
        CAM(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()))
    with pytest.raises(ValueError, match="outside torch.no_grad"):
        model = network("test_resnet")
        with torch.no_grad(), CAM(model) as explain:
            explain(model(torch.randn(2, 3, 64, 64)))


def test_a_plain_module_is_explained_at_the_layer_given():
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    model = torch.nn.Sequential(body, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4))
    images = torch.randn(2, 3, 12, 12)
    for layer in (body, "0"):
        with CAM(model, "gradcam", layer) as explain:
            heat = explain(model(images), classes=1)
    weights = model[3].weight[1] / 100
    expected = cam.rescale((weights[:, None, None] * body(images)).sum(1).relu()).detach()
    torch.testing.assert_close(heat, expected)


def test_rows_are_explained_as_they_would_be_among_all():
    model, images = network("test_resnet"), torch.randn(6, 3, 64, 64)
    with CAM(model, "gradcam++") as explain:
        logits = model(images)
        everything = explain(logits, classes=torch.arange(6))
        torch.testing.assert_close(explain(logits, rows=[4, 1], classes=torch.tensor([4, 1])), everything[[4, 1]])
        picked = torch.tensor([False, True, False, False, True, False])
        torch.testing.assert_close(explain(logits, rows=picked, classes=torch.tensor([1, 4])), everything[[1, 4]])
        assert explain(logits, rows=[]).shape == (0, 4, 4)
        assert upsample(explain(logits, rows=[]), 64).shape == (0, 64, 64)
    assert everything.amin((1, 2)).eq(0).all() and everything.amax((1, 2)).eq(1).all()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_the_losss_gradients_are_bit_for_bit_those_without_heat(name):
    images, labels = torch.randn(8, 3, 96, 96), torch.arange(8) % 7
    gradients = []
    for taken in (False, True):
        model = network(name, **({"img_size": 96} if name == "test_vit" else {})).train()
        torch.manual_seed(1)
        if taken:
            with CAM(model) as explain:
                logits = model(images)
                explain(logits, rows=[1, 5])
                assert all(p.grad is None for p in model.parameters())
                F.cross_entropy(logits, labels).backward()
        else:
            F.cross_entropy(model(images), labels).backward()
        assert model.training
        gradients.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_nothing_is_left_behind():
    model = network("test_resnet")
    explain = CAM(model)
    for _ in range(3):
        with explain:
            logits = model(torch.randn(2, 3, 64, 64))
            explain(logits)
            held = weakref.ref(explain._activations[0])
    del logits
    gc.collect()
    assert held() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inside_a_long_block_activations_go_when_their_logits_go():
    model = network("test_resnet")
    with CAM(model) as explain:
        for _ in range(2):
            logits = model(torch.randn(2, 3, 64, 64))
            explain(logits)
            held = weakref.ref(explain._activations[0])
            del logits
            assert held() is None


def test_a_frozen_network_has_the_same_heat():
    model, images = network("vgg11"), photographs(96)
    with CAM(model) as explain:
        heat = explain(model(images))
    model.requires_grad_(False)
    with CAM(model) as explain:
        torch.testing.assert_close(explain(model(images)), heat)


def test_double_stays_double_and_half_is_lifted():
    model, images = network("test_resnet").double(), torch.randn(2, 3, 64, 64)
    with CAM(model) as explain:
        exact = explain(model(images.double()))
    assert exact.dtype == torch.float64
    model.float()
    for dtype in (torch.bfloat16, torch.float16):
        with CAM(model) as explain:
            with torch.autocast("cpu", dtype=dtype):
                logits = model(images)
            heat = explain(logits)
        assert heat.dtype == torch.float32
        assert F.cosine_similarity(heat.flatten(1).double(), exact.flatten(1)).min() > 0.99


def test_a_map_without_contrast_is_cold_everywhere():
    assert cam.rescale(torch.full((1, 3, 3), 0.7)).eq(0).all()
    assert cam.rescale(torch.full((1, 3, 3), float("nan"))).eq(0).all()
